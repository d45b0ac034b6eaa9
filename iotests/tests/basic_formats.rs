//! The basic cases on every format.

mod common;

use block_core::Registry;
use common::expect_passed;
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use format_vmdk::VmdkFactory;
use iotests::{basic, case::FormatUnderTest};

fn registry() -> Registry {
    Registry::new()
        .with(Qcow2Factory::default())
        .with(RawFactory)
        .with(VmdkFactory)
}

fn passes(format: &FormatUnderTest) {
    expect_passed(&registry(), format, &basic::all(), 2);
}

#[test]
fn raw_passes_the_basic_cases() {
    passes(&FormatUnderTest::new("raw"));
}

#[test]
fn qcow2_passes_the_basic_cases() {
    passes(&FormatUnderTest::new("qcow2").with("cluster_size", "4k"));
}

#[test]
fn qcow2_passes_the_basic_cases_with_512_byte_clusters_and_1_bit_refcounts() {
    passes(
        &FormatUnderTest::new("qcow2")
            .with("cluster_size", 512)
            .with("refcount_bits", 1),
    );
}

#[test]
fn qcow2_passes_the_basic_cases_with_64_bit_refcounts_and_lazy_ones() {
    let format = FormatUnderTest::new("qcow2").with("cluster_size", "8k");
    passes(
        &format
            .with("refcount_bits", 64)
            .with("lazy_refcounts", "on"),
    );
}

#[test]
fn qcow2_version_2_passes_the_basic_cases() {
    passes(
        &FormatUnderTest::new("qcow2")
            .with("cluster_size", "4k")
            .with("compat", "0.10"),
    );
}

#[test]
fn vmdk_passes_the_basic_cases() {
    passes(&FormatUnderTest::new("vmdk"));
}
