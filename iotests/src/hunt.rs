//! Measures the suite: one seeded bug after the other is switched on, and everything that can find it is run until
//! something does. A suite is worth its name only if it catches bugs.
//!
//! What is tried, in this order: every case on every format under two schedules, the cases about cancellation with one
//! request dropped at each await point, storms, and seeds of the simulator. Only the installed qemu tools are left out:
//! the bug has to be found by what is ours. Each bug is hunted in a process of its own, which says what it begins: when
//! that doesn't end within a limit, the bug hangs it, and is found as well. A hunt that goes on beginning new things may take
//! as long as it likes.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use block_core::mutant::{self, MUTANTS, Mutant};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::{
    cancel,
    case::{Case, FormatUnderTest, Group, Verdict, run},
    race::{StormConfig, storm},
    say::say,
    simulate::campaign::{Campaign, profile},
    suite::Suite,
};

/// Stands for no bug at all.
const NO_BUG: &str = "none";
/// Schedules that each case is run under.
const SCHEDULES: u64 = 2;
/// Seeds of the simulator for each format.
const SEEDS: u64 = 3000;
/// Before the name of what a hunting process begins, and before what it found.
const BEGINS: &str = "begins ";
const ENDS: &str = "ends ";

/// Runs everything against each seeded bug, and says what finds it and how fast
#[derive(Debug, Clone, clap::Args)]
pub struct Hunt {
    /// Only bugs whose name contains one of these
    filters: Vec<String>,
    /// Only every n-th bug: a sample for a machine that has little time
    #[arg(long, value_name = "N", default_value_t = 1)]
    every: usize,
    /// Don't run everything without a bug first: something else has shown that it passes
    #[arg(long)]
    skip_good: bool,
    /// Lists the bugs
    #[arg(long)]
    list: bool,
    /// Processes at once
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Seconds for one case or seed, after which it counts as a hang
    #[arg(long, default_value_t = 120)]
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
    /// Seconds of processor time until it was found, from the first case on; of a hang, seconds on the clock.
    pub after: f64,
    /// The same of the one run that found it.
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
        let chosen = |mutant: &&Mutant| {
            self.filters.is_empty() || self.filters.iter().any(|text| mutant.name.contains(text))
        };
        let wanted: Vec<&'static Mutant> = MUTANTS
            .iter()
            .filter(chosen)
            .step_by(self.every.max(1))
            .collect();
        if wanted.is_empty() {
            return Err(format!(
                "no seeded bug's name contains '{}'",
                self.filters.join("' or '")
            ));
        }
        if self.list {
            for mutant in wanted {
                let blind = if mutant.blind { "blind" } else { "" };
                say!("{:<46} {blind:<6} {}", mutant.name, mutant.what);
            }
            return Ok(0);
        }
        // What fails without a bug finds every bug.
        if !self.skip_good
            && let Some(found) = self.elsewhere(NO_BUG)
        {
            return Err(format!(
                "without any seeded bug, {} fails on {}: {}",
                found.by, found.format, found.saw
            ));
        }
        let rows = self.hunt_all(&wanted);
        let missed = rows.iter().filter(|row| row.found.is_none()).count();
        if self.json {
            let text = serde_json::to_string_pretty(&rows).map_err(|error| error.to_string())?;
            say!("{text}");
        } else {
            let blind = rows.iter().filter(|row| row.blind).count();
            say!(
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
        let program = std::env::current_exe().ok()?;
        let mut child = Command::new(program)
            .args(["mutants", "--one", name])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let out = child.stdout.take()?;
        let (tell, lines) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    break;
                }
            }
        });
        let began = Instant::now();
        let mut running = (String::new(), Instant::now());
        let mut found = None;
        let ended = loop {
            match lines.recv_timeout(Duration::from_secs(self.limit.max(1))) {
                Ok(line) => {
                    if let Some(what) = line.strip_prefix(BEGINS) {
                        running = (what.to_owned(), Instant::now());
                    } else if let Some(what) = line.strip_prefix(ENDS) {
                        found = serde_json::from_str::<Option<Found>>(what).ok();
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    let _ = child.kill();
                    break "doesn't end".to_owned();
                }
                Err(RecvTimeoutError::Disconnected) => {
                    break match child.wait() {
                        Ok(status) => format!("its process ended with {status}"),
                        Err(error) => error.to_string(),
                    };
                }
            }
        };
        let _ = child.wait();
        let _ = reader.join();
        found.unwrap_or_else(|| {
            let (what, since) = running;
            let (by, format) = what.rsplit_once(" on ").unwrap_or((&what, ""));
            Some(Found {
                by: by.to_owned(),
                format: format.to_owned(),
                after: began.elapsed().as_secs_f64(),
                took: since.elapsed().as_secs_f64(),
                saw: ended,
            })
        })
    }
}

