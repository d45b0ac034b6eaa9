//! Measures the suite: one seeded bug after the other is switched on, and everything that can find it is run until
//! something does. A suite is worth its name only if it catches bugs.
//!
//! What is tried, in this order: every case on every format under two schedules, the cases about cancellation with one
//! request dropped at each await point, storms, and seeds of the simulator. Only the installed qemu tools are left out:
//! the bug has to be found by what is ours. Each bug is hunted in a process of its own with a limit on its time: a bug that
//! hangs the suite is found as well.

use std::{
    process::{Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use block_core::mutant::{self, MUTANTS, Mutant};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    cancel,
    case::{Case, FormatUnderTest, Group, Verdict, run},
    race::{StormConfig, storm},
    simulate::campaign::{Campaign, profile},
    suite::Suite,
};

/// Stands for no bug at all.
const NO_BUG: &str = "none";
/// Schedules that each case is run under.
const SCHEDULES: u64 = 2;
/// Seeds of the simulator for each format.
const SEEDS: u64 = 3000;

/// Runs everything against each seeded bug, and says what finds it and how fast
#[derive(Debug, Clone, clap::Args)]
pub struct Hunt {
    /// Only bugs whose name contains this
    filter: Option<String>,
    /// Lists the bugs
    #[arg(long)]
    list: bool,
    /// Processes at once
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Seconds for one bug, after which it counts as a hang
    #[arg(long, default_value_t = 300)]
    limit: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Hunts one bug in this process and prints what found it, as JSON
    #[arg(long, hide = true)]
    one: Option<String>,
}

/// What found a bug.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Found {
    /// The case, storm or seed.
    pub by: String,
    /// The format with its options.
    pub format: String,
    /// Seconds until it was found, from the first case on.
    pub after: f64,
    /// Seconds of the one run that found it.
    pub took: f64,
    /// What was seen, in a line.
    pub saw: String,
}

/// A bug and what became of the hunt.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Row {
    /// Its name.
    pub mutant: &'static str,
    /// What it does.
    pub what: &'static str,
    /// Chosen without a look at the tests.
    pub blind: bool,
    /// What found it.
    pub found: Option<Found>,
}

impl Hunt {
    /// Runs the command; gives the exit status: 0 when every bug was found, 1 when one wasn't.
    ///
    /// # Errors
    /// Wrong usage, in words.
    pub fn run(&self, suite: &Suite) -> Result<u8, String> {
        if let Some(name) = &self.one {
            return one(suite, name);
        }
        let filter = self.filter.as_deref().unwrap_or_default();
        let wanted: Vec<&'static Mutant> = MUTANTS
            .iter()
            .filter(|mutant| mutant.name.contains(filter))
            .collect();
        if wanted.is_empty() {
            return Err(format!("no seeded bug's name contains '{filter}'"));
        }
        if self.list {
            for mutant in wanted {
                println!("{:<48} {}", mutant.name, mutant.what);
            }
            return Ok(0);
        }
        // What fails without a bug finds every bug.
        if let Some(found) = self.elsewhere(NO_BUG) {
            return Err(format!(
                "without any seeded bug, {} fails on {}: {}",
                found.by, found.format, found.saw
            ));
        }
        let rows = self.hunt_all(&wanted);
        let missed = rows.iter().filter(|row| row.found.is_none()).count();
        if self.json {
            let text = serde_json::to_string_pretty(&rows).map_err(|error| error.to_string())?;
            println!("{text}");
        } else {
            let blind = rows.iter().filter(|row| row.blind).count();
            println!(
                "\n{} seeded bugs ({blind} chosen blind), {} found, {missed} missed",
                rows.len(),
                rows.len() - missed
            );
        }
        Ok(u8::from(missed > 0))
    }

