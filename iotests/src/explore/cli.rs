//! The command `explore`: it chooses scenarios and formats, prints, and decides the exit status. 0: all schedules up to the
//! bound are clean; 1: one fails; 2: a budget ran out, or what a scenario is about never happened.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    catalogue,
    scenario::Small,
    search::{Limits, Report, explore},
    world::{Prepared, Start},
};
use crate::{case::FormatUnderTest, memdriver, say::say, simulate::timeline, suite::Suite};

/// The most events that a replay prints.
const EVENTS: usize = 400;

/// Runs every schedule of small scenarios, up to so many deviations from the usual one
#[derive(Debug, Clone, clap::Args)]
pub struct Explore {
    /// Formats, separated by commas, or `all`
    #[arg(long, short = 'f', default_value = "all")]
    format: String,
    /// Options of image creation; by default 4 KiB clusters where there is a choice
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Option<String>,
    /// Only scenarios whose name contains this; `=NAME` is one
    #[arg(long, short = 's', value_name = "TEXT")]
    scenario: Vec<String>,
    /// The most deviations
    #[arg(long, short = 'k', default_value_t = 2)]
    bound: usize,
    /// The most executions of one scenario
    #[arg(long, default_value_t = u64::MAX, hide_default_value = true)]
    executions: u64,
    /// The most seconds of one scenario
    #[arg(long)]
    seconds: Option<u64>,
    /// Threads
    #[arg(long, short = 'j', default_value_t = 1)]
    jobs: usize,
    /// Without the gate of the request path: images are meant to be corrupted
    #[arg(long)]
    no_gate: bool,
    /// Without the driver's own safeguards
    #[arg(long)]
    no_safeguards: bool,
    /// Run this schedule of one scenario, choices separated by commas, and print what happens
    #[arg(long, value_name = "CHOICES", value_delimiter = ',', num_args = 0..)]
    schedule: Option<Vec<u32>>,
    /// JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Print the names of the scenarios and what their guests do
    #[arg(long)]
    list: bool,
}

fn quoted(text: &str) -> String {
    if text.contains([' ', '=', '*', '$', '\'']) {
        format!("'{}'", text.replace('\'', "'\\''"))
    } else {
        text.to_owned()
    }
}

impl Explore {
    fn scenarios(&self) -> Result<Vec<Small>, String> {
        let mut all = catalogue();
        all.retain(|scenario| {
            self.scenario.is_empty()
                || self
                    .scenario
                    .iter()
                    .any(|text| match text.strip_prefix('=') {
                        Some(name) => scenario.name == name,
                        None => scenario.name.contains(text.as_str()),
                    })
        });
        if all.is_empty() {
            return Err("no scenario is chosen (--list prints them)".to_owned());
        }
        Ok(all)
    }

    fn formats(&self, suite: &Suite) -> Result<Vec<FormatUnderTest>, String> {
        let names: Vec<&str> = if self.format == "all" {
            let mut names = suite.format_names();
            if !names.contains(&memdriver::NAME) {
                names.push(memdriver::NAME);
            }
            names
        } else {
            self.format.split(',').collect()
        };
        let small = |name: &str| {
            let factory = suite.registry().get(name);
            let sized = factory.is_ok_and(|factory| {
                let mut options = factory.create_options().iter();
                options.any(|option| option.name == "cluster_size")
            });
            if sized { "cluster_size=4k" } else { "" }
        };
        names
            .into_iter()
            .map(|name| suite.format(name, self.options.as_deref().unwrap_or(small(name))))
            .collect()
    }

    /// Runs the command; gives the exit status.
    ///
    /// # Errors
    /// Wrong usage, in words.
    pub fn run(&self, suite: &Suite) -> Result<u8, String> {
        let scenarios = self.scenarios()?;
        if self.list {
            list(&scenarios);
            return Ok(0);
        }
        let formats = self.formats(suite)?;
        if let Some(schedule) = &self.schedule {
            let ([scenario], [format]) = (scenarios.as_slice(), formats.as_slice()) else {
                return Err(
                    "--schedule is for one scenario (--scenario =NAME) on one format".to_owned(),
                );
            };
            return self.replay(suite, scenario, format, schedule);
        }
        let began = Instant::now();
        let reports = self.explore_all(suite, &scenarios, &formats)?;
        if self.json {
            let text = serde_json::to_string_pretty(&reports).map_err(|error| error.to_string())?;
            say!("{text}");
        } else {
            let total: u64 = reports.iter().map(|report| report.executions).sum();
            let count = |verdict| reports.iter().filter(|r| r.verdict == verdict).count();
            say!(
                "{total} executions in {:.1} s; {} passed, {} failed, {} inconclusive, {} not covered",
                began.elapsed().as_secs_f64(),
                count("passed"),
                count("failed"),
                count("inconclusive"),
                count("not-covered")
            );
        }
        let any = |verdict| reports.iter().any(|report| report.verdict == verdict);
        Ok(match (any("failed"), any("inconclusive"), any("passed")) {
            (true, ..) => 1,
            (false, true, _) | (false, false, false) => 2,
            (false, false, true) => 0,
        })
    }

