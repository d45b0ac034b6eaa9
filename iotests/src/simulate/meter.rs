//! How far a long run of seeds is, on standard error: a line that is overwritten on a terminal; elsewhere, if it is asked for, a
//! line now and then. It never touches standard output.

use std::{
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// How often a terminal's line is written again.
const ON_TERMINAL: Duration = Duration::from_millis(200);
/// How often there is a line elsewhere.
const ELSEWHERE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct State {
    done: u64,
    failed: u64,
    /// When it was last written.
    written: Option<Duration>,
}

/// See the file's header.
pub(super) struct Meter {
    total: u64,
    on: bool,
    terminal: bool,
    began: Instant,
    state: Mutex<State>,
}

/// What is told of `done` of `total` seeds after `elapsed`.
fn line(done: u64, failed: u64, total: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    if done == 0 || seconds <= 0.0 {
        return format!("{done}/{total} seeds");
    }
    let per_second = done as f64 / seconds;
    let left = (total.saturating_sub(done) as f64 / per_second).ceil() as u64;
    format!(
        "{done}/{total} seeds ({failed} failed), {:.0} per hour, {}:{:02} min left",
        per_second * 3600.0,
        left / 60,
        left % 60
    )
}

impl Meter {
    /// For `total` seeds. It shows on a terminal; elsewhere only when it is `wanted`.
    pub fn new(total: u64, wanted: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self {
            total,
            on: terminal || wanted,
            terminal,
            began: Instant::now(),
            state: Mutex::default(),
        }
    }

    /// A seed has ended.
    pub fn step(&self, failed: bool) {
        let mut state = self.state.lock();
        state.done += 1;
        state.failed += u64::from(failed);
        let elapsed = self.began.elapsed();
        let every = if self.terminal {
            ON_TERMINAL
        } else {
            ELSEWHERE
        };
        let since = elapsed.saturating_sub(state.written.unwrap_or_default());
        if !self.on || since < every {
            return;
        }
        state.written = Some(elapsed);
        let line = line(state.done, state.failed, self.total, elapsed);
        let mut out = std::io::stderr().lock();
        let _ = if self.terminal {
            write!(out, "\r\x1b[K{line}").and_then(|()| out.flush())
        } else {
            writeln!(out, "{line}")
        };
    }

    /// It is over: nothing stays on a terminal; elsewhere the last line tells all.
    pub fn finish(&self) {
        self.clear();
        if self.on && !self.terminal {
            let state = self.state.lock();
            let line = line(state.done, state.failed, self.total, self.began.elapsed());
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        }
    }

    /// Takes the line away, before something else is printed.
    pub fn clear(&self) {
        if self.on && self.terminal {
            let mut out = std::io::stderr().lock();
            let _ = out.write_all(b"\r\x1b[K").and_then(|()| out.flush());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_tells_how_far_it_is_how_fast_and_how_long_it_will_take() {
        assert_eq!(line(0, 0, 10, Duration::ZERO), "0/10 seeds");
        assert_eq!(
            line(1000, 1, 4050, Duration::from_secs(20)),
            "1000/4050 seeds (1 failed), 180000 per hour, 1:01 min left"
        );
    }
}
