//! Each copy fails, and a failure says in words which duty it forgot. The copy that forgets nothing passes.

use std::collections::BTreeMap;

use block_core::{DriverFactory, Registry};
use iotests::{
    basic,
    case::{FormatUnderTest, Group, Verdict, run},
    cases,
    duties::{self, Duty},
};

mod list {
    include!("../copies.rs");
}

/// What fails, by case.
fn failures(factory: impl DriverFactory) -> BTreeMap<String, String> {
    let registry = Registry::new().with(factory);
    let format = FormatUnderTest::new("ledger")
        .with("cluster_size", 4096)
        .with_safeguards();
    let mut failures = BTreeMap::new();
    // The cases that are about one duty, and those that are older than they are. The others are many, and no help here.
    let cases = duties::all().into_iter().chain(basic::all());
    for case in cases.chain(cases::all()) {
        // What depends on the schedule, or on what a power cut spares, is tried twice.
        let lucky = matches!(case.group, Group::Crash | Group::Race);
        for seed in 0..if lucky { 2 } else { 1 } {
            if let Verdict::Failed(text) = run(&registry, &format, &case, seed, None).verdict {
                failures.insert(case.name.clone(), text);
                break;
            }
        }
    }
    failures
}

fn duties_named(failures: &BTreeMap<String, String>) -> Vec<Duty> {
    let named = |duty: &Duty| {
        let words = format!("duty: {} ", duty.sentence());
        failures.values().any(|text| text.contains(&words))
    };
    Duty::ALL.into_iter().filter(named).collect()
}

fn is_named(module: &str, factory: impl DriverFactory) {
    let copy = list::COPIES.iter().find(|copy| copy.module == module);
    let copy = copy.expect("the copy is in the list");
    let failures = failures(factory);
    println!(
        "{module}: {} edits, {} cases fail",
        copy.edits.len(),
        failures.len()
    );
    for (case, text) in &failures {
        println!("  {case}: {text}");
    }
    let named = duties_named(&failures);
    let named: Vec<_> = named.iter().map(|duty| duty.sentence()).collect();
    // Its duty and no other: a message that names three is no help.
    assert_eq!(
        named,
        copy.duty.as_slice(),
        "{module} forgot {:?}",
        copy.duty
    );
    assert_eq!(failures.is_empty(), copy.duty.is_none(), "{module}");
}

macro_rules! each_is_named {
    ($($module:ident),* $(,)?) => {
        $(
            #[test]
            fn $module() {
                is_named(stringify!($module), forgotten_duties::$module::LedgerFactory);
            }
        )*

        #[test]
        fn every_copy_in_the_list_is_tested() {
            let tested = [$(stringify!($module)),*];
            for copy in list::COPIES {
                assert!(tested.contains(&copy.module), "{} isn't", copy.module);
            }
        }
    };
}

each_is_named!(
    forgets_nothing,
    never_pins,
    frees_in_spite_of_pins,
    frees_before_it_has_punched,
    links_before_it_writes,
    writes_links_before_owners,
    has_no_first_barrier,
    reuses_what_is_linked_on_disk,
    keeps_its_children,
    lets_the_backing_file_come_back,
    only_says_that_it_discards,
    fills_nothing_in,
    claims_nothing,
    only_says_that_it_flushes,
);
