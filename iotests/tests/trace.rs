//! Traces: recorded from a node in use, and run again.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use block_core::{Options, Registry, RequestFlags, env::Environment};
use format_qcow2::Qcow2Factory;
use iotests::{
    lab::{Guest, Lab, LabOptions, after_discard},
    oracle::Oracle,
    sim::Order,
    trace::{Event, Recorder, Replay, Trace, replay},
};
use parking_lot::Mutex;

const CLUSTER: u64 = 4096;
const SIZE: u64 = 64 * CLUSTER;
const PRODUCERS: u32 = 5;
const EACH: u64 = 60;
const REQUESTS: u64 = PRODUCERS as u64 * EACH;

fn registry() -> Registry {
    Registry::new().with(Qcow2Factory::default())
}

fn bare_registry() -> Registry {
    Registry::new().with(Qcow2Factory::without_safeguards_for_tests())
}

/// A short storm by some producers with a trace of it. `gate` off lets the race happen while it is recorded.
fn recorded(seed: u64, gate: bool, hashes: bool) -> Trace {
    let registry = registry();
    let options = LabOptions {
        seed,
        order: Order::Random,
        gate,
        alignment: 1,
    };
    let lab = Lab::new(&registry, options);
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let out = bytes.clone();
    let env: Arc<dyn Environment> = lab.env.clone();
    let recorder = Recorder::new(&env, hashes, move |piece: Vec<u8>| out.lock().extend(piece));
    lab.env.run(async {
        let create = Options::new().with("cluster_size", CLUSTER);
        lab.create("qcow2", "a", SIZE, &create, None).await.unwrap();
        let node = lab.open("qcow2", "a", None, &Options::new()).await.unwrap();
        lab.disk("a").unwrap().set_jitter(8);
        recorder.attach(&node);
        let oracle = Oracle::new(after_discard(&node));
        let mut running = Vec::new();
        for owner in 1..=PRODUCERS {
            let handle = lab.attach(&node, "guest").unwrap();
            let guest = Guest::new(&handle, &oracle, owner);
            let env = lab.env.clone();
            running.push(lab.env.start(async move {
                let none = RequestFlags::empty();
                for _ in 0..EACH {
                    let at = env.below(8) * CLUSTER;
                    let _ = match env.below(4) {
                        0 => guest.discard(at, CLUSTER).await,
                        1 => guest.zero(at, CLUSTER, RequestFlags::MAY_UNMAP).await,
                        2 => guest.read(at, CLUSTER, none).await.map(|_| ()),
                        _ => guest.write(at, CLUSTER, none).await,
                    };
                }
            }));
        }
        for task in running {
            task.await;
        }
        node.observe(None);
    });
    recorder.finish();
    let bytes = bytes.lock().clone();
    Trace::decode(&bytes).unwrap()
}

fn how(seed: u64) -> Replay {
    Replay {
        node: None,
        format: None,
        create: Options::new(),
        image: None,
        seed,
        gate: true,
        ask_qemu: false,
    }
}

#[test]
fn every_request_is_recorded_with_its_ticket_its_producer_and_its_end() {
    let trace = recorded(1, true, true);
    let nodes = trace.nodes();
    assert_eq!(nodes.len(), 1);
    let (_, info, requests) = &nodes[0];
    assert_eq!((info.driver.as_str(), info.length), ("qcow2", SIZE));
    assert_eq!((info.cluster_size, *requests), (CLUSTER, REQUESTS));
    let mut open = std::collections::BTreeSet::new();
    let mut producers = std::collections::BTreeSet::new();
    let mut waited = 0;
    for record in &trace.records {
        match &record.event {
            Event::Node(_) => {}
            Event::Arrived {
                kind,
                producer,
                waits,
                hash,
                ..
            } => {
                assert!(open.insert(record.ticket), "a ticket is used once");
                producers.insert(*producer);
                waited += u64::from(*waits);
                let writes = *kind == block_core::tracked::RequestKind::Write;
                assert_eq!(hash.is_some(), writes);
            }
            Event::Admitted => assert!(open.contains(&record.ticket)),
            Event::Ended { ok } => {
                assert!(ok);
                assert!(open.remove(&record.ticket));
            }
        }
    }
    assert!(open.is_empty());
    assert_eq!(producers.len(), PRODUCERS as usize);
    assert!(waited > 0, "nothing met at the gate");
}

#[test]
fn a_trace_replays_clean_under_any_schedule_and_identically_under_the_same() {
    let trace = recorded(2, true, false);
    let registry = registry();
    for seed in 0..20 {
        let replayed = replay(&registry, &trace, &how(seed)).unwrap();
        assert_eq!(replayed.wrong, Vec::<String>::new(), "seed {seed}");
        assert_eq!(
            (replayed.requests, replayed.producers),
            (REQUESTS, u64::from(PRODUCERS))
        );
        assert_eq!(replayed.first_failure, None);
        assert_eq!(replayed, replay(&registry, &trace, &how(seed)).unwrap());
    }
}

#[test]
fn a_trace_of_a_race_corrupts_a_driver_without_gate_and_safeguards_and_no_other() {
    let trace = recorded(3, true, false);
    let bare = bare_registry();
    let without = |seed| Replay {
        gate: false,
        ..how(seed)
    };
    let found = (0..50).find(|seed| {
        let replayed = replay(&bare, &trace, &without(*seed)).unwrap();
        !replayed.wrong.is_empty()
    });
    let seed = found.expect("some schedule shows the race");
    let behind_the_gate = replay(&bare, &trace, &how(seed)).unwrap();
    assert_eq!(behind_the_gate.wrong, Vec::<String>::new());
}

#[test]
fn a_node_that_is_not_in_the_trace_is_refused_with_those_that_are() {
    let trace = recorded(4, true, false);
    let unknown = Replay {
        node: Some("x".into()),
        ..how(0)
    };
    let error = replay(&registry(), &trace, &unknown).unwrap_err();
    assert!(
        error.contains("'x'") && error.contains("300 requests"),
        "{error}"
    );
}
