//! The program: `run`, `list`, `race`, `storm-commands`. It prints, it decides the exit status, and leaves everything
//! else to the library. Exit status: 0 when all passed (or weren't covered), 1 when something failed, 2 when something
//! was inconclusive, 3 for wrong usage.

use std::process::ExitCode;

use block_core::{Options, Registry};
use clap::{Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::{
    basic, cancel,
    case::{self, Case, FormatUnderTest, Group, Verdict},
    cases, memdriver,
    race::{self, Matrix, commands::Layout},
};

#[derive(Parser)]
#[command(
    name = "iotests",
    about = "Conformance, race and cancellation tests for block drivers"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Human,
    Json,
}

#[derive(clap::Args)]
struct Selection {
    /// Formats, separated by commas, or `all`
    #[arg(long, short = 'f', default_value = "all")]
    format: String,
    /// Options of image creation, as with `qemu-img -o`
    #[arg(short = 'o', default_value = "")]
    options: String,
    /// Groups of cases, separated by commas, or `all`
    #[arg(long, default_value = "all")]
    group: String,
    /// Only cases whose name contains this
    filter: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Runs cases
    Run {
        #[command(flatten)]
        selection: Selection,
        /// Schedules to run each case under: one seed or A..B; 0 is first come first served
        #[arg(long, default_value = "0..4")]
        seed: String,
        #[arg(long, value_enum, default_value = "human")]
        output: Output,
    },
    /// Lists cases
    List {
        #[command(flatten)]
        selection: Selection,
    },
    /// Runs storms with and without the gate and the driver's own safeguards
    Race {
        #[arg(long, short = 'f', default_value = "qcow2")]
        format: String,
        /// Options of image creation
        #[arg(short = 'o', default_value = "cluster_size=4k")]
        options: String,
        /// Seeds: one or A..B
        #[arg(long, default_value = "1..9")]
        seed: String,
        /// Clusters of the contention region, separated by commas
        #[arg(long, default_value = "8,16,32")]
        region: String,
        /// Commands of one storm
        #[arg(long, default_value_t = 5000)]
        commands: usize,
        /// So many in a hundred requests are dropped on the way (with the gate)
        #[arg(long, default_value_t = 0)]
        drop_percent: u64,
        /// So often the power is cut (with the gate)
        #[arg(long, default_value_t = 0)]
        power_cuts: usize,
        #[arg(long, value_enum, default_value = "human")]
        output: Output,
    },
    /// Prints a storm as commands for `blk io` and `qemu-io` on standard input
    StormCommands {
        /// The seed
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Bytes of a cluster
        #[arg(long, default_value_t = 65536)]
        cluster: u64,
        /// Clusters of the contention region
        #[arg(long, default_value_t = 8)]
        region: u64,
        /// Clusters on each side that must never change
        #[arg(long, default_value_t = 8)]
        victims: u64,
        /// Clusters that are written for the first time on the way
        #[arg(long, default_value_t = 64)]
        fresh: u64,
        /// Commands
        #[arg(long, default_value_t = 5000)]
        commands: usize,
    },
}

/// The drivers that the program tests.
pub struct Suite {
    registry: Registry,
    bare: Option<Registry>,
}

impl Suite {
    /// The drivers of `registry`, and the crate's own third-party driver.
    pub fn new(registry: &Registry) -> Self {
        Self {
            registry: registry.clone().with(memdriver::ThirdPartyFactory),
            bare: None,
        }
    }

    /// The same drivers without their own safeguards, for the half of the race matrix that must corrupt.
    #[must_use]
    pub fn with_bare(mut self, bare: &Registry) -> Self {
        self.bare = Some(bare.clone().with(memdriver::ThirdPartyFactory));
        self
    }

    /// Runs the program on the process's arguments.
    pub fn main(&self) -> ExitCode {
        let arguments = match Arguments::try_parse() {
            Ok(arguments) => arguments,
            Err(error) => {
                let _ = error.print();
                return ExitCode::from(if error.use_stderr() { 3 } else { 0 });
            }
        };
        match self.execute(arguments.command) {
            Ok(status) => ExitCode::from(status),
            Err(text) => {
                eprintln!("iotests: {text}");
                ExitCode::from(3)
            }
        }
    }

