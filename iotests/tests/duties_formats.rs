//! The formats of this project do what the contract leaves to a driver; and the list of duties is one that can be read.

mod common;

use std::collections::BTreeSet;

use block_core::Registry;
use common::{expect_passed, third_party};
use iotests::{
    case::FormatUnderTest,
    duties::{self, Duty},
    memdriver,
};

#[test]
fn qcow2_forgets_no_duty() {
    let registry = Registry::new().with(format_qcow2::Qcow2Factory::default());
    let format = FormatUnderTest::new("qcow2")
        .with("cluster_size", 4096)
        .with_safeguards();
    expect_passed(&registry, &format, &duties::all(), 3);
}

#[test]
fn vmdk_forgets_no_duty() {
    let registry = Registry::new().with(format_vmdk::VmdkFactory);
    let format = FormatUnderTest::new("vmdk").with_safeguards();
    expect_passed(&registry, &format, &duties::all(), 1);
}

#[test]
fn a_third_partys_driver_without_safeguards_forgets_no_duty_that_it_claims() {
    let format = FormatUnderTest::new(memdriver::NAME).with("cluster_size", 4096);
    expect_passed(&third_party(), &format, &duties::all(), 3);
}

#[test]
fn every_duty_has_a_sentence_of_its_own_that_a_failure_repeats() {
    let sentences: BTreeSet<_> = Duty::ALL.iter().map(|duty| duty.sentence()).collect();
    assert_eq!(sentences.len(), Duty::ALL.len());
    for duty in Duty::ALL {
        let text = duty.explain("seen");
        assert!(text.starts_with("seen\n") && text.contains(duty.sentence()));
        assert_eq!(Duty::Pin.explain(&text), text, "the first duty named stays");
    }
}