    fn registry<'a>(&self, suite: &'a Suite) -> Result<&'a block_core::Registry, String> {
        if !self.no_safeguards {
            return Ok(suite.registry());
        }
        let bare = suite.bare();
        bare.ok_or_else(|| "this program can't take a driver's safeguards away".to_owned())
    }

    fn explore_all(
        &self,
        suite: &Suite,
        scenarios: &[Small],
        formats: &[FormatUnderTest],
    ) -> Result<Vec<Report>, String> {
        let registry = self.registry(suite)?;
        let limits = Limits {
            bound: self.bound,
            executions: self.executions,
            time: self.seconds.map(Duration::from_secs),
        };
        let pairs: Vec<(&FormatUnderTest, &Small)> = formats
            .iter()
            .flat_map(|format| scenarios.iter().map(move |scenario| (format, scenario)))
            .collect();
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..self.jobs.clamp(1, pairs.len().max(1)) {
                scope.spawn(|| {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some((format, scenario)) = pairs.get(at) else {
                            return;
                        };
                        let result = explore(registry, format, scenario, !self.no_gate, limits);
                        let mut results = results.lock();
                        if let (Ok(report), false) = (&result, self.json) {
                            self.print(suite, report, format);
                        }
                        results.push((at, result));
                    }
                });
            }
        });
        let mut results = results.into_inner();
        results.sort_by_key(|(at, _)| *at);
        results.into_iter().map(|(_, result)| result).collect()
    }

    fn print(&self, suite: &Suite, report: &Report, format: &FormatUnderTest) {
        let bound = match report.bound {
            None => "-".to_owned(),
            Some(bound) if report.complete => format!("{bound} (all)"),
            Some(bound) => bound.to_string(),
        };
        say!(
            "{:<34} {:<24} {:<12} {:>7} run {:>6} distinct {:>3} deep, bound {bound} {}",
            report.scenario,
            report.format,
            report.verdict,
            report.executions,
            report.distinct,
            report.deepest,
            report.detail
        );
        if let Some(found) = &report.found {
            let choices: Vec<String> = found.schedule.iter().map(u32::to_string).collect();
            say!("    again: {}", self.again(suite, format, report, &choices));
        }
    }

    fn again(
        &self,
        suite: &Suite,
        format: &FormatUnderTest,
        report: &Report,
        choices: &[String],
    ) -> String {
        let mut text = format!("{} explore --format {}", suite.command(), format.name);
        if !format.create.0.is_empty() {
            text.push_str(&format!(" -o {}", quoted(&format.create_text())));
        }
        for (set, option) in [
            (self.no_gate, " --no-gate"),
            (self.no_safeguards, " --no-safeguards"),
        ] {
            if set {
                text.push_str(option);
            }
        }
        let name = quoted(&format!("={}", report.scenario));
        text.push_str(&format!(
            " --scenario {name} --schedule {}",
            choices.join(",")
        ));
        text
    }

    fn replay(
        &self,
        suite: &Suite,
        scenario: &Small,
        format: &FormatUnderTest,
        schedule: &[u32],
    ) -> Result<u8, String> {
        let registry = self.registry(suite)?;
        let prepared = match Prepared::make(registry, format, scenario, !self.no_gate)? {
            Start::Ready(prepared) => Arc::new(*prepared),
            Start::NotCovered(why) => return Err(why),
        };
        let execution = prepared.execute(schedule, true);
        say!("{}", timeline::print(&execution.events, EVENTS).trim_end());
        if let Some(at) = execution.misfit {
            say!("INCONCLUSIVE choice {at} doesn't belong to this scenario");
            return Ok(2);
        }
        match execution.failure {
            Some(failure) => {
                say!("FAILED {failure}");
                Ok(1)
            }
            None => {
                say!("passed; {} points", execution.points.len());
                Ok(0)
            }
        }
    }
}

fn list(scenarios: &[Small]) {
    for scenario in scenarios {
        let guests: Vec<String> = scenario
            .guests
            .iter()
            .map(|requests| {
                let requests: Vec<String> = requests.iter().map(ToString::to_string).collect();
                requests.join(", ")
            })
            .collect();
        say!("{:<34} {}", scenario.name, guests.join(" | "));
    }
}
