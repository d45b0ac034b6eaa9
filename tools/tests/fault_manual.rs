//! The examples of `docs/fault-injection.md`, run as they stand there: commands give the output that the page shows.

use std::{os::unix::process::CommandExt, path::Path, process::Command};

const PAGE: &str = include_str!("../../docs/fault-injection.md");

/// Words of a command line; single quotes hold words together.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            other => words.last_mut().unwrap().push(other),
        }
    }
    words
}

/// Both streams, without times.
fn blk(dir: &Path, args: &[String]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_blk"))
        .arg0("blk")
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8(said)
        .unwrap()
        .lines()
        .filter(|line| !line.contains("ops/sec"))
        .map(|line| format!("{line}\n"))
        .collect()
}

#[test]
fn every_example_of_the_manual_gives_the_output_that_it_shows() {
    let mut examples = 0;
    for block in PAGE.split("```console\n").skip(1) {
        let block = block.split("```").next().unwrap();
        let dir = tempfile::tempdir().unwrap();
        for image in ["create -q -f qcow2 a.qcow2 4M", "create -q -f raw a.raw 1M"] {
            assert_eq!(blk(dir.path(), &words(image)), "");
        }
        for example in block.split("$ blk ").skip(1) {
            let (command, expected) = example.split_once('\n').unwrap();
            assert_eq!(blk(dir.path(), &words(command)), expected, "blk {command}");
            examples += 1;
        }
    }
    assert!(examples > 12, "only {examples} examples were found");
}

#[test]
fn the_manual_lists_every_event() {
    for event in block_core::DebugEvent::ALL {
        assert!(PAGE.contains(&format!("`{event}`")), "{event} is missing");
    }
}
