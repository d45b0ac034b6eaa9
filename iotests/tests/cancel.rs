//! Every deterministic race on qcow2 again, with each request dropped at every await point.

use block_core::Registry;
use format_qcow2::Qcow2Factory;
use iotests::{
    cancel,
    case::{FormatUnderTest, Verdict},
    cases,
};

fn sweep(seed: u64) {
    let registry = Registry::new().with(Qcow2Factory::default());
    let format = FormatUnderTest::new("qcow2")
        .with("cluster_size", "4k")
        .with_safeguards();
    let mut dropped = 0;
    let mut failures = Vec::new();
    for case in cases::all() {
        let sweep = cancel::sweep(&registry, &format, &case, seed);
        match sweep.verdict() {
            Verdict::Passed => dropped += sweep.dropped,
            Verdict::NotCovered(why) => println!("{}: not covered: {why}", case.name),
            other => failures.push(format!("{}: {other:?}", case.name)),
        }
    }
    println!("{dropped} await points");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(dropped > 1000, "only {dropped} await points: inconclusive");
}

#[test]
fn qcow2_survives_every_request_dropped_at_every_await_point() {
    sweep(0);
}
