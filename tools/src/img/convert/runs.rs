//! Cuts chunks into runs of data and of zeroes. Pure arithmetic over bytes.

use block_core::buffer::is_zero;

/// A part of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where it begins, in bytes from the chunk's beginning.
    pub start: usize,
    /// Where it ends.
    pub end: usize,
    /// It is all zeroes.
    pub zero: bool,
}

/// Cuts `bytes`, which begin at `offset` of the target, into runs. Zeroes count in whole multiples of `unit` of the
/// target, and in runs of at least `least` bytes.
pub fn runs(bytes: &[u8], offset: u64, unit: u64, least: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let mut start = 0;
    while start < bytes.len() {
        let to_boundary = unit - (offset + start as u64) % unit;
        let end = bytes.len().min(start + to_boundary as usize);
        let zero = is_zero(&bytes[start..end]);
        match runs.last_mut() {
            Some(last) if last.zero == zero => last.end = end,
            _ => runs.push(Run { start, end, zero }),
        }
        start = end;
    }
    if runs
        .iter()
        .any(|run| run.zero && ((run.end - run.start) as u64) < least)
    {
        // Short holes aren't worth a request each.
        let mut merged: Vec<Run> = Vec::new();
        for mut run in runs {
            run.zero = run.zero && (run.end - run.start) as u64 >= least;
            match merged.last_mut() {
                Some(last) if last.zero == run.zero => last.end = run.end,
                _ => merged.push(run),
            }
        }
        return merged;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: usize, end: usize, zero: bool) -> Run {
        Run { start, end, zero }
    }

    #[test]
    fn zeroes_count_in_whole_units_of_the_target() {
        let mut bytes = vec![0; 4096 * 4];
        bytes[4096] = 1;
        bytes[4096 * 2 - 1] = 1;
        assert_eq!(
            runs(&bytes, 0, 4096, 4096),
            [
                run(0, 4096, true),
                run(4096, 8192, false),
                run(8192, 16384, true)
            ]
        );
        // The chunk begins in the middle of a unit.
        assert_eq!(
            runs(&bytes, 2048, 4096, 4096),
            [run(0, 10240, false), run(10240, 16384, true)]
        );
    }

    #[test]
    fn short_runs_of_zeroes_are_data() {
        let mut bytes = vec![0; 512 * 8];
        bytes[0] = 1;
        bytes[1024] = 1;
        assert_eq!(
            runs(&bytes, 0, 512, 2048),
            [run(0, 1536, false), run(1536, 4096, true)]
        );
        assert_eq!(runs(&bytes, 0, 512, 4096), [run(0, 4096, false)]);
    }
}
