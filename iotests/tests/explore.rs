//! Exploration of small scenarios: clean with the gate, and able to see what happens without.

use std::sync::Arc;

use block_core::Registry;
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use iotests::{
    case::FormatUnderTest,
    explore::{Limits, Prepared, Report, Small, Start, catalogue, explore},
    memdriver::{self, ThirdPartyFactory},
};

fn registry() -> Registry {
    Registry::new()
        .with(Qcow2Factory::default())
        .with(RawFactory)
        .with(ThirdPartyFactory)
}

fn bare() -> Registry {
    registry().with(Qcow2Factory::without_safeguards_for_tests())
}

fn qcow2() -> FormatUnderTest {
    FormatUnderTest::new("qcow2").with("cluster_size", "4k")
}

fn third_party() -> FormatUnderTest {
    FormatUnderTest::new(memdriver::NAME).with("cluster_size", "4k")
}

fn scenario(name: &str) -> Small {
    let found = catalogue().into_iter().find(|small| small.name == name);
    found.unwrap_or_else(|| panic!("no scenario '{name}'"))
}

fn run(registry: &Registry, format: &FormatUnderTest, small: &Small, gate: bool) -> Report {
    match explore(registry, format, small, gate, Limits::bound(1)) {
        Ok(report) => report,
        Err(error) => panic!("{}: {error}", small.name),
    }
}

fn expect_clean(format: &FormatUnderTest) -> Vec<Report> {
    let registry = registry();
    let reports: Vec<Report> = catalogue()
        .iter()
        .map(|small| run(&registry, format, small, true))
        .collect();
    let wrong: Vec<String> = reports
        .iter()
        .filter(|report| !matches!(report.verdict, "passed" | "not-covered"))
        .map(|report| format!("{report:?}"))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for report in &reports {
        println!(
            "{:<34} {:<12} {:>5} run {:>5} distinct {:>4} deep",
            report.scenario, report.verdict, report.executions, report.distinct, report.deepest
        );
    }
    reports
}

#[test]
fn with_the_gate_every_scenario_on_qcow2_is_clean_up_to_one_deviation() {
    let reports = expect_clean(&qcow2());
    assert!(reports.iter().all(|report| report.verdict == "passed"));
    assert!(reports.iter().all(|report| report.bound == Some(1)));
}

#[test]
fn with_the_gate_a_driver_without_safeguards_of_its_own_is_clean_up_to_one_deviation() {
    let reports = expect_clean(&third_party());
    assert!(reports.iter().any(|report| report.verdict == "passed"));
}

#[test]
fn with_the_gate_raw_is_clean_up_to_one_deviation() {
    let reports = expect_clean(&FormatUnderTest::new("raw"));
    assert!(reports.iter().any(|report| report.verdict == "passed"));
}

#[test]
fn without_the_gate_one_deviation_finds_the_race_and_its_schedule_fails_again() {
    let small = scenario("write-data-discard-other");
    for format in [qcow2(), third_party()] {
        let report = run(&bare(), &format, &small, false);
        let Some(found) = report.found else {
            panic!("{}: not found: {report:?}", format.name);
        };
        println!("{}: {} at {:?}", format.name, found.failure, found.schedule);
        let deviations = found.schedule.iter().filter(|choice| **choice != 0).count();
        assert!(deviations <= 1, "{found:?}");
        let Ok(Start::Ready(prepared)) = Prepared::make(&bare(), &format, &small, false) else {
            panic!("{} can't be prepared", format.name);
        };
        let again = Arc::new(*prepared).execute(&found.schedule, true);
        assert_eq!(again.failure, Some(found.failure));
        assert_eq!(again.misfit, None);
        assert!(!again.events.is_empty());
        // The same schedule does no harm where requests wait for each other.
        let with_gate = run(&registry(), &format, &small, true);
        assert_eq!(with_gate.verdict, "passed", "{with_gate:?}");
    }
}

#[test]
fn the_same_exploration_counts_the_same_twice() {
    for name in [
        "write-data-unmap-same",
        "dropped-write-discard",
        "write-flush-power-cut",
    ] {
        let small = scenario(name);
        let first = run(&registry(), &qcow2(), &small, true);
        assert!(first.executions > 5 && first.distinct > 1, "{first:?}");
        assert_eq!(first, run(&registry(), &qcow2(), &small, true));
    }
}

#[test]
fn a_budget_that_runs_out_is_inconclusive_and_says_which_bound_was_reached() {
    let limits = Limits {
        executions: 5,
        ..Limits::bound(1)
    };
    let small = scenario("write-data-unmap-same");
    let report = explore(&registry(), &qcow2(), &small, true, limits);
    let Ok(report) = report else {
        panic!("{report:?}");
    };
    assert_eq!(report.verdict, "inconclusive");
    assert_eq!((report.executions, report.bound), (5, Some(0)));
    assert!(report.detail.contains("budget"), "{report:?}");
}

#[test]
fn a_schedule_of_another_scenario_is_not_taken_for_a_run_of_this_one() {
    let small = scenario("two-writes-new-cluster");
    let Ok(Start::Ready(prepared)) = Prepared::make(&registry(), &qcow2(), &small, true) else {
        panic!("can't be prepared");
    };
    assert_eq!(Arc::new(*prepared).execute(&[9], false).misfit, Some(0));
}
