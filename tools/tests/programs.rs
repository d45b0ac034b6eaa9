//! `blk` by itself: what qemu-img has no counterpart for, signals, and images that are damaged or in use.

mod support;

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use support::{Alone, qemu_is_installed};

#[test]
fn help_and_version_are_there() {
    let blk = Alone::new();
    let (code, out, _) = blk.blk(&["--help"]);
    assert_eq!(code, 0);
    for command in [
        "bench", "check", "commit", "compare", "convert", "create", "info", "map", "measure",
        "rebase", "resize",
    ] {
        assert!(out.contains(&format!("  {command} ")), "{out}");
        let (code, out, _) = blk.blk(&[command, "--help"]);
        assert_eq!(code, 0, "{command}");
        assert!(out.contains(&format!("Usage: blk {command} ")), "{out}");
        assert!(out.contains("--help"), "{out}");
    }
    let (code, out, _) = blk.blk(&["-V"]);
    assert_eq!(
        (code, out.trim()),
        (0, concat!("blk ", env!("CARGO_PKG_VERSION")))
    );
}

#[test]
fn a_message_names_file_and_field() {
    let blk = Alone::new();
    assert_eq!(
        blk.blk(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]).0,
        0
    );
    let mut bytes = fs::read(blk.path("a.qcow2")).unwrap();
    // cluster_bits
    bytes[23] = 63;
    blk.write("bad.qcow2", &bytes);
    let (code, _, err) = blk.blk(&["info", "bad.qcow2"]);
    assert_eq!(code, 1);
    assert!(
        err.starts_with("blk: Could not open 'bad.qcow2': "),
        "{err}"
    );
    assert!(
        err.contains("field 'cluster_bits' is 63, allowed: "),
        "{err}"
    );
}

#[test]
fn a_refused_value_is_named_with_its_option_and_what_is_allowed() {
    let blk = Alone::new();
    for (option, first, second) in [
        (
            "preallocation=bogus",
            "blk: x: invalid parameter value: bogus",
            "field 'preallocation' is bogus, allowed: off, ",
        ),
        (
            "nocow=maybe",
            "blk: x: Parameter 'nocow' expects 'on' or 'off'",
            "",
        ),
    ] {
        let (code, _, err) = blk.blk(&["create", "-q", "-f", "raw", "-o", option, "x", "1M"]);
        assert_eq!(code, 1);
        assert!(err.starts_with(first) && err.contains(second), "{err}");
    }
}

#[test]
fn create_lists_options_in_qemu_imgs_words() {
    if !qemu_is_installed() {
        return;
    }
    let blk = Alone::new();
    for help in ["help", "?"] {
        let args = ["create", "-f", "qcow2", "-o", help];
        let theirs = Command::new("qemu-img").args(args).output().unwrap();
        let theirs = String::from_utf8_lossy(&theirs.stdout).into_owned();
        let (code, ours, err) = blk.blk(&args);
        assert_eq!((code, err.as_str()), (0, ""));
        for line in ours.lines() {
            assert!(theirs.lines().any(|other| other == line), "{line}");
        }
        for line in theirs.lines() {
            assert!(ours.lines().any(|other| other == line), "{line}");
        }
    }
}

#[test]
fn info_never_opens_the_files_that_an_image_names() {
    let blk = Alone::new();
    // Opening a FIFO for reading would wait forever.
    assert!(
        Command::new("mkfifo")
            .arg(blk.path("fifo"))
            .status()
            .unwrap()
            .success()
    );
    let create = [
        "create", "-q", "-u", "-f", "qcow2", "-b", "fifo", "-F", "raw", "a.qcow2", "1M",
    ];
    assert_eq!(blk.blk(&create).0, 0);
    let (code, out, _) = blk.blk(&["info", "--output=json", "a.qcow2"]);
    assert_eq!(code, 0);
    let value: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(value["backing-filename"], "fifo");
}

#[test]
fn the_base_of_a_commit_is_closed_and_clean() {
    let blk = Alone::new();
    for args in [
        // Only closing it clears its dirty bit.
        "create -q -f qcow2 -o lazy_refcounts=on base.qcow2 1M",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
        "io -c write\u{a0}0\u{a0}512k top.qcow2",
        "commit -q top.qcow2",
    ] {
        let args: Vec<String> = args
            .split(' ')
            .map(|arg| arg.replace('\u{a0}', " "))
            .collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let (code, _, err) = blk.blk(&args);
        assert_eq!(code, 0, "{args:?}: {err}");
    }
    let (code, out, _) = blk.blk(&["info", "--output=json", "base.qcow2"]);
    assert_eq!(code, 0);
    let value: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(value["dirty-flag"], false);
}

#[test]
fn repaired_leaks_are_gone() {
    let blk = Alone::new();
    assert_eq!(
        blk.blk(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]).0,
        0
    );
    let mut bytes = fs::read(blk.path("a.qcow2")).unwrap();
    let be = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let block = be(be(48));
    let end = bytes.len().div_ceil(65536);
    bytes[block + 2 * end + 1] = 1;
    bytes.resize((end + 1) * 65536, 0);
    blk.write("a.qcow2", &bytes);
    let (code, out, err) = blk.blk(&["check", "a.qcow2"]);
    assert_eq!(code, 3, "{out}{err}");
    assert!(
        out.contains("1 leaked clusters were found on the image."),
        "{out}"
    );
    assert!(
        err.contains(&format!("Leaked cluster {end} refcount=1 reference=0")),
        "{err}"
    );
    let (code, out, _) = blk.blk(&["check", "-r", "leaks", "a.qcow2"]);
    assert_eq!(code, 0, "{out}");
    assert!(
        out.contains("    1 leaked clusters\n    0 corruptions\n"),
        "{out}"
    );
    assert_eq!(blk.blk(&["check", "-q", "a.qcow2"]).0, 0);
}

