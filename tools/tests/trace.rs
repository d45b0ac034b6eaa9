//! `--trace`: what a program asked of an image is on record, and runs again under the simulator.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    io::Write,
    process::{Command, Stdio},
};

use block_core::{Options, Registry};
use iotests::{
    race::commands::{Layout, script},
    trace::{Replay, Trace, replay},
};

const CLUSTER: u64 = 65536;

fn blk() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blk"));
    command.stdout(Stdio::null());
    command
}

#[test]
fn a_storm_through_blk_io_is_recorded_whole_and_replays_clean_under_several_schedules() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (image, trace) = (path("a.qcow2"), path("a.trace"));
    let layout = Layout {
        cluster: CLUSTER,
        region: 8,
        victims: 4,
        fresh: 16,
    };
    let size = layout.size().to_string();
    let created = blk()
        .args(["create", "-q", "-f", "qcow2", &image, &size])
        .status();
    assert!(created.unwrap().success());
    let mut io = blk()
        .args([
            "io", "--trace", &trace, "-f", "qcow2", "-d", "unmap", &image,
        ])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let commands = script(5, 400, layout);
    io.stdin
        .take()
        .unwrap()
        .write_all(commands.as_bytes())
        .unwrap();
    assert!(io.wait().unwrap().success());

    let recorded = Trace::decode(&std::fs::read(&trace).unwrap()).unwrap();
    assert_eq!(recorded.cut_off, 0);
    let nodes = recorded.nodes();
    assert_eq!(
        (nodes[0].1.driver.as_str(), nodes[0].1.cluster_size),
        ("qcow2", CLUSTER)
    );
    assert!(nodes[0].2 >= 400, "{} requests", nodes[0].2);
    let registry = Registry::new().with(format_qcow2::Qcow2Factory::default());
    for seed in 0..3 {
        let how = Replay {
            node: None,
            format: None,
            create: Options::new(),
            image: None,
            seed,
            gate: true,
            ask_qemu: seed == 0,
        };
        let replayed = replay(&registry, &recorded, &how).unwrap();
        assert_eq!(replayed.wrong, Vec::<String>::new(), "seed {seed}");
        assert_eq!(
            (replayed.first_failure, replayed.requests),
            (None, nodes[0].2)
        );
    }
}

#[test]
fn a_trace_that_can_not_be_written_fails_the_command_and_names_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("a.raw");
    std::fs::write(&image, [0; 4096]).unwrap();
    for (file, says) in [("/nonexistent/t", "create"), ("/dev/full", "write")] {
        let output = blk()
            .args(["io", "--trace", file, "-f", "raw", "-c", "read 0 512"])
            .arg(&image)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(
            text.contains(&format!("Could not {says} '{file}'")),
            "{text}"
        );
    }
}
