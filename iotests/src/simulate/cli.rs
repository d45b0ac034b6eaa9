//! The commands `simulate`, `minimise` and `replay`: they print, and decide the exit status. The statuses are those of the
//! program: 0 passed, 1 failed, 2 inconclusive, 3 wrong usage.

use std::{ops::Range, path::PathBuf};

use block_core::{Options, Registry};

use super::{
    campaign::{Campaign, Totals, profile},
    generate::{Profile, generate},
    meter::Meter,
    minimise::{Saved, minimise},
    run::{How, Outcome, run},
    scenario::Scenario,
    timeline,
};
use crate::{case::Verdict, say::say};

/// Which world.
#[derive(Debug, Clone, clap::Args)]
pub struct Worlds {
    /// The format
    #[arg(long, short = 'f', default_value = "qcow2")]
    pub format: String,
    /// Options of image creation that all scenarios get
    #[arg(short = 'o', default_value = "")]
    pub options: String,
    /// Without the gate of the request path: images are meant to be corrupted
    #[arg(long)]
    pub no_gate: bool,
    /// Without the driver's own safeguards
    #[arg(long)]
    pub no_safeguards: bool,
    /// Don't look at what must hold at every step: content and checks have to show what goes wrong
    #[arg(long)]
    pub no_invariants: bool,
}

/// Runs seeds: each decides image options, guests, jobs, faults, power cuts and the schedule
#[derive(Debug, Clone, clap::Args)]
pub struct Simulate {
    #[command(flatten)]
    worlds: Worlds,
    /// Seeds: one or A..B
    #[arg(long, default_value = "0..1000")]
    seeds: String,
    /// Threads
    #[arg(long, short = 'j', default_value_t = 1)]
    jobs: usize,
    /// Stop after so many failures
    #[arg(long, default_value_t = 1)]
    max_failures: usize,
    /// JSON instead of text
    #[arg(long)]
    json: bool,
    /// Tell on standard error how far it is, also where that is no terminal
    #[arg(long, short = 'p')]
    progress: bool,
}

/// Makes a failing seed small, prints what happens, and writes it to a file
#[derive(Debug, Clone, clap::Args)]
pub struct Minimise {
    #[command(flatten)]
    worlds: Worlds,
    /// The seed
    #[arg(long, required_unless_present = "file")]
    seed: Option<u64>,
    /// Or a file that this command or a person has written
    #[arg(long, conflicts_with = "seed")]
    file: Option<PathBuf>,
    /// Where it is written
    #[arg(long, default_value = "failure.json")]
    save: PathBuf,
    /// The most runs that it may take
    #[arg(long, default_value_t = 10_000)]
    runs: u64,
}

/// Runs a saved failure, a seed, or a trace (`blk --trace FILE`) again, and prints what happens
#[derive(Debug, Clone, clap::Args)]
pub struct Replay {
    #[command(flatten)]
    worlds: Worlds,
    /// The file
    #[arg(required_unless_present = "seed")]
    file: Option<PathBuf>,
    /// Or a seed
    #[arg(long, conflicts_with = "file")]
    seed: Option<u64>,
    /// The most events that are printed, the last ones
    #[arg(long, default_value_t = 200)]
    events: usize,
    /// Print the scenario as JSON, too
    #[arg(long)]
    scenario: bool,
    #[command(flatten)]
    trace: crate::trace::cli::Options,
}

impl Worlds {
    /// The registry with or without safeguards.
    fn registry<'a>(
        &self,
        registry: &'a Registry,
        bare: Option<&'a Registry>,
    ) -> Result<&'a Registry, String> {
        choose(registry, bare, !self.no_safeguards)
    }

    fn create(&self) -> Result<Options, String> {
        if self.options.is_empty() {
            Ok(Options::new())
        } else {
            Options::from_dotted(&self.options).map_err(|error| error.to_string())
        }
    }

    fn profile(&self, registry: &Registry) -> Result<Profile, String> {
        let create = self.create()?;
        profile(registry, &self.format, &create)
    }

    fn how(&self, seed: u64) -> How {
        let mut how = How::seed(seed).without_gate(self.no_gate);
        how.books = !self.no_invariants;
        how
    }

    fn again(&self) -> String {
        let mut text = format!("-f {}", self.format);
        if !self.options.is_empty() {
            text.push_str(&format!(" -o {}", self.options));
        }
        if self.no_gate {
            text.push_str(" --no-gate");
        }
        if self.no_safeguards {
            text.push_str(" --no-safeguards");
        }
        if self.no_invariants {
            text.push_str(" --no-invariants");
        }
        text
    }
}

fn choose<'a>(
    registry: &'a Registry,
    bare: Option<&'a Registry>,
    safeguards: bool,
) -> Result<&'a Registry, String> {
    if safeguards {
        return Ok(registry);
    }
    bare.ok_or_else(|| "this program can't take a driver's safeguards away".to_owned())
}

fn parse_seeds(text: &str) -> Result<Range<u64>, String> {
    let number = |text: &str| {
        text.parse::<u64>()
            .map_err(|_| format!("--seeds: '{text}' is no number"))
    };
    match text.split_once("..") {
        Some((from, to)) => Ok(number(from)?..number(to)?),
        None => {
            let seed = number(text)?;
            Ok(seed..seed.checked_add(1).ok_or("--seeds: too large")?)
        }
    }
}

fn load(file: &PathBuf) -> Result<Saved, String> {
    let text =
        std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    serde_json::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))
}