#[test]
fn progress_is_printed_as_qemu_img_prints_it() {
    let blk = Alone::new();
    blk.write("a.raw", &vec![1; 8 << 20]);
    let (code, out, _) = blk.blk(&[
        "convert", "-p", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2",
    ]);
    assert_eq!(code, 0);
    assert!(out.starts_with("    (0.00/100%)\r"), "{out:?}");
    assert!(out.contains("    (50.00/100%)\r"), "{out:?}");
    assert!(out.ends_with("    (100.00/100%)\r\n"), "{out:?}");
}

fn send(signal: &str, pid: u32) {
    assert!(
        Command::new("kill")
            .args([signal, &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn sigusr1_prints_a_line_of_progress_and_sigint_ends_cleanly() {
    let blk = Alone::new();
    blk.write("a.raw", &vec![1; 16 << 20]);
    let mut child = blk
        .command(&[
            "convert", "-r", "1M", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2",
        ])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    // Once the target has been made, the copy is about to begin.
    while !blk.path("a.qcow2").exists() && start.elapsed() < Duration::from_secs(20) {
        thread::sleep(Duration::from_millis(10));
    }
    thread::sleep(Duration::from_millis(500));
    send("-USR1", child.id());
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    err.read_line(&mut line).unwrap();
    assert!(
        line.starts_with("    (") && line.ends_with("/100%)\n"),
        "{line:?}"
    );
    send("-INT", child.id());
    let status = child.wait().unwrap();
    let mut rest = String::new();
    err.read_to_string(&mut rest).unwrap();
    assert_eq!(status.code(), Some(130), "{rest}");
    assert!(rest.contains("blk: Interrupted"), "{rest}");
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "it didn't wait for the end of the copy"
    );
    // What was written so far is an image without errors.
    let (code, out, err) = blk.blk(&["check", "a.qcow2"]);
    assert_eq!(code, 0, "{out}{err}");
}

#[test]
fn an_image_in_use_is_refused_and_can_be_shared() {
    let blk = Alone::new();
    assert_eq!(
        blk.blk(&["create", "-q", "-f", "qcow2", "a.qcow2", "4M"]).0,
        0
    );
    blk.write("src.raw", &vec![1; 4 << 20]);
    let mut child = blk
        .command(&[
            "convert", "-n", "-r", "512k", "-f", "raw", "-O", "qcow2", "src.raw", "a.qcow2",
        ])
        .spawn()
        .unwrap();
    thread::sleep(Duration::from_millis(1500));
    let (code, _, err) = blk.blk(&["info", "a.qcow2"]);
    let shared = blk.blk(&["info", "-U", "a.qcow2"]);
    send("-TERM", child.id());
    child.wait().unwrap();
    assert_eq!(code, 1);
    assert!(err.contains("Failed to get shared \"write\" lock"), "{err}");
    assert!(
        err.contains("Is another process using the image [a.qcow2]?"),
        "{err}"
    );
    assert_eq!(shared.0, 0, "{}", shared.2);
}

/// `base.qcow2` of 4 MiB, and `top.qcow2` over it with data in the first two.
fn a_chain(blk: &Alone) {
    for args in [
        &["create", "-q", "-f", "qcow2", "base.qcow2", "4M"][..],
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "top.qcow2",
        ],
        &["io", "-c", "write -P 5 0 2M", "top.qcow2"],
    ] {
        let (code, out, err) = blk.blk(args);
        assert_eq!(code, 0, "{out}{err}");
    }
}

/// The images have no errors, and what is seen at the top is what was written.
fn the_chain_is_as_it_was(blk: &Alone) {
    for name in ["base.qcow2", "top.qcow2"] {
        let (code, out, err) = blk.blk(&["check", name]);
        assert_eq!(code, 0, "{name}: {out}{err}");
    }
    let (code, out, _) = blk.blk(&["io", "-r", "-c", "read -P 5 0 2M", "top.qcow2"]);
    assert_eq!(code, 0, "{out}");
    assert!(!out.contains("verification failed"), "{out}");
}

#[test]
fn sigint_cancels_the_job_of_a_commit() {
    let blk = Alone::new();
    a_chain(&blk);
    let mut child = blk
        .command(&["commit", "-p", "-r", "64k", "top.qcow2"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first line of progress is printed right before the job starts.
    let mut first = [0; 1];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    send("-INT", child.id());
    let out = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(130), "{err}");
    assert!(err.contains("blk: Interrupted"), "{err}");
    the_chain_is_as_it_was(&blk);
}

#[test]
fn a_commit_that_cant_be_written_says_why_and_loses_nothing() {
    let blk = Alone::new();
    a_chain(&blk);
    // No file may become longer than 1 MiB.
    let out = Command::new("bash")
        .args([
            "-c",
            "trap '' XFSZ; ulimit -f 1024; exec \"$0\" commit top.qcow2",
            env!("CARGO_BIN_EXE_blk"),
        ])
        .current_dir(blk.path(""))
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{err}");
    assert!(
        err.starts_with("blk: Block job failed: File too large"),
        "{err}"
    );
    the_chain_is_as_it_was(&blk);
}