    fn execute(&self, command: Command) -> Result<u8, String> {
        match command {
            Command::Run {
                selection,
                seed,
                output,
            } => self.run(&selection, &parse_seeds(&seed)?, output),
            Command::List { selection } => {
                for case in select(&selection)? {
                    println!("{:<8} {:<70} {}", case.group.name(), case.name, case.proves);
                }
                Ok(0)
            }
            Command::Race {
                format,
                options,
                seed,
                region,
                commands,
                drop_percent,
                power_cuts,
                output,
            } => {
                let mut under_test = format_under_test(&format, &options)?;
                under_test.safeguards = true;
                let regions: Result<Vec<u64>, _> = region.split(',').map(str::parse).collect();
                let what = Matrix {
                    regions: regions.map_err(|error| format!("--region: {error}"))?,
                    seeds: parse_seeds(&seed)?,
                    commands,
                    drop_percent,
                    power_cuts,
                    ask_qemu: true,
                };
                Ok(self.race(&under_test, &what, output))
            }
            Command::StormCommands {
                seed,
                cluster,
                region,
                victims,
                fresh,
                commands,
            } => {
                if cluster < 512 || cluster % 512 != 0 || region == 0 {
                    return Err("--cluster must be a multiple of 512, --region at least 1".into());
                }
                let layout = Layout {
                    cluster,
                    region,
                    victims,
                    fresh,
                };
                print!("{}", race::commands::script(seed, commands, layout));
                Ok(0)
            }
        }
    }

    fn formats(&self, names: &str, options: &str) -> Result<Vec<FormatUnderTest>, String> {
        let all: Vec<String> = self
            .registry
            .factories()
            .iter()
            .filter(|factory| factory.kind() == block_core::DriverKind::Format)
            .map(|factory| factory.name().to_owned())
            .collect();
        let wanted: Vec<&str> = if names == "all" {
            all.iter().map(String::as_str).collect()
        } else {
            names.split(',').collect()
        };
        wanted
            .into_iter()
            .map(|name| {
                if !all.iter().any(|known| known == name) {
                    return Err(format!(
                        "Unknown format '{name}' (known: {})",
                        all.join(", ")
                    ));
                }
                format_under_test(name, options)
            })
            .collect()
    }

    fn run(
        &self,
        selection: &Selection,
        seeds: &std::ops::Range<u64>,
        output: Output,
    ) -> Result<u8, String> {
        let mut results = Vec::new();
        for format in self.formats(&selection.format, &selection.options)? {
            for case in select(selection)? {
                let result = self.run_case(&format, &case, seeds);
                if output == Output::Human {
                    let line = format!("{:<11} {:<70}", result.format, result.case);
                    println!(
                        "{line} {:<12} {}",
                        result.verdict.word(),
                        result.verdict.detail()
                    );
                    if result.verdict.is_failed() {
                        println!("            again: {}", result.again);
                    }
                }
                results.push(result);
            }
        }
        let count = |word: &str| results.iter().filter(|r| r.verdict.word() == word).count();
        match output {
            Output::Human => println!(
                "{} passed, {} not covered, {} inconclusive, {} failed",
                count("passed"),
                count("not covered"),
                count("INCONCLUSIVE"),
                count("FAILED")
            ),
            Output::Json => print_json(&results)?,
        }
        Ok(status(results.iter().map(|result| &result.verdict)))
    }

    fn run_case(
        &self,
        format: &FormatUnderTest,
        case: &Case,
        seeds: &std::ops::Range<u64>,
    ) -> CaseOutcome {
        let mut verdict = Verdict::Passed;
        let mut seed_of = seeds.start;
        for seed in seeds.clone() {
            let now = match case.group {
                Group::Cancel => cancel::sweep(&self.registry, format, case, seed).verdict(),
                _ => case::run(&self.registry, format, case, seed, None).verdict,
            };
            seed_of = seed;
            if now.is_failed() || (verdict == Verdict::Passed && now != Verdict::Passed) {
                verdict = now;
            }
            // One schedule is enough for what isn't covered, and for each point of a cancellation.
            if verdict != Verdict::Passed || case.group == Group::Cancel {
                break;
            }
        }
        CaseOutcome {
            format: format.name.clone(),
            case: case.name.clone(),
            again: format!(
                "iotests run -f {} --group {} --seed {seed_of} {}",
                format.name,
                case.group.name(),
                case.name
            ),
            verdict,
        }
    }

