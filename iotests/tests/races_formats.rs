//! The deterministic races on the formats other than qcow2.

mod common;

use block_core::Registry;
use common::expect_passed;
use format_raw::RawFactory;
use format_vmdk::VmdkFactory;
use iotests::{
    case::FormatUnderTest,
    cases,
    race::{StormConfig, storm},
};

fn registry() -> Registry {
    Registry::new().with(RawFactory).with(VmdkFactory)
}

#[test]
fn raw_passes_the_race_cases() {
    expect_passed(&registry(), &FormatUnderTest::new("raw"), &cases::all(), 4);
}

#[test]
fn vmdk_passes_the_race_cases() {
    let format = FormatUnderTest::new("vmdk").with_safeguards();
    expect_passed(&registry(), &format, &cases::all(), 2);
}

#[test]
fn raw_and_vmdk_are_clean_after_storms() {
    for (name, commands) in [("raw", 5000), ("vmdk", 1500)] {
        for seed in 1..3 {
            let config = StormConfig {
                commands,
                ask_qemu: true,
                ..StormConfig::new(seed, 8)
            };
            let report = storm(&registry(), &FormatUnderTest::new(name), &config);
            assert!(
                report.is_clean(),
                "{name}, seed {seed}: {}",
                report.summary()
            );
            assert!(
                report.counter("gate-waits") > 0,
                "nobody waited: inconclusive"
            );
        }
    }
}
