//! The deterministic races on qcow2, under several schedules and cluster sizes.

mod common;

use block_core::Registry;
use common::expect_passed;
use format_qcow2::Qcow2Factory;
use iotests::{case::FormatUnderTest, cases};

fn registry() -> Registry {
    Registry::new().with(Qcow2Factory::default())
}

fn format(cluster: &str) -> FormatUnderTest {
    FormatUnderTest::new("qcow2")
        .with("cluster_size", cluster)
        .with_safeguards()
}

#[test]
fn qcow2_passes_the_race_cases() {
    expect_passed(&registry(), &format("4k"), &cases::all(), 6);
}

#[test]
fn qcow2_passes_the_race_cases_with_large_clusters() {
    expect_passed(&registry(), &format("64k"), &cases::all(), 1);
}

#[test]
fn qcow2_version_2_passes_the_race_cases() {
    expect_passed(
        &registry(),
        &format("4k").with("compat", "0.10"),
        &cases::all(),
        2,
    );
}
