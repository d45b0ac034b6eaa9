//! The whole suite, against this driver.

use block_core::Registry;
use format_ledger::LedgerFactory;
use iotests::{
    all_cases, cancel,
    case::{FormatUnderTest, Group, Verdict, run},
    race::{StormConfig, storm},
};

/// The smallest clusters: more of them per test. The driver has safeguards of its own, so it is tested without the gate too.
fn under_test() -> (Registry, FormatUnderTest) {
    let format = FormatUnderTest::new(format_ledger::NAME)
        .with("cluster_size", 4096)
        .with_safeguards();
    (Registry::new().with(LedgerFactory), format)
}

#[test]
fn every_case_passes_or_is_about_something_that_the_driver_does_not_declare() {
    let (registry, format) = under_test();
    let mut covered = 0;
    for case in all_cases() {
        for seed in 0..4 {
            // Schedules for most cases; for those about cancellation, every await point of one schedule.
            let sweep = case.group == Group::Cancel;
            let verdict = if sweep {
                cancel::sweep(&registry, &format, &case, 0).verdict()
            } else {
                run(&registry, &format, &case, seed, None).verdict
            };
            match verdict {
                Verdict::Passed => covered += u64::from(seed == 0),
                Verdict::NotCovered(why) => println!("{} isn't covered: {why}", case.name),
                other => panic!("{} (seed {seed}): {}", case.name, other.detail()),
            }
            if sweep {
                break;
            }
        }
    }
    assert!(covered > 100, "only {covered} cases apply");
}

#[test]
fn storms_leave_it_clean_with_the_gate_and_without_also_when_the_power_is_cut() {
    let (registry, format) = under_test();
    for seed in 1..4 {
        let mut config = StormConfig::new(seed, 8);
        config.commands = 2000;
        let without = storm(&registry, &format, &config.clone().without_gate());
        assert!(
            without.is_clean(),
            "no gate, seed {seed}: {}",
            without.summary()
        );
        config.power_cuts = 3;
        config.drop_percent = 10;
        let with = storm(&registry, &format, &config);
        assert!(with.is_clean(), "seed {seed}: {}", with.summary());
        assert!(with.counter("gate-waits") > 0, "nobody waited");
    }
}
