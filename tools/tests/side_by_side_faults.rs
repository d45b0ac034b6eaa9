//! `blk io` on images over `blkdebug` beside the installed qemu-io: the same injected errors and breakpoints give the same
//! words. And the race that a breakpoint makes certain: it corrupts with the one and not with the other.

use std::{
    fs,
    io::Write,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
};

const THEIRS: &str = "qemu-io";
const OURS: &str = env!("CARGO_BIN_EXE_blk");

fn qemu_is_installed() -> bool {
    let found = [THEIRS, "qemu-img"]
        .iter()
        .all(|tool| Command::new(tool).arg("--version").output().is_ok());
    if !found {
        eprintln!("NOTE: qemu-img and qemu-io are not installed: nothing was compared");
    }
    found
}

/// What a program said: standard output and standard error without times and prompts, exit status.
#[derive(Debug, PartialEq)]
struct Said(Vec<String>, Vec<String>, Option<i32>);

fn lines(bytes: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(bytes)
        .replace("qemu-io> ", "")
        .lines()
        .filter(|line| !(line.is_empty() || line.contains(" ops; ") && line.contains("ops/sec")))
        .map(str::to_owned)
        .collect()
}

/// Runs qemu-io, ours or theirs, on fresh images in `dir`.
fn run(program: &str, dir: &Path, args: &[&str], script: &str) -> Said {
    for (name, format, size) in [("a.qcow2", "qcow2", "4M"), ("a.raw", "raw", "1M")] {
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", format, name, size])
            .current_dir(dir)
            .status()
            .unwrap();
        assert!(made.success());
    }
    let mut child = Command::new(program)
        .arg0("qemu-io")
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(script.as_bytes()).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    Said(
        lines(&output.stdout),
        lines(&output.stderr),
        output.status.code(),
    )
}

const RAW: &str =
    "driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename=a.raw";
const QCOW2: &str =
    "driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename=a.qcow2";

/// Options with `file.` before each of `rules`.
fn over(base: &str, rules: &[&str]) -> String {
    rules
        .iter()
        .fold(base.to_owned(), |all, rule| format!("{all},file.{rule}"))
}

