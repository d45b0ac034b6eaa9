//! Races between a guest and a real job on qcow2, and a write in place against a snapshot on the third party's driver:
//! under several schedules, and with each of the guest's requests dropped at each of its await points.

mod common;

use block_core::Registry;
use common::{expect_passed, third_party};
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use iotests::{
    cancel,
    case::{Case, FormatUnderTest, Verdict, run},
    cases::{shared, with_jobs},
    memdriver,
};

fn qcow2() -> Registry {
    Registry::new().with(Qcow2Factory::default())
}

fn format() -> FormatUnderTest {
    FormatUnderTest::new("qcow2")
        .with("cluster_size", "4k")
        .with_safeguards()
}

fn sweep(registry: &Registry, format: &FormatUnderTest, cases: &[Case], at_least: usize) {
    let mut dropped = 0;
    let mut failures = Vec::new();
    for case in cases {
        let sweep = cancel::sweep(registry, format, case, 0);
        match sweep.verdict() {
            Verdict::Passed => dropped += sweep.dropped,
            other => failures.push(format!("{}: {other:?}", case.name)),
        }
    }
    println!("{} cases, {dropped} await points", cases.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(
        dropped > at_least,
        "only {dropped} await points: inconclusive"
    );
}

#[test]
fn a_guest_and_a_real_job_at_one_cluster_of_qcow2_both_come_to_the_right_end() {
    let cases = with_jobs::cases();
    for case in &cases {
        for seed in 0..4 {
            let verdict = run(&qcow2(), &format(), case, seed, None).verdict;
            assert_eq!(verdict, Verdict::Passed, "{} (seed {seed})", case.name);
        }
    }
    println!("{} cases, 4 schedules each", cases.len());
}

#[test]
fn on_raw_a_guest_and_a_real_job_at_one_range_both_come_to_the_right_end() {
    let registry = Registry::new().with(RawFactory);
    expect_passed(
        &registry,
        &FormatUnderTest::new("raw"),
        &with_jobs::cases(),
        2,
    );
}

#[test]
fn a_guests_request_beside_a_job_may_be_dropped_at_every_await_point() {
    sweep(&qcow2(), &format(), &with_jobs::cases(), 200);
}

#[test]
fn a_write_in_place_survives_a_snapshot_and_the_copy_of_its_cluster() {
    let format = FormatUnderTest::new(memdriver::NAME).with("cluster_size", 4096);
    expect_passed(&third_party(), &format, &shared::cases(), 6);
    sweep(&third_party(), &format, &shared::cases(), 5);
}

#[test]
fn without_the_gate_a_write_in_place_is_lost_to_the_copy_of_its_cluster() {
    let format = FormatUnderTest::new(memdriver::NAME).with("cluster_size", 4096);
    for case in shared::cases() {
        let verdict = run(&third_party(), &format, &case.without_gate(), 0, None).verdict;
        println!("{verdict:?}");
        assert!(
            matches!(&verdict, Verdict::Failed(text) if text.contains("write in place was lost")),
            "{verdict:?}"
        );
    }
}
