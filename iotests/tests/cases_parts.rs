//! The suite on images of more than one file, and on encrypted ones: a part of the quick group here, all of it by
//! `iotests run -f qcow2 -o data_file=data` and so on.

mod common;

use block_core::Registry;
use common::expect_passed;
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use iotests::{
    Suite, all_cases,
    case::{Case, FormatUnderTest, Verdict, run},
};

fn registry() -> Registry {
    Registry::new()
        .with(Qcow2Factory::default())
        .with(RawFactory)
}

fn qcow2(options: &str) -> FormatUnderTest {
    let suite = Suite::new(&registry()).with_safeguards(&["qcow2"]);
    suite.format("qcow2", options).unwrap()
}

/// Every so-manieth case of the quick group.
fn each(step: usize) -> Vec<Case> {
    let quick = all_cases().into_iter().filter(|case| case.quick);
    quick.step_by(step).collect()
}

fn case(name: &str) -> Case {
    let mut all = all_cases().into_iter();
    all.find(|case| case.name == name).expect(name)
}

#[test]
fn qcow2_with_data_files_passes_a_part_of_the_quick_group() {
    expect_passed(&registry(), &qcow2("data_file=data"), &each(6), 1);
}

#[test]
fn qcow2_with_raw_data_files_passes_a_part_of_the_quick_group() {
    let format = qcow2("data_file=data,data_file_raw=on");
    expect_passed(&registry(), &format, &each(10), 1);
}

#[test]
fn encrypted_images_pass_a_part_of_the_quick_group_and_the_cases_that_look_for_data_in_the_storage()
{
    let looks = |case: &Case| {
        let name = &case.name;
        [
            "parked-mirror",
            "parked-stream-copy",
            "recycled-cluster",
            "waits-for-read",
        ]
        .iter()
        .any(|part| name.contains(part))
    };
    let others: Vec<Case> = all_cases().into_iter().filter(looks).collect();
    assert!(others.len() > 20, "{}", others.len());
    expect_passed(&registry(), &qcow2("encrypt.format=aes"), &others, 1);
    expect_passed(&registry(), &qcow2("encrypt.format=luks"), &each(40), 1);
}

#[test]
fn a_cut_of_the_power_cuts_an_image_and_its_data_file_at_once() {
    let format = qcow2("data_file=data");
    for name in [
        "crash-power-cut-at-every-request",
        "rw-flushed-data-survives-power-cut",
        "fault-every-request-of-emptying",
    ] {
        expect_passed(&registry(), &format, &[case(name)], 1);
    }
}

#[test]
fn what_an_image_with_a_data_file_cannot_have_is_not_covered_and_the_rest_is() {
    let plain = run(
        &registry(),
        &qcow2(""),
        &case("status-of-compressed-cluster"),
        0,
        None,
    );
    assert_eq!(plain.verdict, Verdict::Passed);
    for (options, name, covered) in [
        ("data_file=data", "status-of-compressed-cluster", false),
        ("data_file=data", "status-of-data-cluster", true),
        ("data_file=data", "status-of-shared-cluster", true),
        (
            "data_file=data,data_file_raw=on",
            "status-of-shared-cluster",
            false,
        ),
        (
            "data_file=data,data_file_raw=on",
            "status-of-data-cluster",
            true,
        ),
        (
            "encrypt.format=luks",
            "graph-node-is-replaced-by-its-copy-under-io",
            true,
        ),
    ] {
        let verdict = run(&registry(), &qcow2(options), &case(name), 0, None).verdict;
        let expected = match &verdict {
            Verdict::Passed => covered,
            Verdict::NotCovered(_) => !covered,
            _ => false,
        };
        assert!(expected, "{options}, {name}: {verdict:?}");
    }
}

#[test]
fn options_are_checked_and_told_as_they_were_given() {
    let format = qcow2("data_file=x,encrypt.format=luks");
    assert!(
        format.label().contains("encrypt.format=luks"),
        "{}",
        format.label()
    );
    let suite = Suite::new(&registry());
    assert!(suite.format("qcow2", "encrypt.nothing=1").is_err());
    let key = "encrypt.format=luks,encrypt.key-secret=mine";
    assert!(suite.format("qcow2", key).is_err());
}
