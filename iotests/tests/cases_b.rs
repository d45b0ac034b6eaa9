//! The cases about jobs, faults, load, hostile images and the installed tools, on every format.

mod common;

use block_core::Registry;
use common::expect_passed;
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use format_vmdk::VmdkFactory;
use iotests::{
    case::{Case, FormatUnderTest},
    fault_cases, job_cases, memdriver,
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
