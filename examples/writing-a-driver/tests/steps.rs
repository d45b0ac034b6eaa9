//! What the suite says of each step: which cases pass, which aren't covered and why, and which fail.

use std::{collections::BTreeMap, sync::OnceLock};

use block_core::{DriverFactory, Registry};
use format_ledger::LedgerFactory;
use iotests::{
    basic,
    case::{FormatUnderTest, Group, Verdict, run},
    cases,
    duties::{self, Duty},
};
use writing_a_driver::{Factory, step1, step2, step3, step4, step5};

type Verdicts = BTreeMap<String, Verdict>;

/// The first verdict of each case that isn't "passed".
fn verdicts(factory: impl DriverFactory, claims_safeguards: bool) -> Verdicts {
    let name = factory.name();
    let has_clusters = factory
        .create_options()
        .iter()
        .any(|option| option.name == "cluster_size");
    let registry = Registry::new().with(factory);
    let mut format = FormatUnderTest::new(name);
    if has_clusters {
        format = format.with("cluster_size", 4096);
    }
    format.safeguards = claims_safeguards;
    let mut verdicts = Verdicts::new();
    // The larger part of the suite is for the finished driver alone, in its own crate.
    let cases = duties::all().into_iter().chain(basic::all());
    for case in cases.chain(cases::all()) {
        let mut verdict = Verdict::Passed;
        // What depends on the schedule, or on what a power cut spares, is tried twice.
        let lucky = matches!(case.group, Group::Crash | Group::Race);
        for seed in 0..if lucky { 2 } else { 1 } {
            if verdict == Verdict::Passed {
                verdict = run(&registry, &format, &case, seed, None).verdict;
            }
        }
        verdicts.insert(case.name.clone(), verdict);
    }
    verdicts
}

/// The verdicts on a step; each is tested once.
fn step(number: usize) -> &'static Verdicts {
    static STEPS: [OnceLock<Verdicts>; 6] = [const { OnceLock::new() }; 6];
    STEPS[number - 1].get_or_init(|| match number {
        1 => verdicts(step1::Factory, false),
        2 => verdicts(step2::Factory, false),
        3 => verdicts(Factory::<step3::Driver>::default(), false),
        4 => verdicts(Factory::<step4::Driver>::default(), false),
        // From here on it claims safeguards: it is tested without the gate, and by power cuts.
        5 => verdicts(Factory::<step5::Driver>::default(), true),
        _ => verdicts(LedgerFactory, true),
    })
}

/// Those cases pass; those aren't covered, for a reason with these words; those, and no others, fail and name the duty.
fn expect(verdicts: &Verdicts, pass: &[&str], not_covered: &[(&str, &str)], fail: &[(&str, Duty)]) {
    for case in pass {
        assert_eq!(verdicts[*case], Verdict::Passed, "{case}");
    }
    for (case, words) in not_covered {
        let verdict = &verdicts[*case];
        let says = matches!(verdict, Verdict::NotCovered(why) if why.contains(words));
        assert!(says, "{case}: {verdict:?}");
    }
    for (case, duty) in fail {
        let verdict = &verdicts[*case];
        let words = format!("duty: {} ", duty.sentence());
        let says = matches!(verdict, Verdict::Failed(text) if text.contains(&words));
        assert!(says, "{case}: {verdict:?}");
    }
    for (case, verdict) in verdicts {
        let good = matches!(verdict, Verdict::Passed | Verdict::NotCovered(_));
        let known = fail.iter().any(|(name, _)| name == case);
        assert!(good || known, "{case}: {verdict:?}");
    }
}

#[test]
fn step_1_can_be_made_and_opened_and_nothing_else_counts_as_passed() {
    let verdicts = step(1);
    expect(
        verdicts,
        &["rw-new-image-reads-as-zeroes"],
        &[
            ("rw-random-requests-on-512-byte-storage", "can't write"),
            ("rw-flushed-data-survives-power-cut", "can't write"),
        ],
        &[],
    );
    let passed = verdicts.values().filter(|v| **v == Verdict::Passed);
    assert!(
        passed.count() < 10,
        "a driver that can't write passes a lot"
    );
}

#[test]
fn step_2_reads_and_writes() {
    expect(
        step(2),
        &[
            "rw-random-requests-on-1-byte-storage",
            "rw-random-requests-on-4096-byte-storage",
            "rw-flushed-data-survives-power-cut",
            "rw-read-only-image-refuses-writes",
        ],
        &[
            (
                "backing-partial-write-keeps-what-surrounds-it",
                "no backing files",
            ),
            ("race-discard-waits-for-read", "no discard"),
        ],
        &[],
    );
}

#[test]
fn step_3_allocates_clusters() {
    expect(
        step(3),
        &[
            "race-one-place-for-two-writes-to-unallocated-cluster",
            "race-two-partial-writes-to-unallocated-cluster-both-survive",
            "status-of-unallocated-cluster",
        ],
        &[(
            "backing-partial-write-keeps-what-surrounds-it",
            "no backing files",
        )],
        &[],
    );
}

#[test]
fn step_4_copies_from_a_backing_file() {
    expect(
        step(4),
        &[
            "backing-partial-write-keeps-what-surrounds-it",
            "graph-new-backing-file-is-read-at-once",
            "race-one-place-for-two-writes-to-shared-cluster",
            "status-of-shared-cluster",
        ],
        &[("backing-discard-reads-as-declared", "no discard")],
        &[],
    );
}

#[test]
fn step_5_frees_clusters_and_loses_data_in_a_power_cut() {
    expect(
        step(5),
        &[
            "backing-discard-reads-as-declared",
            "race-late-punch-spares-recycled-cluster",
            "race-old-write-spares-recycled-cluster-without-gate",
            "race-read-never-sees-recycled-cluster-without-gate",
        ],
        &[("rw-grown-part-reads-as-zeroes", "no truncate")],
        &[
            ("crash-power-cut-at-every-request", Duty::DataBeforeLink),
            (
                "crash-power-cut-at-every-request-over-backing",
                Duty::DataBeforeLink,
            ),
        ],
    );
}

#[test]
fn step_6_passes_everything() {
    expect(
        step(6),
        &[
            "crash-power-cut-at-every-request",
            "crash-power-cut-at-every-request-over-backing",
            "rw-grown-part-reads-as-zeroes",
        ],
        &[("status-of-compressed-cluster", "no compressed")],
        &[],
    );
}

#[test]
fn each_step_passes_what_the_one_before_it_passed() {
    let passed = |number| -> Vec<&str> {
        let passed = step(number)
            .iter()
            .filter(|(_, verdict)| **verdict == Verdict::Passed);
        passed.map(|(case, _)| case.as_str()).collect()
    };
    let mut before = passed(1);
    for number in 2..=6 {
        let now = passed(number);
        println!("step {number}: {} cases pass", now.len());
        for case in &before {
            assert!(
                now.contains(case),
                "step {number} doesn't pass {case} any more"
            );
        }
        before = now;
    }
}
