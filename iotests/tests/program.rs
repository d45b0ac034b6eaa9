//! The program as a person or a CI server uses it: what it prints, and its exit status.

use std::process::{Command, Output};

use serde_json::Value;

fn iotests(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_iotests"))
        .args(arguments)
        .env_remove("IOTESTS_BLK")
        .output()
        .expect("the program starts")
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn status(output: &Output) -> i32 {
    output.status.code().expect("no signal")
}

/// A case that takes next to no time.
const CHEAP: &str = "=rw-grown-part-reads-as-zeroes";

#[test]
fn list_names_each_case_with_its_group_and_the_sentence_that_it_proves() {
    let output = iotests(&["list", "--group", "rw,status"]);
    let printed = text(&output);
    assert_eq!(status(&output), 0, "{printed}");
    assert!(printed.contains("rw       rw-grown-part-reads-as-zeroes"));
    assert!(printed.contains("reads as zeroes and can be written"));
    assert!(!printed.contains("\nrace "));
}

#[test]
fn list_says_which_cases_a_format_doesnt_cover_and_why() {
    let output = iotests(&[
        "list",
        "--format",
        "raw",
        "--group",
        "backing,race",
        "--output",
        "json",
    ]);
    assert_eq!(status(&output), 0, "{}", text(&output));
    let listed: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    let says = |wanted: &str| {
        let one = listed.iter().find(|one| one["case"] == wanted);
        one.map(|one| one["formats"]["raw"].clone())
            .unwrap_or_else(|| panic!("no case {wanted}"))
    };
    assert_eq!(says("race-drain-while-discard-waits"), "covered");
    let why = says("race-backing-changes-while-discard-waits");
    assert!(
        why.as_str().is_some_and(|why| why.contains("no backing")),
        "{why}"
    );
}

#[test]
fn run_prints_a_matrix_of_cases_against_formats_with_totals_for_each_group() {
    let output = iotests(&[
        "run",
        "-f",
        "raw,vmdk",
        "--no-external",
        "--seed",
        "0",
        CHEAP,
    ]);
    let printed = text(&output);
    assert_eq!(status(&output), 0, "{printed}");
    let row = printed
        .lines()
        .find(|line| line.contains("rw-grown"))
        .expect("a row");
    let marks: Vec<&str> = row.split_whitespace().skip(1).collect();
    assert_eq!(marks, ["p", "-"], "raw grows, vmdk can't");
    let totals = printed
        .lines()
        .find(|line| line.contains("passed of covered"));
    assert!(
        totals.is_some_and(|line| line.ends_with("1/1        0/0")),
        "{printed}"
    );
    assert!(
        printed.contains("vmdk: 0 passed, 1 not covered"),
        "{printed}"
    );
    assert!(printed.contains("not covered (1): the driver"), "{printed}");
}

#[test]
fn run_gives_json_with_totals_and_a_command_for_each_outcome() {
    let output = iotests(&[
        "run",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=512",
        "-o",
        "cluster_size=64k",
        "--seed",
        "3..5",
        "--output",
        "json",
        CHEAP,
    ]);
    assert_eq!(status(&output), 0, "{}", text(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["totals"]["passed"], 2);
    assert_eq!(report["formats"][0], "qcow2:cluster_size=512");
    let outcome = &report["outcomes"][0];
    assert_eq!(outcome["verdict"], "passed");
    assert_eq!(outcome["schedules"], 2);
    assert_eq!(
        outcome["again"],
        "cargo run --release -p iotests -- run --format qcow2 -o cluster_size=512 --filter \
         =rw-grown-part-reads-as-zeroes --seed 3"
    );
}

#[test]
fn the_command_that_an_outcome_gives_runs_that_case_alone() {
    let output = iotests(&[
        "run",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "--output",
        "json",
        CHEAP,
    ]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let again = report["outcomes"][0]["again"].as_str().expect("a command");
    let arguments = again
        .strip_prefix("cargo run --release -p iotests -- ")
        .expect("begins as a person would type it");
    let mut arguments: Vec<&str> = arguments.split(' ').collect();
    arguments.extend(["--output", "json"]);
    let output = iotests(&arguments);
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let outcomes = report["outcomes"].as_array().expect("a list");
    assert_eq!(outcomes.len(), 1);
    assert_eq!(outcomes[0]["case"], "rw-grown-part-reads-as-zeroes");
    assert_eq!(outcomes[0]["format"], "qcow2:cluster_size=4k");
    assert_eq!(outcomes[0]["schedules"], 1);
}

#[test]
fn a_report_file_is_junit_when_its_name_ends_in_xml() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("report.xml");
    let name = path.to_string_lossy();
    let output = iotests(&[
        "run",
        "-f",
        "raw,vmdk",
        "--no-external",
        "--seed",
        "0",
        "--report",
        &name,
        CHEAP,
    ]);
    assert_eq!(status(&output), 0, "{}", text(&output));
    let xml = std::fs::read_to_string(&path).expect("the report");
    assert!(xml.starts_with("<?xml version=\"1.0\" encoding=\"UTF-8\"?>"));
    assert!(xml.contains(
        "<testsuites name=\"iotests\" tests=\"2\" failures=\"0\" errors=\"0\" skipped=\"1\""
    ));
    assert!(xml.contains("<skipped message=\"not covered: "));
    assert!(xml.trim_end().ends_with("</testsuites>"));
}

#[test]
fn what_a_power_cut_sweep_counted_is_printed_and_a_clean_one_is_status_0() {
    let output = iotests(&[
        "crash",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k",
        "-w",
        "recycled-clusters,copy-on-write",
        "--seed",
        "1",
        "--every",
        "9",
        "--output",
        "json",
        "--no-external",
    ]);
    assert_eq!(status(&output), 0, "{}", text(&output));
    let swept: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(swept.len(), 2);
    for one in &swept {
        assert_eq!(one["verdict"], "passed");
        assert!(
            one["unflushed"].as_u64().is_some_and(|count| count > 3),
            "{one}"
        );
        assert!(one["images"].as_u64() > one["moments"].as_u64(), "{one}");
    }
}

#[test]
fn wrong_usage_is_status_3_and_names_what_is_known() {
    for (arguments, said) in [
        (
            vec!["run", "--group", "nonsense"],
            "Unknown group 'nonsense' (known: all, quick, rw",
        ),
        (
            vec!["run", "-f", "nonsense"],
            "Unknown format 'nonsense' (known: raw, qcow2, vmdk",
        ),
        (
            vec!["run", "-f", "raw", "-o", "nonsense=1"],
            "no create option 'nonsense'",
        ),
        (vec!["run", "=no-such-case"], "no case is chosen"),
        (vec!["run", "--seed", "5..5"], "there is no seed"),
        (vec!["run", "--jobs", "0"], "--jobs: at least 1"),
        (
            vec!["crash", "-w", "nonsense"],
            "Unknown workload 'nonsense'",
        ),
        (
            vec!["race", "--via", "qemu-io", "--qemu-io", "/nonexistent/x"],
            "/nonexistent/x: not found",
        ),
        (vec!["nonsense"], "unrecognized subcommand"),
        (vec![], "Usage"),
    ] {
        let output = iotests(&arguments);
        let printed = text(&output);
        assert_eq!(status(&output), 3, "{arguments:?}: {printed}");
        assert!(printed.contains(said), "{arguments:?}: {printed}");
    }
}

#[test]
fn the_installed_qemu_io_fails_the_deterministic_races() {
    let output = iotests(&[
        "race",
        "--via",
        "qemu-io",
        "--seed",
        "1",
        "--commands",
        "600",
    ]);
    let printed = text(&output);
    if printed.contains("not found") || printed.contains("isn't installed") {
        println!("SKIPPED: qemu-io isn't installed");
        return;
    }
    assert_eq!(status(&output), 1, "{printed}");
    for race in [
        "late-write-after-zero-unmap ",
        "late-write-after-discard ",
        "late-read-after-zero-unmap ",
    ] {
        let line = printed
            .lines()
            .find(|line| line.starts_with(race))
            .expect("a line");
        assert!(
            line.contains("FAILED 1 read gave another owner's bytes"),
            "{line}"
        );
    }
}

#[test]
fn quick_cases_pass_on_every_format_of_the_workspace() {
    let output = iotests(&["run", "--group", "quick", "--seed", "1", "--output", "json"]);
    assert_eq!(status(&output), 0, "{}", text(&output));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let formats = report["formats"].as_array().expect("a list").len();
    assert_eq!(formats, 3);
    let covered = |format: &str| {
        let outcomes = report["outcomes"].as_array().expect("a list");
        let passed = outcomes
            .iter()
            .filter(|o| o["format"] == format && o["verdict"] == "passed");
        passed.count()
    };
    assert!(covered("qcow2") >= 150, "{}", covered("qcow2"));
}

#[test]
fn simulate_tells_on_standard_error_how_far_it_is_when_it_is_asked() {
    let range = ["simulate", "-f", "raw", "--seeds", "0..3"];
    let quiet = iotests(&range);
    assert_eq!(status(&quiet), 0, "{}", text(&quiet));
    assert!(quiet.stderr.is_empty(), "{}", text(&quiet));
    let asked = iotests(&[&range[..], &["-p"]].concat());
    assert_eq!(status(&asked), 0, "{}", text(&asked));
    let told = String::from_utf8_lossy(&asked.stderr);
    assert!(told.starts_with("3/3 seeds (0 failed), "), "{told}");
    assert!(!String::from_utf8_lossy(&asked.stdout).contains("per hour, "));
}

#[test]
fn a_reader_that_goes_away_is_no_reason_to_panic() {
    for command in [
        &["explore", "--list"][..],
        &["explore", "-f", "raw", "-s", "zero", "-k", "0"],
        &["simulate", "-f", "raw", "--seeds", "0..2"],
        &["list"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_iotests"))
            .args(command)
            .stdout(writer)
            .output()
            .expect("the program starts");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!told.contains("panicked"), "{command:?}: {told}");
        assert!(
            matches!(output.status.code(), Some(0 | 2)),
            "{command:?}: {told}"
        );
    }
}