/// Processor time of this process, in seconds: on a machine that others use too, the time that passes says little. Where the system
/// doesn't tell, the time that passes.
fn busy(began: Instant) -> f64 {
    let ticks = || {
        let text = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The second field is the program's name in parentheses; user and system time are the 14th and 15th.
        let (_, rest) = text.rsplit_once(") ")?;
        let mut fields = rest.split(' ').skip(11);
        let user: u64 = fields.next()?.parse().ok()?;
        let system: u64 = fields.next()?.parse().ok()?;
        Some(user + system)
    };
    // Linux counts in hundredths of a second for programs, whatever it counts in itself.
    ticks().map_or_else(
        || began.elapsed().as_secs_f64(),
        |ticks| ticks as f64 / 100.0,
    )
}

/// Tells the parent process what begins.
fn begins(what: &str, format: &FormatUnderTest) {
    let mut out = std::io::stdout().lock();
    // Nobody is left to be told when the parent has gone.
    let _ = writeln!(out, "{BEGINS}{what} on {}", format.label());
    let _ = out.flush();
}

fn print_row(row: &Row) {
    match &row.found {
        Some(found) => say!(
            "{:<46} {:>7.2} s  {} [{}]",
            row.mutant,
            found.after,
            found.by,
            found.format
        ),
        None => say!("{:<46}  MISSED    {}", row.mutant, row.what),
    }
}

fn one(suite: &Suite, name: &str) -> Result<u8, String> {
    if name != NO_BUG && !mutant::select(Some(name)) {
        return Err(format!("there is no seeded bug '{name}'"));
    }
    let found = hunt(suite)?;
    let text = serde_json::to_string(&found).map_err(|error| error.to_string())?;
    say!("{ENDS}{text}");
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
    let found = |by: &str, format: &FormatUnderTest, saw: &str, run: f64| {
        let now = busy(began);
        Found {
            by: by.to_owned(),
            format: format.label(),
            after: now,
            took: now - run,
            saw: line(saw),
        }
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
                let by = format!("{} (schedule {seed})", case.name);
                begins(&by, format);
                let now = busy(began);
                if let Verdict::Failed(saw) = run(registry, format, case, seed, None).verdict {
                    return Ok(Some(found(&by, format, &saw, now)));
                }
            }
        }
    }
    for format in &formats {
        for seed in 1..5 {
            let by = format!("storm (seed {seed})");
            begins(&by, format);
            let now = busy(began);
            let mut config = StormConfig::new(seed, 16);
            config.commands = 2000;
            config.drop_percent = 10;
            config.power_cuts = 3;
            let report = storm(registry, format, &config);
            if !report.is_clean() {
                return Ok(Some(found(&by, format, &report.summary(), now)));
            }
        }
    }
    for case in suite
        .cases()
        .iter()
        .filter(|case| case.group == Group::Cancel)
    {
        for format in &formats {
            begins(&case.name, format);
            let now = busy(began);
            if let Verdict::Failed(saw) = cancel::sweep(registry, format, case, 0).verdict() {
                return Ok(Some(found(&case.name, format, &saw, now)));
            }
        }
    }
    for format in &formats {
        let now = busy(began);
        let profile = profile(registry, &format.name, &format.create)?;
        let campaign = Campaign {
            seeds: 0..SEEDS,
            threads: 1,
            gate: true,
            books: true,
            max_failures: 1,
        };
        begins("simulate --seeds 0", format);
        let totals = campaign.run(registry, &profile, |seed, _| {
            begins(&format!("simulate --seeds {}", seed + 1), format);
        });
        if let Some((seed, failure)) = totals.failures.first() {
            let by = format!("simulate --seeds {seed}");
            return Ok(Some(found(&by, format, &failure.text, now)));
        }
    }
    Ok(None)
}
