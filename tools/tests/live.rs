//! `blk live`, shortened: it passes, says why, leaves the base alone, and ends cleanly on an interrupt.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
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

/// Interrupts a run that would last minutes, with a job and the guest at work.
fn interrupt(more: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let child = Command::new(BLK)
        .args(["live", "--seconds", "300", "-q"])
        .args(more)
        .arg("--scratch")
        .arg(directory.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first job starts right after its target was made.
    let begun = Instant::now();
    while !has_target(directory.path()) {
        assert!(begun.elapsed() < Duration::from_secs(60), "it didn't begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(500));
    let asked = Instant::now();
    let pid = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(sent.success());
    let out = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(130), "{err}");
    assert_eq!(err, "blk: interrupted\n");
    assert!(
        asked.elapsed() < Duration::from_secs(60),
        "it took {:?} to end",
        asked.elapsed()
    );
    assert_eq!(
        std::fs::read_dir(directory.path()).unwrap().count(),
        0,
        "images were left behind"
    );
}

fn has_target(scratch: &Path) -> bool {
    std::fs::read_dir(scratch)
        .unwrap()
        .any(|entry| entry.unwrap().path().join("A-backup.qcow2").exists())
}

#[test]
fn an_interrupt_ends_it_cleanly() {
    interrupt(&[]);
}

#[test]
fn an_interrupt_leaves_the_users_base_image_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("base.raw");
    let content: Vec<u8> = (0..32 << 20).map(|at: u32| (at >> 9) as u8).collect();
    std::fs::write(&raw, content).unwrap();
    let qcow2 = directory.path().join("base.qcow2");
    let made = Command::new(BLK)
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &qcow2])
        .status()
        .unwrap();
    assert!(made.success());
    for (base, format) in [(&raw, "raw"), (&qcow2, "qcow2")] {
        let before = std::fs::read(base).unwrap();
        interrupt(&["--base", base.to_str().unwrap(), "--base-format", format]);
        assert!(
            std::fs::read(base).unwrap() == before,
            "{} was changed",
            base.display()
        );
    }
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