impl Simulate {
    /// Runs the command; gives the exit status.
    ///
    /// # Errors
    /// Wrong usage, in words.
    pub fn run(&self, registry: &Registry, bare: Option<&Registry>) -> Result<u8, String> {
        let registry = self.worlds.registry(registry, bare)?;
        let profile = self.worlds.profile(registry)?;
        let seeds = parse_seeds(&self.seeds)?;
        let campaign = Campaign {
            seeds: seeds.clone(),
            threads: self.jobs,
            gate: !self.worlds.no_gate,
            books: !self.worlds.no_invariants,
            max_failures: self.max_failures.max(1),
        };
        let asked = seeds.end.saturating_sub(seeds.start);
        let meter = Meter::new(asked, self.progress);
        let totals = campaign.run(registry, &profile, |seed, outcome| {
            meter.step(outcome.failure.is_some());
            if let Some(failure) = &outcome.failure
                && !self.json
            {
                meter.clear();
                say!("seed {seed}: FAILED {failure}");
                say!(
                    "    again: iotests replay {} --seed {seed}; smaller: iotests minimise {} --seed {seed}",
                    self.worlds.again(),
                    self.worlds.again()
                );
            }
        });
        meter.finish();
        let verdict = totals.verdict(&profile, asked);
        if self.json {
            let text = serde_json::to_string_pretty(&totals).map_err(|error| error.to_string())?;
            say!("{text}");
        } else {
            print_totals(&totals);
            say!("{} {}", verdict.word(), verdict.detail());
        }
        Ok(match verdict {
            Verdict::Failed(_) => 1,
            Verdict::Inconclusive(_) => 2,
            Verdict::Passed | Verdict::NotCovered(_) => 0,
        })
    }
}

fn print_totals(totals: &Totals) {
    say!(
        "{} seeds in {:.1} s; {:.0} seeds per hour on one core; {:.0} requests and {:.0} polls each; hash {:016x}",
        totals.seeds,
        totals.elapsed,
        totals.rate(),
        totals.counter("requests") as f64 / totals.seeds.max(1) as f64,
        totals.polls as f64 / totals.seeds.max(1) as f64,
        totals.hash
    );
    for (name, value) in &totals.counters {
        say!("{value:>14} {name}");
    }
}

fn report(outcome: &Outcome, events: usize) -> u8 {
    say!("{}", timeline::print(&outcome.events, events).trim_end());
    match &outcome.failure {
        Some(failure) => {
            say!("FAILED {failure}");
            1
        }
        None => {
            say!("passed; hash {:016x}", outcome.hash);
            0
        }
    }
}

fn describe(scenario: &Scenario) {
    say!(
        "{} requests of {} queues, {} jobs, {} layers of {} bytes",
        scenario.requests(),
        scenario
            .phases
            .iter()
            .map(|phase| phase.queues.len())
            .sum::<usize>(),
        scenario
            .phases
            .iter()
            .map(|phase| phase.jobs.len())
            .sum::<usize>(),
        scenario.layers.len(),
        scenario.layers.last().map_or(0, |layer| layer.size)
    );
}

impl Minimise {
    /// Runs the command; gives the exit status.
    ///
    /// # Errors
    /// Wrong usage, in words.
    pub fn run(&self, registry: &Registry, bare: Option<&Registry>) -> Result<u8, String> {
        let (scenario, how, safeguards) = match (&self.file, self.seed) {
            (Some(file), _) => {
                let saved = load(file)?;
                let how = saved.how();
                (saved.scenario, how, saved.safeguards)
            }
            (None, Some(seed)) => {
                let profile = self.worlds.profile(self.worlds.registry(registry, bare)?)?;
                let how = self.worlds.how(seed);
                (generate(&profile, seed), how, !self.worlds.no_safeguards)
            }
            (None, None) => return Err("a seed or a file is needed".to_owned()),
        };
        let registry = choose(registry, bare, safeguards)?;
        describe(&scenario);
        let Some(saved) = minimise(registry, &scenario, &how, safeguards, self.runs) else {
            say!("it passes");
            return Ok(0);
        };
        let text = serde_json::to_string_pretty(&saved).map_err(|error| error.to_string())?;
        std::fs::write(&self.save, text + "\n")
            .map_err(|error| format!("{}: {error}", self.save.display()))?;
        let status = report(&saved.replay(registry, true), usize::MAX);
        describe(&saved.scenario);
        say!("again: iotests replay {}", self.save.display());
        Ok(status)
    }
}

impl Replay {
    /// Runs the command; gives the exit status.
    ///
    /// # Errors
    /// Wrong usage, in words.
    pub fn run(&self, registry: &Registry, bare: Option<&Registry>) -> Result<u8, String> {
        let outcome;
        let scenario;
        if let Some(file) = &self.file {
            if crate::trace::cli::is_trace(file)? {
                let registry = self.worlds.registry(registry, bare)?;
                let create = self.worlds.create()?;
                return self.trace.run(registry, file, create, !self.worlds.no_gate);
            }
            let saved = load(file)?;
            let registry = choose(registry, bare, saved.safeguards)?;
            outcome = saved.replay(registry, true);
            scenario = saved.scenario;
        } else {
            let seed = self.seed.ok_or("a seed or a file is needed")?;
            let registry = self.worlds.registry(registry, bare)?;
            scenario = generate(&self.worlds.profile(registry)?, seed);
            let how = self.worlds.how(seed).with_timeline();
            outcome = run(registry, &scenario, &how);
        }
        if self.scenario {
            let text =
                serde_json::to_string_pretty(&scenario).map_err(|error| error.to_string())?;
            say!("{text}");
        }
        Ok(report(&outcome, self.events))
    }
}
