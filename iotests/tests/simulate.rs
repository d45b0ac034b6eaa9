//! The simulator: a seed is one world and replays identically; good drivers pass; a driver without gate and safeguards is
//! caught, and what catches it can be made small.

use block_core::{Options, Registry};
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use format_vmdk::VmdkFactory;
use iotests::{
    memdriver::ThirdPartyFactory,
    simulate::{
        Campaign, FailureKind, How, Outcome, Profile, Saved, Totals, generate, minimise, profile,
        run,
        scenario::{
            Fault, FaultKind, FaultOp, Layer, Phase, Queue, Scenario, Step, StepKind, Where,
        },
    },
};

fn registry() -> Registry {
    Registry::new()
        .with(RawFactory)
        .with(Qcow2Factory::default())
        .with(VmdkFactory)
        .with(ThirdPartyFactory)
}

fn without_safeguards() -> Registry {
    registry().with(Qcow2Factory::without_safeguards_for_tests())
}

fn profile_of(format: &str) -> Profile {
    profile(&registry(), format, &Options::new()).unwrap()
}

fn campaign(registry: &Registry, format: &str, seeds: u64, gate: bool, books: bool) -> Totals {
    let campaign = Campaign {
        seeds: 0..seeds,
        threads: 1,
        gate,
        books,
        max_failures: 1,
    };
    campaign.run(registry, &profile_of(format), |_, _| ())
}

fn expect_clean(format: &str, seeds: u64) -> Totals {
    let totals = campaign(&registry(), format, seeds, true, true);
    assert!(
        totals.failures.is_empty(),
        "{format}: {:?}",
        totals.failures
    );
    totals
}

/// The first seed that fails without gate and safeguards, and how.
fn first_failure(books: bool) -> (u64, FailureKind) {
    let totals = campaign(&without_safeguards(), "qcow2", 12, false, books);
    let (seed, failure) = totals.failures.first().expect("nothing was found");
    (*seed, failure.kind)
}

#[test]
fn a_seed_replays_identically_with_and_without_a_timeline() {
    let profile = profile_of("qcow2");
    let registry = registry();
    let key = |outcome: &Outcome| (outcome.hash, outcome.polls, outcome.counters.clone());
    for seed in [3, 8, 41] {
        let scenario = generate(&profile, seed);
        assert_eq!(scenario, generate(&profile, seed));
        let first = run(&registry, &scenario, &How::seed(seed));
        let again = run(&registry, &scenario, &How::seed(seed).with_timeline());
        assert_eq!(key(&first), key(&again), "seed {seed}");
        assert!(first.events.is_empty() && !again.events.is_empty());
    }
    let hashes: Vec<u64> = (0..4)
        .map(|seed| run(&registry, &generate(&profile, seed), &How::seed(seed)).hash)
        .collect();
    assert!(hashes.windows(2).all(|pair| pair[0] != pair[1]));
}

#[test]
fn qcow2_passes_and_its_books_are_kept() {
    let totals = expect_clean("qcow2", 40);
    for name in [
        "images-with-books",
        "gate-waits",
        "frees-deferred-by-pins",
        "power-cuts",
        "evictions",
        "images-with-data_file",
        "images-with-encrypt.format",
        "images-with-extended_l2",
        "snapshots-compared",
    ] {
        assert!(totals.counter(name) > 0, "{name}: {:?}", totals.counters);
    }
    let requests = totals.counter("requests") / totals.seeds;
    assert!(requests >= 180, "{requests} requests per seed");
}

#[test]
fn raw_vmdk_and_a_third_partys_driver_pass() {
    expect_clean("raw", 25);
    expect_clean("vmdk", 25);
    let totals = expect_clean("thirdparty", 25);
    assert!(totals.counter("images-with-books") > 0);
}

