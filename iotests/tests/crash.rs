//! Sweeps of power cuts find a driver that isn't crash-safe, and leave those alone that are.

use block_core::Registry;
use format_qcow2::Qcow2Factory;
use iotests::{
    case::{FormatUnderTest, Verdict, run},
    crash,
    memdriver::{self, ThirdPartyFactory},
};

#[test]
fn a_driver_that_only_claims_to_survive_power_cuts_is_found_out() {
    // Its whole table is written at each flush, in place, with no barrier between data and table.
    let claims = FormatUnderTest::new(memdriver::NAME).with("cluster_size", 4096);
    let registry = Registry::new().with(ThirdPartyFactory);
    let failed: Vec<String> = crash::cases()
        .iter()
        .flat_map(|case| (0..3).map(move |seed| (case, seed)))
        .filter_map(
            |(case, seed)| match run(&registry, &claims, case, seed, None).verdict {
                Verdict::Failed(text) => Some(format!("{}: {text}", case.name)),
                _ => None,
            },
        )
        .collect();
    println!("{}", failed.join("\n"));
    assert!(
        failed
            .iter()
            .any(|text| text.contains("power cut after storage write"))
    );
}

#[test]
fn a_driver_that_claims_nothing_is_not_covered() {
    let modest = FormatUnderTest::new(memdriver::NAME).without_crash_safety();
    let registry = Registry::new().with(ThirdPartyFactory);
    for case in crash::cases() {
        let verdict = run(&registry, &modest, &case, 0, None).verdict;
        assert!(matches!(verdict, Verdict::NotCovered(_)), "{verdict:?}");
    }
}

#[test]
fn every_class_of_qcow2_image_survives_a_power_cut_at_any_storage_write() {
    let registry = Registry::new().with(Qcow2Factory::default());
    for options in [
        "cluster_size=4k",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,lazy_refcounts=on",
    ] {
        let mut format = FormatUnderTest::new("qcow2");
        format.create = block_core::Options::from_dotted(options).expect("options");
        for case in crash::cases() {
            let verdict = run(&registry, &format, &case, 5, None).verdict;
            assert_eq!(verdict, Verdict::Passed, "{}: {options}", case.name);
        }
    }
}
