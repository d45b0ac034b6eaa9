//! The cases about jobs, faults, load, hostile images and the installed tools, on every format.

mod common;

use block_core::Registry;
use common::expect_passed;
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use format_vmdk::VmdkFactory;
use iotests::{
    cancel,
    case::{Case, FormatUnderTest, Verdict, run},
    concurrent_cases, fault_cases, hostile_cases, interop_cases, job_cases, memdriver,
};

fn registry() -> Registry {
    Registry::new()
        .with(Qcow2Factory::default())
        .with(RawFactory)
        .with(VmdkFactory)
        .with(memdriver::ThirdPartyFactory)
}

fn qcow2() -> FormatUnderTest {
    FormatUnderTest::new("qcow2")
        .with("cluster_size", "4k")
        .with_safeguards()
}

fn formats() -> Vec<FormatUnderTest> {
    vec![
        qcow2(),
        FormatUnderTest::new("raw"),
        FormatUnderTest::new("vmdk").with_safeguards(),
        FormatUnderTest::new(memdriver::NAME).with("cluster_size", 4096),
    ]
}

fn passes(format: &FormatUnderTest, cases: &[Case]) {
    expect_passed(&registry(), format, cases, 2);
}

#[test]
fn qcow2_passes_the_cases_about_jobs() {
    passes(&qcow2(), &job_cases::all());
}

#[test]
fn other_formats_pass_the_cases_about_jobs() {
    for format in &formats()[1..] {
        passes(format, &job_cases::all());
    }
}

#[test]
fn qcow2_passes_the_cases_about_failing_storage() {
    passes(&qcow2(), &fault_cases::all());
}

#[test]
fn other_formats_pass_the_cases_about_failing_storage() {
    for format in &formats()[1..] {
        passes(format, &fault_cases::all());
    }
}

#[test]
fn every_format_passes_the_cases_about_crowds_and_leaks() {
    for format in formats() {
        passes(&format, &concurrent_cases::all());
    }
}

#[test]
fn requests_in_company_may_be_dropped_at_every_await_point_of_qcow2() {
    let mut dropped = 0;
    let mut failures = Vec::new();
    for case in concurrent_cases::worth_dropping() {
        let sweep = cancel::sweep(&registry(), &qcow2(), &case, 0);
        match sweep.verdict() {
            Verdict::Passed => dropped += sweep.dropped,
            other => failures.push(format!("{}: {other:?}", case.name)),
        }
    }
    println!("{dropped} await points");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(dropped > 200, "only {dropped} await points: inconclusive");
}

#[test]
fn damaged_images_of_every_format_harm_nobody() {
    // raw has nothing that could be damaged.
    for format in formats().iter().filter(|format| format.name != "raw") {
        expect_passed(&registry(), format, &hostile_cases::all(), 1);
    }
}

#[test]
fn images_go_back_and_forth_between_every_format_and_the_installed_tools() {
    for format in formats() {
        if format.name != memdriver::NAME {
            passes(&format, &interop_cases::all());
        }
    }
}

/// All cases once, under the schedule that isn't first come first served.
fn geometry_passes(key: &str, value: impl Into<serde_json::Value>) {
    let format = FormatUnderTest::new("qcow2")
        .with(key, value)
        .with_safeguards();
    let format = match key {
        "cluster_size" => format.with("refcount_bits", 1),
        _ => format.with("cluster_size", "4k"),
    };
    let mut failures = Vec::new();
    let all = [
        job_cases::all(),
        fault_cases::all(),
        concurrent_cases::all(),
    ];
    for case in all.iter().flatten() {
        let verdict = run(&registry(), &format, case, 1, None).verdict;
        if !matches!(verdict, Verdict::Passed | Verdict::NotCovered(_)) {
            failures.push(format!("{}: {verdict:?}", case.name));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn qcow2_with_clusters_of_512_bytes_and_refcounts_of_1_bit_passes() {
    geometry_passes("cluster_size", 512);
}

#[test]
fn qcow2_of_version_2_passes() {
    geometry_passes("compat", "0.10");
}

#[test]
fn mirrors_of_a_part_of_a_disk_copy_whole_clusters_of_a_target_that_gets_its_backing_file_later() {
    // Bits of 4 KiB, clusters of 64 KiB.
    let format = FormatUnderTest::new("qcow2").with_safeguards();
    let cases: Vec<Case> = job_cases::all()
        .into_iter()
        .filter(|case| case.name.ends_with("mirror-top-beside-busy-guest"))
        .collect();
    assert_eq!(cases.len(), 2);
    passes(&format, &cases);
}
