//! Storms in which requests are dropped on the way, and storms in which the power is cut.

mod common;

use block_core::Registry;
use common::third_party;
use format_qcow2::Qcow2Factory;
use iotests::{
    case::FormatUnderTest,
    memdriver,
    race::{StormConfig, storm},
};

fn qcow2(cluster: &str) -> (Registry, FormatUnderTest) {
    let registry = Registry::new().with(Qcow2Factory::default());
    (
        registry,
        FormatUnderTest::new("qcow2").with("cluster_size", cluster),
    )
}

fn dropped_requests(registry: &Registry, format: &FormatUnderTest, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let config = StormConfig {
            commands: 3000,
            ..StormConfig::new(seed, 16).with_drops(25)
        };
        let report = storm(registry, format, &config);
        assert!(report.is_clean(), "seed {seed}: {}", report.summary());
        assert!(
            report.counter("gate-waits") > 0,
            "nobody waited: inconclusive"
        );
        assert!(
            report.counter("dropped-at-driver") > 50,
            "hardly a request was dropped at the driver"
        );
    }
}

#[test]
fn qcow2_is_clean_after_storms_in_which_a_quarter_of_the_requests_is_dropped() {
    let (registry, format) = qcow2("4k");
    dropped_requests(&registry, &format, 1..5);
}

#[test]
fn a_third_partys_driver_is_clean_after_storms_in_which_a_quarter_of_the_requests_is_dropped() {
    let format = FormatUnderTest::new(memdriver::NAME).with("cluster_size", 4096);
    dropped_requests(&third_party(), &format, 1..5);
}

#[test]
fn qcow2_loses_nothing_that_was_flushed_and_is_never_corrupt_after_a_power_cut_in_a_storm() {
    let (registry, format) = qcow2("4k");
    for seed in 1..5 {
        let config = StormConfig {
            commands: 2500,
            ask_qemu: true,
            ..StormConfig::new(seed, 16).with_power_cuts(25)
        };
        let report = storm(&registry, &format, &config);
        assert!(report.is_clean(), "seed {seed}: {}", report.summary());
        assert!(
            report.counter("power-cuts") >= 25,
            "the power wasn't cut: inconclusive"
        );
    }
}
