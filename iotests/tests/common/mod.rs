//! What the test files share.
#![allow(dead_code)]

use block_core::Registry;
use iotests::{
    case::{Case, FormatUnderTest, Verdict, run},
    memdriver::ThirdPartyFactory,
};

/// The third party's driver alone.
pub fn third_party() -> Registry {
    Registry::new().with(ThirdPartyFactory)
}

/// Runs cases under schedules 0..seeds and prints a line for each; panics with all failures.
pub fn expect_passed(registry: &Registry, format: &FormatUnderTest, cases: &[Case], seeds: u64) {
    let mut failures = Vec::new();
    let mut covered = 0;
    for case in cases {
        for seed in 0..seeds {
            let verdict = run(registry, format, case, seed, None).verdict;
            match &verdict {
                Verdict::Passed => covered += 1,
                Verdict::NotCovered(why) => {
                    println!("{:<72} not covered: {why}", case.name);
                    break;
                }
                Verdict::Inconclusive(why) | Verdict::Failed(why) => {
                    failures.push(format!(
                        "{} (seed {seed}): {} {why}",
                        case.name,
                        verdict.word()
                    ));
                    break;
                }
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(covered > 0, "no case covered anything");
}
