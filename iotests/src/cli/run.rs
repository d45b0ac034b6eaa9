//! `run` and `list`.

use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    ops::Range,
    path::PathBuf,
};

use clap::ValueEnum;
use serde::Serialize;

use super::{
    Status, parse_seeds, print_json, print_text,
    select::{Selection, arguments},
};
use crate::{
    case::{FormatUnderTest, Group, Verdict},
    external,
    report::{self, Report},
    runner::{self, Outcome, Plan},
    suite::Suite,
};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    Human,
    Json,
    Junit,
}

#[derive(clap::Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    selection: Selection,
    /// Schedules to run each case under: one seed or A..B; 0 is first come first served
    #[arg(long, alias = "seeds", default_value = "0..4", value_parser = parse_seeds)]
    seed: Range<u64>,
    /// Cases side by side (default: one per processor)
    #[arg(long, short = 'j', value_name = "N")]
    jobs: Option<usize>,
    /// Stop after the first case that fails
    #[arg(long)]
    fail_fast: bool,
    /// Don't ask the installed qemu-img for a second opinion
    #[arg(long)]
    no_external: bool,
    /// What is written to standard output
    #[arg(long, value_enum, default_value = "human")]
    output: Output,
    /// Also writes a report here: JUnit when the name ends in .xml, JSON when it ends in .json, else the table
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

fn render(report: &Report, output: Output) -> Result<String, String> {
    Ok(match output {
        Output::Human => format!("{}\n{}", report::matrix(report), report::summary(report)),
        Output::Json => report::json(report)?,
        Output::Junit => report::junit(report),
    })
}

/// One line on a terminal that is overwritten by the next.
struct Progress {
    total: usize,
    on: bool,
    failed: usize,
}

impl Progress {
    fn clear(&self) {
        if self.on {
            eprint!("\r\x1b[K");
        }
    }

    fn show(&mut self, done: usize, outcome: &Outcome) {
        let bad = matches!(
            outcome.verdict,
            Verdict::Failed(_) | Verdict::Inconclusive(_)
        );
        self.failed += usize::from(bad);
        if bad {
            self.clear();
            eprintln!("{}", report::line(outcome));
        }
        if self.on {
            let name: String = outcome.case.chars().take(48).collect();
            self.clear();
            eprint!(
                "{done}/{} ({} bad) {} {name}",
                self.total, self.failed, outcome.format
            );
            let _ = std::io::stderr().flush();
        }
    }
}

/// What a reader has to know about the second opinion.
fn notes(formats: &[FormatUnderTest], forbidden: bool) -> Vec<String> {
    if forbidden {
        return vec!["no second opinion from qemu-img: --no-external".into()];
    }
    let Some(version) = external::version() else {
        return vec!["no second opinion: qemu-img isn't installed".into()];
    };
    let mut unknown: Vec<&str> = formats.iter().map(|format| format.name.as_str()).collect();
    unknown.retain(|name| !external::knows(name));
    unknown.dedup();
    let mut notes = vec![format!("second opinion: {version}")];
    if !unknown.is_empty() {
        let unknown = unknown.join(", ");
        notes.push(format!(
            "no second opinion on {unknown}: qemu-img doesn't know it"
        ));
    }
    notes
}

pub(super) fn run(suite: &Suite, args: &RunArgs) -> Status {
    let formats = args.selection.formats(suite)?;
    let cases = args.selection.cases(suite)?;
    let mut plan = Plan::new(args.seed.clone());
    plan.fail_fast = args.fail_fast;
    plan.external = !args.no_external;
    if args.no_external {
        external::forbid();
    }
    if let Some(threads) = args.jobs {
        if threads == 0 {
            return Err("--jobs: at least 1".into());
        }
        plan.threads = threads;
    }
    let mut progress = Progress {
        total: formats.len() * cases.len(),
        on: std::io::stderr().is_terminal(),
        failed: 0,
    };
    let command = suite.command();
    let outcomes = runner::run_all(
        suite.registry(),
        &formats,
        &cases,
        &plan,
        |format, case, seed| {
            format!(
                "{command} run {} --seed {seed}",
                arguments(format, &case.name)
            )
        },
        |done, outcome| progress.show(done, outcome),
    );
    progress.clear();
    let report = Report {
        formats: formats.iter().map(|format| format.label()).collect(),
        seeds: args.seed.clone(),
        notes: notes(&formats, args.no_external),
        outcomes,
    };
    if let Some(path) = &args.report {
        let output = match path.extension().and_then(|end| end.to_str()) {
            Some("xml") => Output::Junit,
            Some("json") => Output::Json,
            _ => Output::Human,
        };
        let text = render(&report, output)?;
        std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    print_text(render(&report, args.output)?.trim_end());
    Ok(runner::status(report.outcomes.iter().map(|o| &o.verdict)))
}

#[derive(clap::Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    selection: Selection,
    /// What is written to standard output
    #[arg(long, value_enum, default_value = "human")]
    output: ListOutput,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ListOutput {
    Human,
    Json,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Listed {
    case: String,
    group: Group,
    quick: bool,
    proves: String,
    /// For each format that was named: `covered`, or why not.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    formats: BTreeMap<String, String>,
}

/// With `--format`, each case is run once: only then it is known whether the driver covers it.
pub(super) fn list(suite: &Suite, args: &ListArgs) -> Status {
    let cases = args.selection.cases(suite)?;
    let mut listed: Vec<Listed> = cases
        .iter()
        .map(|case| Listed {
            case: case.name.clone(),
            group: case.group,
            quick: case.quick,
            proves: case.proves.clone(),
            formats: BTreeMap::new(),
        })
        .collect();
    let mut formats = Vec::new();
    if args.selection.names_formats() {
        formats = args.selection.formats(suite)?;
        let plan = Plan::new(0..1);
        // A cancellation covers what its race covers: one run without a drop tells.
        let mut once = cases.clone();
        for case in &mut once {
            if case.group == Group::Cancel {
                case.group = Group::Race;
            }
        }
        let outcomes = runner::run_all(
            suite.registry(),
            &formats,
            &once,
            &plan,
            |_, _, _| String::new(),
            |_, _| {},
        );
        for (number, outcome) in outcomes.into_iter().enumerate() {
            let says = match outcome.verdict {
                Verdict::NotCovered(why) => format!("not covered: {why}"),
                _ => "covered".to_owned(),
            };
            listed[number % cases.len()]
                .formats
                .insert(outcome.format, says);
        }
    }
    if args.output == ListOutput::Json {
        print_json(&listed)?;
        return Ok(0);
    }
    let mut text = String::new();
    for case in &listed {
        text.push_str(&format!(
            "{:<8} {:<74} {}\n",
            case.group.name(),
            case.case,
            case.proves
        ));
        for (format, says) in case.formats.iter().filter(|(_, says)| *says != "covered") {
            text.push_str(&format!("         {format}: {says}\n"));
        }
    }
    text.push_str(&format!("{} cases", listed.len()));
    for format in &formats {
        let label = format.label();
        let covered = listed
            .iter()
            .filter(|case| {
                case.formats
                    .get(&label)
                    .is_some_and(|says| says == "covered")
            })
            .count();
        text.push_str(&format!("; {label} covers {covered}"));
    }
    print_text(&text);
    Ok(0)
}
