//! `race` and `storm-commands`.

use std::ops::Range;

use clap::ValueEnum;

use super::{Status, parse_seeds, print_json, print_text};
use crate::{
    case::Verdict,
    race::{
        self, Matrix,
        commands::Layout,
        scenes,
        via::{self, Played, Program},
    },
    runner,
    suite::Suite,
};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    Human,
    Json,
}

#[derive(clap::Args)]
pub(super) struct RaceArgs {
    /// The format
    #[arg(long, short = 'f', default_value = "qcow2")]
    format: String,
    /// Options of image creation
    #[arg(short = 'o', default_value = "")]
    options: String,
    /// Seeds: one or A..B
    #[arg(long, alias = "seeds", default_value = "1..9", value_parser = parse_seeds)]
    seed: Range<u64>,
    /// Clusters of the contention region, separated by commas
    #[arg(long, default_value = "8,16,32", value_delimiter = ',')]
    region: Vec<u64>,
    /// Commands of one storm
    #[arg(long, default_value_t = 5000)]
    commands: usize,
    /// So many in a hundred requests are dropped on the way (with the gate)
    #[arg(long, default_value_t = 0)]
    drop_percent: u64,
    /// So often the power is cut (with the gate)
    #[arg(long, default_value_t = 0)]
    power_cuts: usize,
    /// Plays storms and deterministic races to a program instead, as a black box, and looks at what it left
    #[arg(long, value_enum)]
    via: Option<Via>,
    /// Where qemu-io is, if not in the path
    #[arg(long, value_name = "PATH")]
    qemu_io: Option<String>,
    /// Where blk is (or in IOTESTS_BLK), if not beside this program
    #[arg(long, value_name = "PATH")]
    blk: Option<String>,
    /// What is written to standard output
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
}

/// A program that has qemu-io's commands.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Via {
    /// The installed QEMU's
    QemuIo,
    /// `blk io`
    Blk,
}

#[derive(clap::Args)]
pub(super) struct StormArgs {
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
}

pub(super) fn storm_commands(args: &StormArgs) -> Status {
    if args.cluster < 512 || args.cluster % 512 != 0 || args.region == 0 {
        return Err("--cluster must be a multiple of 512, --region at least 1".into());
    }
    let layout = Layout {
        cluster: args.cluster,
        region: args.region,
        victims: args.victims,
        fresh: args.fresh,
    };
    let script = race::commands::script(args.seed, args.commands, layout);
    print_text(script.trim_end());
    Ok(0)
}

fn program(via: Via, args: &RaceArgs) -> Result<Program, String> {
    match via {
        Via::QemuIo => Ok(Program::qemu_io(args.qemu_io.as_deref())),
        Via::Blk => {
            let named = args
                .blk
                .clone()
                .or_else(|| std::env::var("IOTESTS_BLK").ok());
            let beside = || {
                let path = std::env::current_exe().ok()?.with_file_name("blk");
                path.exists().then(|| path.to_string_lossy().into_owned())
            };
            let path = named.or_else(beside).ok_or(
                "where is blk? Give --blk PATH or set IOTESTS_BLK, or build it: cargo build --release -p tools",
            )?;
            Ok(Program::blk(&path))
        }
    }
}

/// The black box: a line for each race and each storm.
fn race_via(via: Via, args: &RaceArgs) -> Status {
    let program = program(via, args)?;
    let version = program.version()?;
    let human = args.output == Output::Human;
    if human {
        print_text(&format!("{}: {version}", program.name));
        let columns = ("race", "errors", "changed", "leaks");
        print_text(&format!(
            "{:<42} {:>6} {:>8} {:>6}  verdict",
            columns.0, columns.1, columns.2, columns.3
        ));
    }
    let mut played = Vec::new();
    let mut show = |one: Played| {
        if human {
            let seed = one.seed.map(|seed| format!(" {seed}")).unwrap_or_default();
            print_text(&format!(
                "{:<42} {:>6} {:>8} {:>6}  {} {}",
                format!("{}{seed}", one.name),
                one.check_errors,
                one.changed,
                one.leaks,
                one.verdict.word(),
                one.verdict.detail()
            ));
        }
        played.push(one);
    };
    for scene in scenes::scenes() {
        show(via::scene(&program, &scene)?);
    }
    for seed in args.seed.clone() {
        show(via::storm(&program, seed, args.commands)?);
    }
    if human {
        let failed = played.iter().filter(|one| one.verdict.is_failed()).count();
        let covered = played
            .iter()
            .filter(|one| !matches!(one.verdict, Verdict::NotCovered(_)))
            .count();
        print_text(&format!("{}: {failed} of {covered} failed", program.name));
    } else {
        print_json(&played)?;
    }
    Ok(runner::status(played.iter().map(|one| &one.verdict)))
}

pub(super) fn race(suite: &Suite, args: &RaceArgs) -> Status {
    if let Some(via) = args.via {
        return race_via(via, args);
    }
    if args.region.contains(&0) {
        return Err("--region: at least 1".into());
    }
    let mut format = suite.format(&args.format, &args.options)?;
    // Small clusters make the most of a storm, where the format has such an option.
    let takes_cluster_size = suite.registry().get(&args.format).is_ok_and(|factory| {
        let options = factory.create_options();
        options.iter().any(|option| option.name == "cluster_size")
    });
    if takes_cluster_size {
        format.create.set_default("cluster_size", "4k");
    }
    let what = Matrix {
        regions: args.region.clone(),
        seeds: args.seed.clone(),
        commands: args.commands,
        drop_percent: args.drop_percent,
        power_cuts: args.power_cuts,
        ask_qemu: true,
    };
    if args.output == Output::Human {
        print_text("gate safeguards region  runs corrupt  waits  deferred  caught  verdict");
    }
    let on = |yes: bool| if yes { "on" } else { "off" };
    let cells = race::matrix(suite.registry(), suite.bare(), &format, &what, |cell| {
        if args.output == Output::Human {
            let verdict = cell.verdict();
            print_text(&format!(
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
            ));
        }
    });
    if args.output == Output::Json {
        print_json(&cells)?;
    } else if suite.bare().is_none() {
        print_text("safeguards off: not covered, this program can't take them away");
    }
    let verdicts: Vec<Verdict> = cells.iter().map(race::Cell::verdict).collect();
    Ok(runner::status(verdicts.iter()))
}
