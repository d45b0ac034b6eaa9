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
#[test]
fn cancel() {
    let registry = Registry::new().with(LedgerFactory);
    let format = FormatUnderTest::new("ledger").with("cluster_size", 4096).with_safeguards();
    let mut dropped = 0;
    for case in iotests::cli::all_cases() {
        if case.group != Group::Cancel { continue; }
        let s = iotests::cancel::sweep(&registry, &format, &case, 0);
        dropped += s.dropped;
        let v = s.verdict();
        assert!(matches!(v, Verdict::Passed | Verdict::NotCovered(_)), "{} {v:?}", case.name);
    }
    println!("dropped {dropped}");
}
#[test]
fn storms() {
    use iotests::race::{StormConfig, storm};
    let registry = Registry::new().with(LedgerFactory);
    let format = FormatUnderTest::new("ledger").with("cluster_size", 4096).with_safeguards();
    for region in [8, 32] { for seed in 1..4 { for gate in [true,false] {
        let mut c = StormConfig::new(seed, region); if !gate { c = c.without_gate(); }
        let r = storm(&registry, &format, &c);
        println!("{gate} {} {}", r.is_clean(), r.summary());
    }}}
}