/// A disk that is made larger, written to beyond its old end, and cut off from power after so many requests.
fn growth_with_a_cut(format: &str, at: u64) -> Scenario {
    let step = |kind, offset, len| Step {
        kind,
        offset,
        len,
        fua: false,
        dropped: None,
    };
    let steps = vec![
        step(StepKind::Write, 0, 4096),
        step(StepKind::Resize, 128 << 10, 0),
        step(StepKind::Write, 96 << 10, 16 << 10),
        step(StepKind::Flush, 0, 0),
    ];
    Scenario {
        format: format.to_owned(),
        layers: vec![Layer {
            size: 64 << 10,
            options: Vec::new(),
            fill: Vec::new(),
        }],
        jitter: 0,
        open: Vec::new(),
        phases: vec![Phase {
            queues: vec![Queue { depth: 1, steps }],
            cut: Some(at),
            ..Phase::default()
        }],
    }
}

#[test]
fn a_cut_that_loses_a_raw_disks_growth_may_keep_sectors_that_were_written_beyond_it() {
    for at in 1..8 {
        let scenario = growth_with_a_cut("raw", at);
        for seed in 0..20 {
            let outcome = run(&registry(), &scenario, &How::seed(seed));
            assert_eq!(outcome.failure, None, "cut {at}, seed {seed}");
        }
    }
}

#[test]
fn a_growth_whose_flush_fails_leaves_the_old_length_or_the_new_one() {
    for format in ["qcow2", "raw"] {
        let mut scenario = growth_with_a_cut(format, 0);
        for skip in 0..4 {
            let phase = &mut scenario.phases[0];
            phase.cut = None;
            phase.faults = vec![Fault {
                at: Where::Top,
                op: FaultOp::Flush,
                skip,
                times: 1,
                what: FaultKind::NoSpace,
            }];
            for seed in 0..10 {
                let outcome = run(&registry(), &scenario, &How::seed(seed));
                assert_eq!(outcome.failure, None, "{format}: flush {skip}, seed {seed}");
            }
        }
    }
}

#[test]
fn without_gate_and_safeguards_a_cluster_in_use_is_seen_to_become_allocatable() {
    assert_eq!(first_failure(true).1, FailureKind::Invariant);
}

#[test]
fn without_gate_and_safeguards_content_or_check_show_the_corruption_by_themselves() {
    let (_, kind) = first_failure(false);
    assert!(
        matches!(kind, FailureKind::Content | FailureKind::Check),
        "{kind:?}"
    );
}

#[test]
fn with_safeguards_alone_no_other_range_is_touched_and_no_book_is_broken() {
    let totals = campaign(&registry(), "qcow2", 25, false, true);
    assert!(totals.failures.is_empty(), "{:?}", totals.failures);
}

#[test]
fn a_minimised_failure_is_small_and_fails_again_from_its_file() {
    let registry = without_safeguards();
    let (seed, kind) = first_failure(true);
    let scenario = generate(&profile_of("qcow2"), seed);
    let how = How::seed(seed).without_gate(true);
    let saved = minimise(&registry, &scenario, &how, false, 600).expect("it fails");
    assert_eq!(saved.failure.kind, kind);
    assert!(saved.scenario.requests() <= 6, "{:?}", saved.scenario);
    let text = serde_json::to_string(&saved).unwrap();
    let read: Saved = serde_json::from_str(&text).unwrap();
    assert_eq!(read, saved);
    let (first, again) = (read.replay(&registry, false), read.replay(&registry, true));
    assert_eq!(first.failure.as_ref(), Some(&saved.failure));
    assert_eq!((first.hash, first.polls), (again.hash, again.polls));
    let timeline = iotests::simulate::timeline::print(&again.events, 1000);
    assert!(
        timeline.contains("FAILURE") && timeline.contains("queue"),
        "{timeline}"
    );
}

#[test]
fn a_failure_of_another_kind_is_not_taken_for_the_same() {
    let registry = without_safeguards();
    let (seed, kind) = first_failure(false);
    let scenario = generate(&profile_of("qcow2"), seed);
    let mut how = How::seed(seed).without_gate(true);
    how.books = false;
    let saved = minimise(&registry, &scenario, &how, false, 300).expect("it fails");
    assert_eq!(saved.failure.kind, kind);
}
