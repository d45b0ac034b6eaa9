//! `crash`: sweeps of power cuts, with what they counted.

use std::{ops::Range, sync::Arc};

use parking_lot::Mutex;
use serde::Serialize;

use super::{Status, parse_seeds, print_json, print_text, run::ListOutput};
use crate::{
    case::{Case, Group, Verdict},
    crash::{self, Counters, Cuts, Workload},
    external, runner,
    suite::Suite,
};

#[derive(clap::Args)]
pub(super) struct CrashArgs {
    /// Formats, separated by commas, or `all`
    #[arg(long, short = 'f', default_value = "all")]
    format: String,
    /// Options of image creation
    #[arg(short = 'o', default_value = "")]
    options: String,
    /// Workloads, separated by commas (allocating-writes, recycled-clusters, copy-on-write, compressed-writes,
    /// write-through, growing-disk), or `all`
    #[arg(long, short = 'w', default_value = "all")]
    workload: String,
    /// Seeds: one or A..B
    #[arg(long, alias = "seeds", default_value = "0..2", value_parser = parse_seeds)]
    seed: Range<u64>,
    /// Cut the power after every so many writes of the storage
    #[arg(long, default_value_t = 1)]
    every: u64,
    /// Contents for each moment: all unflushed writes lost, all kept, then any subset
    #[arg(long, default_value_t = 4)]
    subsets: u64,
    /// Requests of each of the workload's tasks
    #[arg(long, default_value_t = 24)]
    steps: u64,
    /// Don't ask the installed qemu-img about a sample of the images
    #[arg(long)]
    no_external: bool,
    /// What is written to standard output
    #[arg(long, value_enum, default_value = "human")]
    output: ListOutput,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Swept {
    format: String,
    workload: &'static str,
    seed: u64,
    #[serde(flatten)]
    counters: Counters,
    #[serde(flatten)]
    verdict: Verdict,
    again: String,
}

fn workloads(names: &str) -> Result<Vec<Workload>, String> {
    if names == "all" {
        return Ok(Workload::ALL.to_vec());
    }
    let one = |name: &str| {
        let found = Workload::ALL
            .into_iter()
            .find(|workload| workload.name() == name);
        found.ok_or_else(|| {
            let known: Vec<&str> = Workload::ALL.iter().map(|w| w.name()).collect();
            format!("Unknown workload '{name}' (known: {})", known.join(", "))
        })
    };
    names.split(',').map(one).collect()
}

pub(super) fn crash(suite: &Suite, args: &CrashArgs) -> Status {
    if args.every == 0 || args.subsets == 0 || args.steps == 0 {
        return Err("--every, --subsets and --steps must be at least 1".into());
    }
    if args.no_external {
        external::forbid();
    }
    let workloads = workloads(&args.workload)?;
    let names: Vec<&str> = if args.format == "all" {
        suite.format_names()
    } else {
        args.format.split(',').collect()
    };
    let human = args.output == ListOutput::Human;
    if human {
        print_text(&format!(
            "{:<24} {:<18} {:>5} {:>7} {:>7} {:>9} {:>7}  verdict",
            "format", "workload", "seed", "writes", "moments", "unflushed", "images"
        ));
    }
    let mut all = Vec::new();
    for name in names {
        let format = suite.format(name, &args.options)?;
        for workload in &workloads {
            for seed in args.seed.clone() {
                let counters = Arc::new(Mutex::new(Counters::default()));
                let case = sweep_case(*workload, args, counters.clone());
                let seeds = seed..seed + 1;
                let (verdict, _, _) =
                    runner::run_case(suite.registry(), &format, &case, &seeds, false);
                let options = format.create_text();
                let options = match options.as_str() {
                    "" => String::new(),
                    some => format!(" -o {some}"),
                };
                let swept = Swept {
                    format: format.label(),
                    workload: workload.name(),
                    seed,
                    counters: *counters.lock(),
                    verdict,
                    again: format!(
                        "{} crash -f {name}{options} -w {} --seed {seed} --every {} --subsets {} --steps {}",
                        suite.command(),
                        workload.name(),
                        args.every,
                        args.subsets,
                        args.steps
                    ),
                };
                let not_covered = matches!(swept.verdict, Verdict::NotCovered(_));
                if human {
                    show(&swept);
                }
                all.push(swept);
                if not_covered {
                    break;
                }
            }
        }
    }
    if !human {
        print_json(&all)?;
    }
    Ok(runner::status(all.iter().map(|swept| &swept.verdict)))
}

fn sweep_case(workload: Workload, args: &CrashArgs, counters: Arc<Mutex<Counters>>) -> Case {
    let cuts = Cuts {
        every: args.every,
        subsets: args.subsets,
        steps: args.steps,
        ask_qemu_every: 50,
    };
    let name = format!("crash-{}", workload.name());
    Case::new(Group::Crash, name, "", move |scene| {
        let counters = counters.clone();
        async move {
            match crash::sweep(scene, workload, cuts).await? {
                Ok(counted) => {
                    *counters.lock() = counted;
                    Ok(counted.verdict())
                }
                Err(not_covered) => Ok(not_covered),
            }
        }
    })
}

fn show(swept: &Swept) {
    let Counters {
        storage_writes,
        moments,
        unflushed,
        images,
    } = swept.counters;
    let mut text = format!(
        "{:<24} {:<18} {:>5} {storage_writes:>7} {moments:>7} {unflushed:>9} {images:>7}  {} {}",
        swept.format,
        swept.workload,
        swept.seed,
        swept.verdict.word(),
        swept.verdict.detail()
    );
    if matches!(swept.verdict, Verdict::Failed(_) | Verdict::Inconclusive(_)) {
        text.push_str(&format!("\n    again: {}", swept.again));
    }
    print_text(&text);
}
