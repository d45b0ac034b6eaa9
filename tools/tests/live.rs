//! `blk live`, shortened: it passes, says why, leaves the base alone, and ends cleanly on an interrupt.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

const BLK: &str = env!("CARGO_BIN_EXE_blk");

#[test]
fn a_short_run_passes_and_reports_what_happened() {
    let directory = tempfile::tempdir().unwrap();
    let out = Command::new(BLK)
        .args([
            "live",
            "--seconds",
            "8",
            "--seed",
            "3",
            "--output",
            "json",
            "-q",
            "--scratch",
        ])
        .arg(directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["failures"], serde_json::json!([]), "{text}");
    // On a machine that is very busy, a job may have met no write of the guest: that is said, and isn't a failure.
    assert!(matches!(out.status.code(), Some(0 | 2)), "{text}");
    assert_eq!(report["jobs"].as_array().unwrap().len(), 10, "{text}");
    assert_eq!(report["disks"].as_array().unwrap().len(), 4, "{text}");
    assert!(report["proof"]["copies-on-write"].as_u64().unwrap() > 0);
    assert_eq!(
        std::fs::read_dir(directory.path()).unwrap().count(),
        0,
        "images were left behind"
    );
}

#[test]
fn an_interrupt_ends_it_cleanly() {
    let directory = tempfile::tempdir().unwrap();
    let child = Command::new(BLK)
        .args(["live", "--seconds", "60", "-q", "--scratch"])
        .arg(directory.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    let out = child.wait_with_output().unwrap();
    assert_eq!(
        out.status.code(),
        Some(130),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(String::from_utf8_lossy(&out.stderr).contains("interrupted"));
    assert_eq!(
        std::fs::read_dir(directory.path()).unwrap().count(),
        0,
        "images were left behind"
    );
}

#[test]
fn a_base_that_cant_be_used_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let small = directory.path().join("small.raw");
    std::fs::write(&small, vec![0; 4096]).unwrap();
    for (base, message) in [
        (small.to_str().unwrap(), "too small"),
        ("/nowhere/x.qcow2", "/nowhere/x.qcow2"),
    ] {
        let out = Command::new(BLK)
            .args(["live", "-q", "--base", base])
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(1));
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(stderr.contains(message), "{stderr}");
    }
}
