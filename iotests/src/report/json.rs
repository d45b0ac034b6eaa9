//! The report as JSON: one object, for programs. Its keys are stable.

use serde::Serialize;

use super::{Report, Totals};
use crate::runner::Outcome;

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Document<'a> {
    tool: &'static str,
    version: &'static str,
    formats: &'a [String],
    first_seed: u64,
    end_seed: u64,
    notes: &'a [String],
    totals: Totals,
    outcomes: &'a [Outcome],
}

/// The report as JSON.
///
/// # Errors
/// None that the types don't rule out.
pub fn json(report: &Report) -> Result<String, String> {
    let document = Document {
        tool: "iotests",
        version: env!("CARGO_PKG_VERSION"),
        formats: &report.formats,
        first_seed: report.seeds.start,
        end_seed: report.seeds.end,
        notes: &report.notes,
        totals: Totals::of(&report.outcomes),
        outcomes: &report.outcomes,
    };
    serde_json::to_string_pretty(&document).map_err(|error| error.to_string())
}
