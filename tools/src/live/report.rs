//! What `blk live` found out: per job, per disk, in total; as a table for people and as JSON; and the verdict.

use std::fmt::Write;

use serde::Serialize;

/// One job of the run.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobLine {
    /// The disk it ran on.
    pub disk: String,
    /// `backup`, `commit`, `stream`, `mirror`.
    pub kind: &'static str,
    /// Which variant of it.
    pub mode: &'static str,
    /// How long it ran, in seconds.
    pub seconds: f64,
    /// Bytes copied as data.
    pub bytes_copied: u64,
    /// Bytes copied while the guest was writing in their range.
    pub bytes_while_guest_wrote: u64,
    /// Bytes of its target that were compared with the oracle; 0 where the disk itself is the target.
    pub bytes_verified: u64,
}

/// What a guest did.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskLine {
    /// The disk.
    pub disk: String,
    /// Reads, each compared with the oracle.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Zero writes.
    pub zero_writes: u64,
    /// Discards.
    pub discards: u64,
    /// Flushes.
    pub flushes: u64,
    /// Bytes read and written by the guest.
    pub bytes: u64,
    /// Bytes compared at the end, open and reopened.
    pub bytes_verified: u64,
}

/// Numbers that prove that something happened.
#[derive(Debug, Clone, Copy, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Proof {
    /// Requests that had to wait at the gate.
    pub gate_waits: u64,
    /// Frees that were put off because a cluster was pinned.
    pub frees_deferred_by_pins: u64,
    /// Copies on write.
    pub copies_on_write: u64,
    /// Clusters that were freed.
    pub clusters_freed: u64,
}

/// Everything.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The seed of the run.
    pub seed: u64,
    /// The base image.
    pub base: String,
    /// Its virtual size in bytes.
    pub size: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// The jobs, in the order in which they ended.
    pub jobs: Vec<JobLine>,
    /// The disks.
    pub disks: Vec<DiskLine>,
    /// Images that `check` was run on, and found clean.
    pub images_checked: u64,
    /// Counters of all nodes together.
    pub proof: Proof,
    /// The base image is what it was.
    pub base_unchanged: bool,
    /// What is wrong; empty if nothing is.
    pub failures: Vec<String>,
    /// What should have happened and didn't.
    pub inconclusive: Vec<String>,
}

impl Report {
    /// Adds what a run that proves something must have done, where it didn't.
    pub fn judge(&mut self) {
        let mut missing = Vec::new();
        for (name, count) in [
            ("no request had to wait at the gate", self.proof.gate_waits),
            (
                "no free was put off by a pin",
                self.proof.frees_deferred_by_pins,
            ),
            ("no cluster was copied on write", self.proof.copies_on_write),
            ("no cluster was freed", self.proof.clusters_freed),
        ] {
            if count == 0 {
                missing.push(name.to_owned());
            }
        }
        for kind in ["backup", "commit", "stream", "mirror"] {
            let mine: Vec<&JobLine> = self.jobs.iter().filter(|job| job.kind == kind).collect();
            if mine.is_empty() {
                missing.push(format!("no {kind} ran to its end"));
            } else if mine.iter().all(|job| job.bytes_while_guest_wrote == 0) {
                missing.push(format!(
                    "no {kind} copied anything while the guest was writing there"
                ));
            }
        }
        for disk in &self.disks {
            for (what, count) in [
                ("write", disk.writes),
                ("read", disk.reads),
                ("discard", disk.discards),
                ("zero write", disk.zero_writes),
            ] {
                if count == 0 {
                    missing.push(format!("the guest of disk {} did no {what}", disk.disk));
                }
            }
        }
        self.inconclusive = missing;
    }

