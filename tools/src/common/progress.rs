//! Progress of a long command: `    (12.34/100%)` and a carriage return on standard output for `-p`, one line on
//! standard error when SIGUSR1 comes.

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::output::write_err;

/// How far a command is. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Meter(Arc<State>);

#[derive(Debug)]
struct State {
    visible: bool,
    /// Least percentage between two prints.
    step: f64,
    done: AtomicU64,
    total: AtomicU64,
    printed: Mutex<f64>,
}

impl Meter {
    /// At 0 of 0. It prints when `visible`, no more often than every `step` per cent.
    pub fn new(visible: bool, step: f64) -> Self {
        let meter = Self(Arc::new(State {
            visible,
            step,
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            printed: Mutex::new(0.0),
        }));
        meter.print(0.0);
        meter
    }

    /// How much there is to do, in bytes.
    pub fn set_total(&self, total: u64) {
        self.0.total.store(total, Ordering::Relaxed);
    }

    /// Some of it is done.
    pub fn advance(&self, bytes: u64) {
        self.0.done.fetch_add(bytes, Ordering::Relaxed);
        self.update();
    }

    /// This much of that much is done, in bytes.
    pub fn set(&self, done: u64, total: u64) {
        self.0.done.store(done, Ordering::Relaxed);
        self.set_total(total);
        self.update();
    }

    fn update(&self) {
        if !self.0.visible {
            return;
        }
        let now = self.percent();
        let mut printed = self.0.printed.lock();
        if now - *printed >= self.0.step {
            *printed = now;
            self.print(now);
        }
    }

    fn percent(&self) -> f64 {
        let total = self.0.total.load(Ordering::Relaxed);
        if total == 0 {
            return 0.0;
        }
        (self.0.done.load(Ordering::Relaxed) as f64 * 100.0 / total as f64).min(100.0)
    }

    fn print(&self, percent: f64) {
        if self.0.visible {
            let mut out = std::io::stdout().lock();
            let _ = write!(out, "    ({percent:.2}/100%)\r");
            let _ = out.flush();
        }
    }

    /// One line on standard error.
    pub fn tell(&self) {
        write_err(format_args!("    ({:.2}/100%)\n", self.percent()));
    }

    /// All is done: prints 100 per cent and ends the line.
    pub fn finish(&self) {
        self.print(100.0);
        self.end_line();
    }

    /// Ends the line.
    pub fn end_line(&self) {
        if self.0.visible {
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(b"\n");
            let _ = out.flush();
        }
    }
}
