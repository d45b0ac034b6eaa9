//! A driver that somebody else wrote, without a line against races, is protected by the request path alone.

mod common;

use common::{expect_passed, third_party};
use iotests::{
    basic, cancel,
    case::{FormatUnderTest, Verdict, run},
    cases, memdriver,
    race::{StormConfig, storm},
};

fn format() -> FormatUnderTest {
    FormatUnderTest::new(memdriver::NAME).with("cluster_size", 4096)
}

#[test]
fn a_third_partys_driver_passes_the_basic_cases() {
    expect_passed(&third_party(), &format(), &basic::all(), 3);
}

#[test]
fn a_third_partys_driver_passes_the_race_cases_behind_the_gate() {
    expect_passed(&third_party(), &format(), &cases::all(), 4);
}

#[test]
fn a_third_partys_driver_is_clean_after_every_storm_behind_the_gate() {
    for region in [8, 16, 32] {
        for seed in 1..9 {
            let report = storm(&third_party(), &format(), &StormConfig::new(seed, region));
            assert!(
                report.is_clean(),
                "region {region}, seed {seed}: {}",
                report.summary()
            );
            assert!(
                report.counter("gate-waits") > 0,
                "nobody waited: inconclusive"
            );
        }
    }
}

#[test]
fn without_the_gate_the_same_driver_is_corrupted_by_every_storm() {
    for region in [8, 16, 32] {
        for seed in 1..9 {
            let config = StormConfig::new(seed, region).without_gate();
            let report = storm(&third_party(), &format(), &config);
            assert!(
                report.victims_changed > 0 || report.foreign > 0,
                "region {region}, seed {seed}: {}",
                report.summary()
            );
        }
    }
}

#[test]
fn the_case_of_the_old_write_catches_a_driver_that_only_claims_safeguards() {
    let claims = format().with_safeguards();
    let case = cases::all()
        .into_iter()
        .find(|case| case.name == "race-old-write-spares-recycled-cluster-without-gate")
        .expect("there is such a case");
    let verdict = run(&third_party(), &claims, &case, 0, None).verdict;
    assert!(
        matches!(&verdict, Verdict::Failed(text) if text.contains("victim")),
        "{verdict:?}"
    );
}

#[test]
fn one_seed_gives_one_storm() {
    let config = StormConfig {
        commands: 500,
        ..StormConfig::new(5, 8).without_gate()
    };
    let runs = [0, 1].map(|_| storm(&third_party(), &format(), &config));
    assert_eq!(runs[0].polls, runs[1].polls);
    assert_eq!(runs[0].mismatches, runs[1].mismatches);
    assert_eq!(runs[0].counters, runs[1].counters);
}

#[test]
fn a_third_partys_driver_survives_every_request_dropped_at_every_await_point() {
    let mut dropped = 0;
    for case in cases::all() {
        let sweep = cancel::sweep(&third_party(), &format(), &case, 0);
        let verdict = sweep.verdict();
        assert!(
            matches!(verdict, Verdict::Passed | Verdict::NotCovered(_)),
            "{}: {verdict:?}",
            case.name
        );
        dropped += sweep.dropped;
    }
    assert!(dropped > 500, "only {dropped} await points: inconclusive");
}

#[test]
fn every_case_about_the_gate_fails_when_there_is_none() {
    for case in cases::all().into_iter().filter(|case| case.gate) {
        let about_the_gate = case.name.contains("-waits-for-")
            || case.name.contains("while-discard-waits")
            || case.name.contains("never-covers-newer-write");
        if !about_the_gate {
            continue;
        }
        let name = case.name.clone();
        let verdict = run(&third_party(), &format(), &case.without_gate(), 0, None).verdict;
        assert!(
            matches!(verdict, Verdict::Failed(_) | Verdict::NotCovered(_)),
            "{name}: {verdict:?}"
        );
    }
}
