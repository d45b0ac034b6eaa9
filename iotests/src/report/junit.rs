//! The report as JUnit XML, as CI servers read it: a suite per format, a test case per case. What isn't covered is
//! `skipped`, what proved nothing is an `error`, what failed is a `failure`.

use std::fmt::Write as _;

use super::{Report, Totals};
use crate::{case::Verdict, runner::Outcome};

/// Text for an attribute or an element. What XML 1.0 can't hold at all becomes U+FFFD.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push_str("&#10;"),
            '\t' => out.push_str("&#9;"),
            c if c < ' ' || c == '\u{fffe}' || c == '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn seconds(outcomes: &[&Outcome]) -> f64 {
    outcomes.iter().map(|o| o.milliseconds.as_secs_f64()).sum()
}

/// The report as JUnit XML.
pub fn junit(report: &Report) -> String {
    let all: Vec<&Outcome> = report.outcomes.iter().collect();
    let totals = Totals::of(&report.outcomes);
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(
        xml,
        "<testsuites name=\"iotests\" tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\" time=\"{:.3}\">",
        totals.all(),
        totals.failed,
        totals.inconclusive,
        totals.not_covered,
        seconds(&all)
    );
    for format in &report.formats {
        let of: Vec<&Outcome> = report
            .outcomes
            .iter()
            .filter(|o| o.format == *format)
            .collect();
        let totals = Totals::of(of.iter().copied());
        let _ = writeln!(
            xml,
            "  <testsuite name=\"{}\" tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\" time=\"{:.3}\">",
            escaped(format),
            totals.all(),
            totals.failed,
            totals.inconclusive,
            totals.not_covered,
            seconds(&of)
        );
        for outcome in of {
            let _ = write!(
                xml,
                "    <testcase classname=\"{}.{}\" name=\"{}\" time=\"{:.3}\"",
                escaped(format),
                outcome.group.name(),
                escaped(&outcome.case),
                outcome.milliseconds.as_secs_f64()
            );
            let detail = escaped(outcome.verdict.detail());
            let again = escaped(&outcome.again);
            match &outcome.verdict {
                Verdict::Passed => xml.push_str("/>\n"),
                Verdict::NotCovered(_) => {
                    let _ = writeln!(
                        xml,
                        "><skipped message=\"not covered: {detail}\"/></testcase>"
                    );
                }
                Verdict::Inconclusive(_) => {
                    let _ = writeln!(
                        xml,
                        "><error message=\"{detail}\">{again}</error></testcase>"
                    );
                }
                Verdict::Failed(_) => {
                    let _ = writeln!(
                        xml,
                        "><failure message=\"{detail}\">{again}</failure></testcase>"
                    );
                }
            }
        }
        xml.push_str("  </testsuite>\n");
    }
    xml.push_str("</testsuites>\n");
    xml
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::case::Group;

    fn outcome(case: &str, verdict: Verdict) -> Outcome {
        Outcome {
            format: "f".into(),
            group: Group::Rw,
            case: case.into(),
            verdict,
            seed: 3,
            schedules: 1,
            milliseconds: Duration::from_millis(5),
            again: "iotests run \"=a\" <b>".into(),
        }
    }

    #[test]
    fn every_verdict_has_its_element_and_nothing_breaks_out_of_an_attribute() {
        let report = Report {
            formats: vec!["f".into()],
            seeds: 0..1,
            notes: Vec::new(),
            outcomes: vec![
                outcome("one", Verdict::Passed),
                outcome("two", Verdict::NotCovered("no \"x\"".into())),
                outcome("three", Verdict::Failed("a < b & c\u{1}\nnext".into())),
                outcome("four", Verdict::Inconclusive("nothing".into())),
            ],
        };
        let xml = junit(&report);
        assert!(xml.contains("tests=\"4\" failures=\"1\" errors=\"1\" skipped=\"1\""));
        assert!(xml.contains("not covered: no &quot;x&quot;"));
        assert!(xml.contains("a &lt; b &amp; c\u{fffd}&#10;next"));
        assert!(xml.contains("iotests run &quot;=a&quot; &lt;b&gt;</failure>"));
        assert_eq!(xml.matches("<testcase").count(), 4);
        assert_eq!(
            xml.matches("</testcase>").count() + xml.matches("\"/>\n").count(),
            4
        );
    }
}