    fn race(&self, format: &FormatUnderTest, what: &Matrix, output: Output) -> u8 {
        if output == Output::Human {
            println!("gate safeguards region  runs corrupt  waits  deferred  caught  verdict");
        }
        let on = |yes: bool| if yes { "on" } else { "off" };
        let cells = race::matrix(&self.registry, self.bare.as_ref(), format, what, |cell| {
            if output == Output::Human {
                let verdict = cell.verdict();
                println!(
                    "{:<4} {:<10} {:>6} {:>5} {:>7} {:>6} {:>9} {:>7}  {} {}",
                    on(cell.gate),
                    on(cell.safeguards),
                    cell.region,
                    cell.runs.len(),
                    cell.corrupt_runs(),
                    cell.total("gate-waits"),
                    cell.total("frees-deferred-by-pins"),
                    cell.total("ownership-violations-caught"),
                    verdict.word(),
                    verdict.detail()
                );
            }
        });
        if output == Output::Json
            && let Err(text) = print_json(&cells)
        {
            eprintln!("iotests: {text}");
            return 3;
        }
        if output == Output::Human && self.bare.is_none() {
            println!("safeguards off: not covered, this program can't take them away");
        }
        let verdicts: Vec<Verdict> = cells.iter().map(race::Cell::verdict).collect();
        status(verdicts.iter())
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct CaseOutcome {
    format: String,
    case: String,
    #[serde(flatten)]
    verdict: Verdict,
    again: String,
}

/// Every case there is: the races once more under the name of their cancellation.
pub fn all_cases() -> Vec<Case> {
    let mut all = basic::all();
    let races = cases::all();
    let cancels = races.iter().cloned().map(|mut case| {
        case.group = Group::Cancel;
        case.proves = format!("whichever request is dropped wherever: {}", case.proves);
        case.name = case.name.replacen("race-", "cancel-", 1);
        case
    });
    let cancels: Vec<Case> = cancels.collect();
    all.extend(races);
    all.extend(cancels);
    all.extend(crate::job_cases::all());
    all.extend(crate::fault_cases::all());
    all.extend(crate::concurrent_cases::all());
    all.extend(crate::hostile_cases::all());
    all.extend(crate::interop_cases::all());
    all
}

fn select(selection: &Selection) -> Result<Vec<Case>, String> {
    let groups: Vec<&str> = selection.group.split(',').collect();
    for group in &groups {
        if *group != "all" && !Group::ALL.iter().any(|known| known.name() == *group) {
            let known: Vec<&str> = Group::ALL.iter().map(|group| group.name()).collect();
            return Err(format!(
                "Unknown group '{group}' (known: {})",
                known.join(", ")
            ));
        }
    }
    let filter = selection.filter.as_deref().unwrap_or_default();
    Ok(all_cases()
        .into_iter()
        .filter(|case| groups.contains(&"all") || groups.contains(&case.group.name()))
        .filter(|case| case.name.contains(filter))
        .collect())
}

fn format_under_test(name: &str, options: &str) -> Result<FormatUnderTest, String> {
    let mut format = FormatUnderTest::new(name);
    if !options.is_empty() {
        format.create = Options::from_dotted(options).map_err(|error| error.to_string())?;
    }
    // Formats of this project claim safeguards; a third party's are known not to.
    format.safeguards = name == "qcow2" || name == "vmdk";
    Ok(format)
}

fn parse_seeds(text: &str) -> Result<std::ops::Range<u64>, String> {
    let number = |text: &str| {
        text.parse::<u64>()
            .map_err(|_| format!("--seed: '{text}' is no number"))
    };
    match text.split_once("..") {
        Some((from, to)) => Ok(number(from)?..number(to)?),
        None => {
            let seed = number(text)?;
            Ok(seed..seed + 1)
        }
    }
}

fn status<'a>(verdicts: impl Iterator<Item = &'a Verdict>) -> u8 {
    let mut status = 0;
    for verdict in verdicts {
        match verdict {
            Verdict::Failed(_) => return 1,
            Verdict::Inconclusive(_) => status = 2,
            Verdict::Passed | Verdict::NotCovered(_) => {}
        }
    }
    status
}

fn print_json(value: &impl Serialize) -> Result<(), String> {
    let text = serde_json::to_string_pretty(value).map_err(|error| error.to_string())?;
    println!("{text}");
    Ok(())
}

/// Runs the program with the drivers of `registry`.
pub fn main(registry: &Registry) -> ExitCode {
    Suite::new(registry).main()
}