    fn hunt_all(&self, wanted: &[&'static Mutant]) -> Vec<Row> {
        let next = AtomicUsize::new(0);
        let rows: Mutex<Vec<(usize, Row)>> = Mutex::default();
        std::thread::scope(|scope| {
            for _ in 0..self.jobs.max(1) {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::SeqCst);
                        let Some(mutant) = wanted.get(at) else { break };
                        let row = Row {
                            mutant: mutant.name,
                            what: mutant.what,
                            blind: mutant.blind,
                            found: self.elsewhere(mutant.name),
                        };
                        if !self.json {
                            print_row(&row);
                        }
                        rows.lock().push((at, row));
                    }
                });
            }
        });
        let mut rows = rows.into_inner();
        rows.sort_by_key(|(at, _)| *at);
        rows.into_iter().map(|(_, row)| row).collect()
    }

    /// Hunts in another process.
    fn elsewhere(&self, name: &str) -> Option<Found> {
        let hang = |what: &str, after: f64| {
            Some(Found {
                by: what.to_owned(),
                format: String::new(),
                after,
                took: after,
                saw: format!("the suite's process: {what}"),
            })
        };
        let program = std::env::current_exe().ok()?;
        let began = Instant::now();
        let mut child = Command::new(program)
            .args(["mutants", "--one", name])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        loop {
            match child.try_wait() {
                Ok(Some(status)) => {
                    let mut text = String::new();
                    if let Some(mut out) = child.stdout.take() {
                        let _ = std::io::Read::read_to_string(&mut out, &mut text);
                    }
                    return match serde_json::from_str::<Option<Found>>(text.trim()) {
                        Ok(found) => found,
                        Err(_) => hang(
                            &format!("ended with {status}"),
                            began.elapsed().as_secs_f64(),
                        ),
                    };
                }
                Ok(None) if began.elapsed().as_secs() >= self.limit => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return hang("hangs", began.elapsed().as_secs_f64());
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(20)),
                Err(_) => return None,
            }
        }
    }
}

fn print_row(row: &Row) {
    match &row.found {
        Some(found) => println!(
            "{:<46} {:>7.2} s  {} [{}]",
            row.mutant, found.after, found.by, found.format
        ),
        None => println!("{:<46}  MISSED    {}", row.mutant, row.what),
    }
}

fn one(suite: &Suite, name: &str) -> Result<u8, String> {
    if name != NO_BUG && !mutant::select(Some(name)) {
        return Err(format!("there is no seeded bug '{name}'"));
    }
    let found = hunt(suite)?;
    let text = serde_json::to_string(&found).map_err(|error| error.to_string())?;
    println!("{text}");
    Ok(0)
}

/// The first line of what was seen, not too long.
fn line(text: &str) -> String {
    text.lines()
        .next()
        .unwrap_or_default()
        .chars()
        .take(200)
        .collect()
}

/// Tries everything, in this process, until something fails.
///
/// # Errors
/// When a format can't be made.
pub fn hunt(suite: &Suite) -> Result<Option<Found>, String> {
    let began = Instant::now();
    let found = |by: String, format: &FormatUnderTest, saw: &str, run: Instant| Found {
        by,
        format: format.label(),
        after: began.elapsed().as_secs_f64(),
        took: run.elapsed().as_secs_f64(),
        saw: line(saw),
    };
    let mut formats = Vec::new();
    for name in suite.format_names() {
        formats.push(suite.format(name, "")?);
    }
    let registry = suite.registry();
    let plain: Vec<&Case> = suite
        .cases()
        .iter()
        .filter(|case| case.group != Group::Cancel && case.group != Group::Interop)
        .collect();
    for seed in 0..SCHEDULES {
        for case in &plain {
            for format in &formats {
                let now = Instant::now();
                if let Verdict::Failed(saw) = run(registry, format, case, seed, None).verdict {
                    let by = format!("{} (schedule {seed})", case.name);
                    return Ok(Some(found(by, format, &saw, now)));
                }
            }
        }
    }
    for format in &formats {
        for seed in 1..5 {
            let now = Instant::now();
            let mut config = StormConfig::new(seed, 16);
            config.commands = 2000;
            config.drop_percent = 10;
            config.power_cuts = 3;
            let report = storm(registry, format, &config);
            if !report.is_clean() {
                let by = format!("storm (seed {seed})");
                return Ok(Some(found(by, format, &report.summary(), now)));
            }
        }
    }
    for case in suite
        .cases()
        .iter()
        .filter(|case| case.group == Group::Cancel)
    {
        for format in &formats {
            let now = Instant::now();
            if let Verdict::Failed(saw) = cancel::sweep(registry, format, case, 0).verdict() {
                return Ok(Some(found(case.name.clone(), format, &saw, now)));
            }
        }
    }
    for format in &formats {
        let now = Instant::now();
        let profile = profile(registry, &format.name, &format.create)?;
        let campaign = Campaign {
            seeds: 0..SEEDS,
            threads: 1,
            gate: true,
            books: true,
            max_failures: 1,
        };
        let totals = campaign.run(registry, &profile, |_, _| ());
        if let Some((seed, failure)) = totals.failures.first() {
            let by = format!("simulate --seeds {seed}");
            return Ok(Some(found(by, format, &failure.text, now)));
        }
    }
    Ok(None)
}
