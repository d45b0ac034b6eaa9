//! The table for people: cases down, formats across, groups with their totals, and below it each failure with the command
//! that runs it again.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{Report, Totals};
use crate::{
    case::{Group, Verdict},
    runner::Outcome,
};

/// What stands in the matrix.
const fn mark(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Passed => "p",
        Verdict::NotCovered(_) => "-",
        Verdict::Inconclusive(_) => "?",
        Verdict::Failed(_) => "F",
    }
}

/// One outcome in one line; of those that are bad, also the command.
pub fn line(outcome: &Outcome) -> String {
    let mut text = format!(
        "{:<12} {:<16} {}",
        outcome.verdict.word(),
        outcome.format,
        outcome.case
    );
    if !outcome.verdict.detail().is_empty() {
        let _ = write!(text, "\n    {}", outcome.verdict.detail());
    }
    if matches!(
        outcome.verdict,
        Verdict::Failed(_) | Verdict::Inconclusive(_)
    ) {
        let _ = write!(text, "\n    again: {}", outcome.again);
    }
    text
}

/// Columns are narrow: long names stand above the table, with a letter each.
fn heads(formats: &[String]) -> (Vec<String>, String) {
    if formats.iter().all(|format| format.len() <= 10) {
        return (formats.to_vec(), String::new());
    }
    let mut legend = String::new();
    let heads = formats.iter().enumerate().map(|(at, format)| {
        let head = format!("[{}]", at + 1);
        let _ = writeln!(legend, "{head} {format}");
        head
    });
    (heads.collect(), legend)
}

/// Cases against formats. `p` passed, `F` failed, `?` proved nothing, `-` not covered.
pub fn matrix(report: &Report) -> String {
    let mut rows: BTreeMap<Group, Vec<(&str, Vec<&'static str>)>> = BTreeMap::new();
    for outcome in &report.outcomes {
        let Some(column) = report.formats.iter().position(|f| *f == outcome.format) else {
            continue;
        };
        let group = rows.entry(outcome.group).or_default();
        let row = match group.iter().position(|(case, _)| *case == outcome.case) {
            Some(row) => row,
            None => {
                group.push((&outcome.case, vec![" "; report.formats.len()]));
                group.len() - 1
            }
        };
        group[row].1[column] = mark(&outcome.verdict);
    }
    let (heads, legend) = heads(&report.formats);
    let mut text = legend;
    for (group, cases) in &rows {
        let _ = write!(
            text,
            "\n{:<76}",
            format!("{} ({} cases)", group.name(), cases.len())
        );
        for head in &heads {
            let _ = write!(text, " {head:>10}");
        }
        text.push('\n');
        for (case, marks) in cases {
            let _ = write!(text, "  {case:<74}");
            for mark in marks {
                let _ = write!(text, " {mark:>10}");
            }
            text.push('\n');
        }
        let _ = write!(text, "  {:<74}", "passed of covered");
        for format in &report.formats {
            let of = report
                .outcomes
                .iter()
                .filter(|outcome| outcome.group == *group && outcome.format == *format);
            let totals = Totals::of(of);
            let covered = totals.all() - totals.not_covered;
            let _ = write!(text, " {:>10}", format!("{}/{covered}", totals.passed));
        }
        text.push('\n');
    }
    text.push_str("\np passed   F failed   ? proved nothing   - not covered\n");
    text
}

/// The bad outcomes, what wasn't covered and why, and the totals.
pub fn summary(report: &Report) -> String {
    let mut text = String::new();
    let bad: Vec<&Outcome> = report
        .outcomes
        .iter()
        .filter(|o| matches!(o.verdict, Verdict::Failed(_) | Verdict::Inconclusive(_)))
        .collect();
    for outcome in bad {
        let _ = writeln!(text, "{}", line(outcome));
    }
    for format in &report.formats {
        let of: Vec<&Outcome> = report
            .outcomes
            .iter()
            .filter(|o| o.format == *format)
            .collect();
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for outcome in &of {
            if let Verdict::NotCovered(why) = &outcome.verdict {
                *reasons.entry(why).or_default() += 1;
            }
        }
        let totals = Totals::of(of);
        let _ = writeln!(
            text,
            "{format}: {} passed, {} not covered, {} inconclusive, {} failed",
            totals.passed, totals.not_covered, totals.inconclusive, totals.failed
        );
        for (why, count) in reasons {
            let _ = writeln!(text, "  not covered ({count}): {why}");
        }
    }
    for note in &report.notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}
