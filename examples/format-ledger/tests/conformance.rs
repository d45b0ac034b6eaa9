//! The whole suite, against this driver.

use block_core::Registry;
use format_ledger::LedgerFactory;
use iotests::case::{FormatUnderTest, Group, Verdict, run};

#[test]
fn everything() {
    let registry = Registry::new().with(LedgerFactory);
    let format = FormatUnderTest::new("ledger")
        .with("cluster_size", 4096)
        .with_safeguards();
    let mut bad = Vec::new();
    for case in iotests::cli::all_cases() {
        if case.group == Group::Cancel {
            continue;
        }
        for seed in 0..4 {
            let v = run(&registry, &format, &case, seed, None).verdict;
            if v != Verdict::Passed {
                println!("{} {seed} {} {}", case.name, v.word(), v.detail());
                if v.is_failed() || matches!(v, Verdict::Inconclusive(_)) {
                    bad.push(case.name.clone());
                }
                break;
            }
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}