    /// `passed`, `failed` or `inconclusive`.
    pub fn verdict(&self) -> &'static str {
        if !self.failures.is_empty() {
            "failed"
        } else if !self.inconclusive.is_empty() {
            "inconclusive"
        } else {
            "passed"
        }
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        match self.verdict() {
            "passed" => 0,
            "failed" => 1,
            _ => 2,
        }
    }

    /// For people.
    pub fn human(&self) -> String {
        let mut out = String::new();
        let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
        let _ = writeln!(
            out,
            "\nbase {} ({:.0} MiB), seed {}, {:.1} s\n",
            self.base,
            mib(self.size),
            self.seed,
            self.seconds
        );
        let _ = writeln!(
            out,
            "{:<8} {:<8} {:<24} {:>8} {:>12} {:>18} {:>13}",
            "disk", "job", "mode", "seconds", "copied MiB", "beside guest MiB", "verified MiB"
        );
        for job in &self.jobs {
            let _ = writeln!(
                out,
                "{:<8} {:<8} {:<24} {:>8.1} {:>12.1} {:>18.1} {:>13.1}",
                job.disk,
                job.kind,
                job.mode,
                job.seconds,
                mib(job.bytes_copied),
                mib(job.bytes_while_guest_wrote),
                mib(job.bytes_verified)
            );
        }
        let _ = writeln!(
            out,
            "\n{:<8} {:>9} {:>9} {:>9} {:>9} {:>8} {:>11} {:>13}",
            "disk", "reads", "writes", "zeroes", "discards", "flushes", "guest MiB", "verified MiB"
        );
        for disk in &self.disks {
            let _ = writeln!(
                out,
                "{:<8} {:>9} {:>9} {:>9} {:>9} {:>8} {:>11.1} {:>13.1}",
                disk.disk,
                disk.reads,
                disk.writes,
                disk.zero_writes,
                disk.discards,
                disk.flushes,
                mib(disk.bytes),
                mib(disk.bytes_verified)
            );
        }
        let proof = &self.proof;
        let _ = writeln!(
            out,
            "\ngate waits {}, frees deferred by pins {}, copies on write {}, clusters freed {}\n\
             images checked {}, base image {}",
            proof.gate_waits,
            proof.frees_deferred_by_pins,
            proof.copies_on_write,
            proof.clusters_freed,
            self.images_checked,
            if self.base_unchanged {
                "unchanged"
            } else {
                "CHANGED"
            },
        );
        for failure in &self.failures {
            let _ = writeln!(out, "FAILED: {failure}");
        }
        for gap in &self.inconclusive {
            let _ = writeln!(out, "inconclusive: {gap}");
        }
        let _ = writeln!(
            out,
            "{}",
            match self.verdict() {
                "passed" => "passed: every byte is what it should be, every image is clean",
                "failed" => "failed",
                _ => "inconclusive: nothing is wrong, but the run doesn't prove what it claims",
            }
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(kind: &'static str, beside: u64) -> JobLine {
        JobLine {
            disk: "a".into(),
            kind,
            mode: "full",
            seconds: 1.0,
            bytes_copied: 1,
            bytes_while_guest_wrote: beside,
            bytes_verified: 1,
        }
    }

    fn good() -> Report {
        Report {
            jobs: ["backup", "commit", "stream", "mirror"]
                .map(|kind| job(kind, 1))
                .to_vec(),
            proof: Proof {
                gate_waits: 1,
                frees_deferred_by_pins: 1,
                copies_on_write: 1,
                clusters_freed: 1,
            },
            ..Report::default()
        }
    }

    #[test]
    fn a_run_in_which_everything_happened_passes() {
        let mut report = good();
        report.judge();
        assert_eq!((report.verdict(), report.status()), ("passed", 0));
    }

    #[test]
    fn a_zero_where_coverage_is_claimed_is_inconclusive() {
        let mut report = good();
        report.proof.gate_waits = 0;
        report.judge();
        assert_eq!(report.status(), 2);
        let mut report = good();
        report.jobs[2] = job("stream", 0);
        report.judge();
        assert_eq!(report.verdict(), "inconclusive");
    }

    #[test]
    fn a_failure_outweighs_everything() {
        let mut report = good();
        report.failures.push("x".into());
        report.judge();
        assert_eq!(report.status(), 1);
    }
}
