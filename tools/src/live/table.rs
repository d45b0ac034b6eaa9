//! The live table: a line per disk, every second, with throughput, the job's progress, and waits at the gate. On a
//! terminal it is drawn over itself; elsewhere only events are printed.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{IsTerminal, Write as _},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use block_core::{BlockHandle, Environment};
use jobs::JobInfo;
use parking_lot::Mutex;

struct Row {
    handle: Weak<BlockHandle>,
    /// Operations, bytes, gate waits at the last look; they start anew when a job switches nodes.
    last: (u64, u64, u64),
    jobs: BTreeMap<String, String>,
}

/// What the user sees while it runs, on standard error.
pub struct Table {
    rows: Mutex<BTreeMap<String, Row>>,
    drawn: Mutex<usize>,
    terminal: bool,
    quiet: bool,
    stop: AtomicBool,
}

impl Table {
    /// A table; `quiet` shows nothing at all.
    pub fn new(quiet: bool) -> Arc<Self> {
        Arc::new(Self {
            rows: Mutex::default(),
            drawn: Mutex::new(0),
            terminal: std::io::stderr().is_terminal(),
            quiet,
            stop: AtomicBool::new(false),
        })
    }

    /// Draws once a second until [`Self::end`].
    pub fn start(self: &Arc<Self>, env: &Arc<dyn Environment>) {
        if self.quiet || !self.terminal {
            return;
        }
        let (table, timer) = (self.clone(), env.clone());
        env.spawn(Box::pin(async move {
            while !table.stop.load(Ordering::SeqCst) {
                timer.sleep(Duration::from_secs(1)).await;
                table.draw();
            }
        }));
    }

    /// No more drawing.
    pub fn end(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.rows.lock().clear();
    }

    /// A new disk.
    pub fn disk(&self, name: &str, handle: &Arc<BlockHandle>) {
        let row = Row {
            handle: Arc::downgrade(handle),
            last: (0, 0, 0),
            jobs: BTreeMap::new(),
        };
        self.rows.lock().insert(name.to_owned(), row);
    }

    /// A disk is gone.
    pub fn close(&self, name: &str) {
        self.rows.lock().remove(name);
    }

    /// How far a job is.
    pub fn job(&self, disk: &str, info: &JobInfo) {
        if let Some(row) = self.rows.lock().get_mut(disk) {
            let percent = if info.total_progress == 0 {
                100.0
            } else {
                info.current_progress as f64 * 100.0 / info.total_progress as f64
            };
            let text = format!("{} {} {percent:.0} %", info.kind, info.status);
            row.jobs.insert(info.id.clone(), text);
        }
    }

    /// Something worth a line of its own.
    pub fn event(&self, text: &str) {
        if self.quiet {
            return;
        }
        let mut drawn = self.drawn.lock();
        let mut out = std::io::stderr().lock();
        if *drawn > 0 {
            let _ = write!(out, "\x1b[{}A\x1b[J", *drawn);
            *drawn = 0;
        }
        let _ = writeln!(out, "{text}");
        drop(out);
        drop(drawn);
        for row in self.rows.lock().values_mut() {
            row.jobs
                .retain(|_, job| !text.contains(job.split(' ').next().unwrap_or_default()));
        }
    }

    fn draw(&self) {
        let mut text = String::new();
        let mut lines = 0;
        {
            let mut rows = self.rows.lock();
            if rows.is_empty() {
                return;
            }
            let _ = writeln!(
                text,
                "{:<6} {:>9} {:>10} {:>12}  jobs",
                "disk", "IOPS", "MiB/s", "gate waits"
            );
            lines += 1;
            for (name, row) in rows.iter_mut() {
                let Some(handle) = row.handle.upgrade() else {
                    continue;
                };
                let stats = handle.node().stats().snapshot();
                let now = (
                    stats.read_ops + stats.write_ops + stats.zero_ops + stats.discard_ops,
                    stats.read_bytes + stats.write_bytes,
                    stats.gate_waits,
                );
                let jobs: Vec<&str> = row.jobs.values().map(String::as_str).collect();
                let _ = writeln!(
                    text,
                    "{name:<6} {:>9} {:>10.1} {:>12}  {}",
                    now.0.saturating_sub(row.last.0),
                    now.1.saturating_sub(row.last.1) as f64 / (1 << 20) as f64,
                    now.2,
                    jobs.join(", ")
                );
                lines += 1;
                row.last = now;
            }
        }
        let mut drawn = self.drawn.lock();
        let mut out = std::io::stderr().lock();
        if *drawn > 0 {
            let _ = write!(out, "\x1b[{}A\x1b[J", *drawn);
        }
        let _ = write!(out, "{text}");
        *drawn = lines;
    }
}