#[test]
fn the_same_rules_and_breakpoints_give_the_same_words() {
    if !qemu_is_installed() {
        return;
    }
    const BREAKPOINTS: &str = "break write_aio A\naio_write 0 4k\nwait_break A\nresume B\nresume A\naio_flush\n\
                               resume A\nbreak bogus A\nbreak write_aio\nremove_break B\nresume\n";
    let options: Vec<(String, &str)> = vec![
        (
            over(RAW, &["inject-error.0.event=none"]),
            "read 0 4k\nwrite 0 4k\ndiscard 0 4k\nwrite -z 0 4k\nalloc 0 4k\n",
        ),
        (
            over(
                RAW,
                &["inject-error.0.event=none", "inject-error.0.iotype=read"],
            ),
            "read 0 4k\nwrite 0 4k\ndiscard 0 4k\nwrite -z 0 4k\nflush\n",
        ),
        (
            over(
                RAW,
                &["inject-error.0.event=none", "inject-error.0.iotype=write"],
            ),
            "read 0 4k\nwrite 0 4k\ndiscard 0 4k\nwrite -z 0 4k\nflush\n",
        ),
        (
            over(
                RAW,
                &[
                    "inject-error.0.event=none",
                    "inject-error.0.iotype=discard",
                    "inject-error.0.errno=28",
                ],
            ),
            "read 0 4k\nwrite 0 4k\ndiscard 0 4k\nwrite -z 0 4k\nflush\n",
        ),
        (
            over(
                RAW,
                &[
                    "inject-error.0.event=none",
                    "inject-error.0.iotype=write-zeroes",
                    "inject-error.0.errno=1",
                ],
            ),
            "read 0 4k\nwrite 0 4k\ndiscard 0 4k\nwrite -z 0 4k\nflush\n",
        ),
        (
            over(
                RAW,
                &["inject-error.0.event=none", "inject-error.0.once=on"],
            ),
            "read 0 4k\nread 0 4k\nwrite 0 4k\n",
        ),
        (
            over(
                RAW,
                &["inject-error.0.event=none", "inject-error.0.sector=4"],
            ),
            "read 0 2k\nread 1k 2k\nwrite 2k 512\nwrite 2560 512\nflush\n",
        ),
        (
            over(
                RAW,
                &[
                    "inject-error.0.event=read_aio",
                    "inject-error.0.errno=28",
                    "inject-error.0.iotype=write",
                    "inject-error.1.event=write_aio",
                    "inject-error.1.errno=1",
                    "inject-error.1.iotype=read",
                ],
            ),
            "read 0 4k\nwrite 0 4k\nread 0 4k\nwrite 0 4k\n",
        ),
        (
            over(
                RAW,
                &[
                    "set-state.0.event=read_aio",
                    "set-state.0.state=1",
                    "set-state.0.new_state=2",
                    "set-state.1.event=read_aio",
                    "set-state.1.state=2",
                    "set-state.1.new_state=3",
                    "inject-error.0.event=read_aio",
                    "inject-error.0.state=3",
                    "inject-error.0.immediately=on",
                ],
            ),
            "read 0 4k\nread 0 4k\nread 0 4k\nwrite 0 4k\n",
        ),
        (
            over(
                RAW,
                &[
                    "inject-error.0.event=read_aio",
                    "inject-error.0.errno=28",
                    "inject-error.0.once=on",
                    "inject-error.1.event=read_aio",
                    "inject-error.1.errno=1",
                    "inject-error.1.once=on",
                ],
            ),
            "read 0 4k\nread 0 4k\nread 0 4k\n",
        ),
        (
            over(
                RAW,
                &[
                    "inject-error.0.event=pwritev_done",
                    "inject-error.0.errno=5",
                ],
            ),
            "read 0 4k\nwrite 0 4k\nread 0 4k\n",
        ),
        (
            over(
                QCOW2,
                &["inject-error.0.event=read_aio", "inject-error.0.once=on"],
            ),
            "write -P 1 0 64k\nread 0 4k\nread -P 1 0 4k\n",
        ),
        (
            over(
                QCOW2,
                &[
                    "inject-error.0.event=write_aio",
                    "inject-error.0.errno=1",
                    "inject-error.0.once=on",
                ],
            ),
            "write -P 1 0 64k\nwrite -P 2 0 64k\nread -P 2 0 64k\nflush\n",
        ),
        (QCOW2.to_owned(), BREAKPOINTS),
        (
            QCOW2.to_owned(),
            "break write_aio A\nbreak write_aio B\naio_write 0 4k\nwait_break A\naio_write 64k 4k\nwait_break B\n\
             sleep 50\nresume A\nresume B\naio_flush\n",
        ),
        (
            QCOW2.to_owned(),
            "break write_aio A\naio_write 0 4k\nwait_break A\nremove_break A\naio_flush\nbreak read_aio A\n\
             remove_break A\nread 0 4k\n",
        ),
        (
            "driver=qcow2,file.driver=file,file.filename=a.qcow2".to_owned(),
            "break write_aio A\nremove_break A\nresume A\nhelp break\nhelp wait_break\nhelp resume\n\
             help remove_break\n",
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let mut differences = Vec::new();
    for (options, script) in &options {
        let args = ["-t", "writeback", "--image-opts", options];
        let theirs = run(THEIRS, dir.path(), &args, script);
        let mut ours = run(OURS, dir.path(), &args, script);
        // That the last flush, when the image is closed, failed is told by ours alone.
        ours.1.retain(|line| !line.contains("[flush"));
        if theirs != ours {
            differences.push(format!(
                "{options}\n{script}\n  theirs: {theirs:?}\n  ours:   {ours:?}"
            ));
        }
    }
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn file_names_and_rules_files_mean_the_same() {
    if !qemu_is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let rules = [
        (
            "once.conf",
            "[inject-error]\nevent = \"write_aio\"\nerrno = \"1\"\nonce = \"on\"\n",
        ),
        ("group.conf", "[bogus]\nx = \"1\"\n"),
        ("event.conf", "[inject-error]\nerrno = \"1\"\n"),
        ("name.conf", "[inject-error]\nevent = \"nope\"\n"),
        (
            "key.conf",
            "[inject-error]\nevent = \"write_aio\"\nbogus = \"1\"\n",
        ),
        ("garbage.conf", "garbage\n"),
    ];
    for (name, text) in rules {
        fs::write(dir.path().join(name), text).unwrap();
    }
    let names = [
        "blkdebug:once.conf:a.qcow2",
        "blkdebug::a.qcow2",
        "blkdebug:a.qcow2",
        "blkdebug:missing.conf:a.qcow2",
        "blkdebug:group.conf:a.qcow2",
        "blkdebug:event.conf:a.qcow2",
        "blkdebug:name.conf:a.qcow2",
        "blkdebug:key.conf:a.qcow2",
        "blkdebug:garbage.conf:a.qcow2",
        "blkdebug::missing",
        "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"blkdebug\",\"image\":{\"driver\":\"file\",\
         \"filename\":\"a.qcow2\"},\"inject-error\":[{\"event\":\"write_aio\",\"once\":true}]}}",
    ];
    for name in names {
        let script = "write 0 64k\nwrite 0 64k\nread 0 64k\n";
        let theirs = run(THEIRS, dir.path(), &[name], script);
        let ours = run(OURS, dir.path(), &[name], script);
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn limits_that_cant_be_met_are_refused_in_the_same_words() {
    if !qemu_is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for limit in [
        "align=3",
        "align=4096,file.max-transfer=5000",
        "align=4096,file.opt-discard=5000",
    ] {
        let args = ["-t", "writeback", "--image-opts", &over(RAW, &[limit])];
        let reason = |said: Said| {
            let line = said.1.first().cloned().unwrap_or_default();
            let at = line.find("Cannot meet").unwrap_or_default();
            (line[at..].to_owned(), said.2)
        };
        let theirs = reason(run(THEIRS, dir.path(), &args, "length\n"));
        let ours = reason(run(OURS, dir.path(), &args, "length\n"));
        assert_eq!(ours, theirs);
        assert!(ours.0.starts_with("Cannot meet constraints"), "{ours:?}");
    }
}

/// Bytes of an image with lazy refcounts that wasn't closed.
fn dirty_image(dir: &Path) -> Vec<u8> {
    let options = "lazy_refcounts=on";
    let commands: [(&str, &[&str]); 2] = [
        (
            "qemu-img",
            &[
                "create", "-q", "-f", "qcow2", "-o", options, "d.qcow2", "4M",
            ],
        ),
        (
            THEIRS,
            &[
                "-c",
                "write -P 1 0 1M",
                "-c",
                "flush",
                "-c",
                "sigraise 9",
                "d.qcow2",
            ],
        ),
    ];
    for (program, args) in commands {
        let run = Command::new(program).args(args).current_dir(dir).output();
        run.unwrap();
    }
    let bytes = fs::read(dir.join("d.qcow2")).unwrap();
    assert_eq!(bytes[79], 1, "the image is dirty");
    bytes
}

#[test]
fn a_refcount_table_that_cant_be_read_refuses_a_dirty_image_and_writes_nothing() {
    if !qemu_is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let before = dirty_image(dir.path());
    let read = |image: &str| {
        let said = Command::new(OURS)
            .arg0("qemu-io")
            .args(["-c", "read -P 1 0 1M", "--image-opts", image])
            .current_dir(dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&said.stderr).into_owned();
        (said.status.code(), text)
    };
    // The refcount table, its block, the L1 table: lasting errors, and errors that pass.
    let mut refused = 0;
    for sector in [128, 256, 384] {
        for how in ["off", "on"] {
            let rules = format!(
                "driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename=d.qcow2,\
                 file.inject-error.0.event=none,file.inject-error.0.iotype=read,\
                 file.inject-error.0.sector={sector},file.inject-error.0.once={how}"
            );
            let (status, text) = read(&rules);
            assert_eq!(status, Some(1), "{sector} {how}: {text}");
            assert!(text.contains("Input/output error"), "{text}");
            let after = fs::read(dir.path().join("d.qcow2")).unwrap();
            assert!(after == before, "{sector} {how}: something was written");
            refused += 1;
        }
    }
    assert_eq!(refused, 6);
    let (status, text) = read("driver=qcow2,file.filename=d.qcow2");
    assert_eq!(status, Some(0), "{text}");
    let checked = Command::new("qemu-img")
        .args(["check", "-q", "d.qcow2"])
        .current_dir(dir.path())
        .status();
    assert!(checked.unwrap().success());
}

/// A write in place stands at a breakpoint; its cluster is freed; another write takes it; the first goes on.
const RACE: &str = "write -P 1 0 64k\nbreak write_aio A\naio_write -P 2 0 64k\nwait_break A\n\
                    aio_write -z -u 0 64k\nsleep 200\naio_write -P 3 64k 64k\nsleep 200\nresume A\naio_flush\n\
                    read -P 3 64k 64k\n";
const CORRUPT: &str = "Pattern verification failed at offset 65536, 65536 bytes";

#[test]
fn a_write_that_stands_at_a_breakpoint_while_its_cluster_is_freed_destroys_nothing() {
    if !qemu_is_installed() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let args = ["-d", "unmap", "blkdebug::a.qcow2"];
    let theirs = run(THEIRS, dir.path(), &args, RACE);
    assert!(
        theirs.0.iter().any(|line| line == CORRUPT),
        "the installed qemu-io no longer loses the other write: {theirs:?}"
    );
    let ours = run(OURS, dir.path(), &args, RACE);
    assert!(!ours.0.iter().any(|line| line == CORRUPT), "{ours:?}");
    assert_eq!(ours.2, Some(0), "{ours:?}");
    let stopped = "blkdebug: Suspended request 'A'";
    assert!(ours.0.iter().any(|line| line == stopped), "{ours:?}");
    let checked = Command::new("qemu-img")
        .args(["check", "-q", "a.qcow2"])
        .current_dir(dir.path())
        .status()
        .unwrap();
    assert!(checked.success());
}
