//! What `iotests replay` does with a trace: it reads the file, runs it under as many schedules as asked for, and prints what
//! came of it.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use block_core::Registry;

use super::{
    format::{Event, Trace, is_trace as has_magic},
    replay::{Replay, replay},
};
use crate::{cli::parse_seeds, external, say::say};

/// What can be asked about a trace.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Options {
    /// A trace: which of its nodes (by default the one with most requests)
    #[arg(long)]
    node: Option<String>,
    /// A trace: the image as it was when the trace began
    #[arg(long)]
    image: Option<PathBuf>,
    /// A trace: schedules to run it under, one or A..B; 0 keeps to the order of the trace [default: 0..20]
    #[arg(long)]
    schedules: Option<String>,
    /// A trace: print its records and run nothing
    #[arg(long)]
    print: bool,
}

/// Whether the file is a trace, by its first bytes.
///
/// # Errors
/// It can't be read.
pub fn is_trace(path: &Path) -> Result<bool, String> {
    let failed = |error| format!("{}: {error}", path.display());
    let mut start = Vec::new();
    File::open(path)
        .map_err(failed)?
        .take(16)
        .read_to_end(&mut start)
        .map_err(failed)?;
    Ok(has_magic(&start))
}

impl Options {
    /// Runs the trace in `path`; gives the exit status.
    ///
    /// # Errors
    /// Wrong usage, a file that is no trace, a trace that can't be run, in words.
    pub fn run(
        &self,
        registry: &Registry,
        path: &Path,
        create: block_core::Options,
        gate: bool,
    ) -> Result<u8, String> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let trace =
            Trace::decode(&read(path)?).map_err(|error| format!("{}: {error}", path.display()))?;
        if self.print {
            print(&trace);
            return Ok(0);
        }
        let schedules = parse_seeds(self.schedules.as_deref().unwrap_or("0..20"))?;
        let image = self.image.as_deref().map(read).transpose()?;
        let mut worst = 0;
        for seed in schedules {
            let how = Replay {
                node: self.node.clone(),
                format: None,
                create: create.clone(),
                image: image.clone(),
                seed,
                gate,
                ask_qemu: external::version().is_some(),
            };
            let done = replay(registry, &trace, &how)?;
            let verdict = if done.wrong.is_empty() {
                "passed"
            } else {
                "FAILED"
            };
            say!(
                "schedule {seed}: {verdict}: {} requests of {} producers, {} waits at the gate, {} failed that had not",
                done.requests,
                done.producers,
                done.gate_waits,
                done.failed
            );
            if let Some(first) = &done.first_failure {
                say!("  the first that failed: {first}");
            }
            for wrong in done.wrong.iter().take(8) {
                say!("  {wrong}");
            }
            if !done.wrong.is_empty() {
                worst = 1;
            }
        }
        if trace.cut_off > 0 {
            say!(
                "the trace ends in the middle of a record ({} bytes)",
                trace.cut_off
            );
        }
        Ok(worst)
    }
}

fn print(trace: &Trace) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    for record in &trace.records {
        let (node, ticket) = (record.node, record.ticket);
        let at = record.at as f64 / 1e6;
        let line = match &record.event {
            Event::Node(info) => format!(
                "node {node}: '{}' ({}, {} bytes, clusters of {})",
                info.name, info.driver, info.length, info.cluster_size
            ),
            Event::Arrived {
                kind,
                flags,
                waits,
                offset,
                len,
                producer,
                hash,
            } => {
                let waits = if *waits { ", waits at the gate" } else { "" };
                let hash = hash.map_or(String::new(), |hash| format!(", data {hash:016x}"));
                format!(
                    "#{ticket} {kind:?} at {offset:#x}+{len:#x} of producer {producer}, flags {:#x}{hash}{waits}",
                    flags.bits()
                )
            }
            Event::Admitted => format!("#{ticket} is let in"),
            Event::Ended { ok: true } => format!("#{ticket} ends"),
            Event::Ended { ok: false } => format!("#{ticket} fails"),
        };
        // Whoever reads this may stop at any time, as with `| head`.
        if writeln!(out, "{at:12.6} ms  {line}").is_err() {
            return;
        }
    }
}
