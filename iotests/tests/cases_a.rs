//! The request path, status and chains, kinds of clusters, resize, reopen, permissions, drain and graph changes: on every
//! format, and on qcow2 with the options that change its code paths.

mod common;

use block_core::Registry;
use common::{expect_passed, third_party};
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use format_vmdk::VmdkFactory;
use iotests::{
    case::{Case, FormatUnderTest, Verdict, run},
    chain_cases, cluster_cases, graph_cases, life_cases, memdriver, path_cases,
};

fn registry() -> Registry {
    Registry::new()
        .with(Qcow2Factory::default())
        .with(RawFactory)
        .with(VmdkFactory)
}

fn cases() -> Vec<Case> {
    let mut all = path_cases::all();
    all.extend(chain_cases::all());
    all.extend(cluster_cases::all());
    all.extend(life_cases::all());
    all.extend(graph_cases::all());
    all
}

fn qcow2() -> FormatUnderTest {
    FormatUnderTest::new("qcow2").with("cluster_size", "4k")
}

#[test]
fn raw_passes_all_of_them() {
    expect_passed(&registry(), &FormatUnderTest::new("raw"), &cases(), 2);
}

#[test]
fn vmdk_passes_all_of_them() {
    expect_passed(&registry(), &FormatUnderTest::new("vmdk"), &cases(), 1);
}

#[test]
fn a_third_partys_driver_passes_all_of_them() {
    let format = FormatUnderTest::new(memdriver::NAME);
    expect_passed(&third_party(), &format, &cases(), 2);
}

#[test]
fn qcow2_passes_all_of_them_and_is_covered_by_150() {
    let mut covered = 0;
    for case in cases() {
        for seed in 0..2 {
            match run(&registry(), &qcow2(), &case, seed, None).verdict {
                Verdict::Passed => covered += usize::from(seed == 0),
                Verdict::NotCovered(_) => break,
                other => panic!("{} (seed {seed}): {other:?}", case.name),
            }
        }
    }
    assert!(covered >= 150, "only {covered}");
}

#[test]
fn qcow2_passes_all_of_them_with_512_byte_clusters() {
    let format = FormatUnderTest::new("qcow2").with("cluster_size", 512);
    expect_passed(&registry(), &format, &cases(), 1);
}

#[test]
fn qcow2_version_2_passes_all_of_them() {
    expect_passed(&registry(), &qcow2().with("compat", "0.10"), &cases(), 1);
}

#[test]
fn qcow2_passes_all_of_them_with_1_bit_refcounts() {
    expect_passed(&registry(), &qcow2().with("refcount_bits", 1), &cases(), 1);
}

#[test]
fn qcow2_passes_all_of_them_with_64_bit_refcounts_and_lazy_ones() {
    let format = qcow2().with("refcount_bits", 64);
    expect_passed(
        &registry(),
        &format.with("lazy_refcounts", "on"),
        &cases(),
        1,
    );
}

#[test]
fn every_name_is_its_own_and_every_case_says_what_it_proves() {
    let cases = cases();
    let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), cases.len());
    let mut proves: Vec<&str> = cases.iter().map(|case| case.proves.as_str()).collect();
    proves.sort_unstable();
    proves.dedup();
    assert_eq!(proves.len(), cases.len());
}
