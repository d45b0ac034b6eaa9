//! `blk io` side by side with the installed qemu-io: the same commands on the same image give the same words.

use std::{
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
};

const BLK: &str = env!("CARGO_BIN_EXE_blk");

fn have(tool: &str) -> bool {
    let found = Command::new(tool)
        .arg("--version")
        .output()
        .is_ok_and(|out| out.status.success());
    if !found {
        eprintln!("SKIPPED: {tool} is not installed");
    }
    found
}

/// A symbolic link, so that our program answers by the other's name.
fn as_qemu_io(directory: &Path) -> std::path::PathBuf {
    let link = directory.join("qemu-io");
    std::os::unix::fs::symlink(BLK, &link).unwrap();
    link
}

fn fed(program: &Path, args: &[&str], input: &str) -> Output {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    child.wait_with_output().unwrap()
}

/// Without the lines that hold times and rates, and without prompts: qemu-io prints those when its main loop gets to
/// it, which is sometimes after the end of the input.
fn filtered(text: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(text)
        .replace("qemu-io> ", "")
        .lines()
        .filter(|line| !(line.contains(" ops; ") && line.contains("ops/sec")))
        .map(str::to_owned)
        .collect()
}

fn create(path: &Path, size: &str) {
    let made = Command::new(BLK)
        .args(["create", "-q", "-f", "qcow2"])
        .arg(path)
        .arg(size)
        .status()
        .unwrap();
    assert!(made.success());
}

#[test]
fn the_same_commands_give_the_same_words() {
    if !have("qemu-io") {
        return;
    }
    let scripts = [
        "write -P 5 0 64k\nread -P 5 0 64k\nread -P 6 0 4k\nread -v 0 48\nlength\nmap\nalloc 0 128k\n",
        "write -z -u 64k 64k\ndiscard 0 64k\nread -P 0 0 128k\nalloc 0\nalloc 0 1M\nmap\ninfo\n",
        "aio_write -P 3 0 64k\naio_flush\naio_read -P 3 0 64k\naio_flush\naio_read -P 4 0 512\naio_flush\n",
        "writev -P 4 0 4k 4k\nreadv -P 4 0 4k 4k\nread -P 4 -s 512 -l 512 0 4k\nread -P 3 -s 512 -l 512 0 4k\n",
        "read -P 3 -s 5000 -l 512 0 4k\nwrite -P 300 0 4k\nwrite -z -P 3 0 4k\nwrite -u 0 4k\nwrite -n 0 4k\n",
        "write -c -P 3 1M 64k\nread -P 3 1M 64k\nwrite -c 1M 64k\nwrite -f -P 1 0 512\nread -P 1 0 512\n",
        "truncate 128M\nlength\ntruncate -m bogus 1G\nwrite 1G 4k\nread 1G 4k\ndiscard 0 100G\n",
        "bogus\nwrite\nwrite 0\nread 0 1x\nread 0 -5\nlength\nsleep x\nsleep 1\nwrite 0 4k extra\n",
        "reopen -r\nwrite 0 4k\ndiscard 0 64k\nwrite -z 0 64k\nread -P 0 0 64k\nreopen -w\nwrite 0 512\n",
        "close\nread 0 4k\nlength\nopen\nquit\nlength\n",
        "write -P 0xff 0 1000\nread -P 0xff 0 1000\nread 100 10\nwrite -P 010 513 1025\nread -P 8 513 1025\nflush\n",
        "r 0 512\nw -P 9 0 512\nf\nl\nq\n",
    ];
    let directory = tempfile::tempdir().unwrap();
    let ours = as_qemu_io(directory.path());
    for (index, script) in scripts.iter().enumerate() {
        let outputs: Vec<Output> = [Path::new("qemu-io"), ours.as_path()]
            .iter()
            .map(|program| {
                let image = directory.path().join("disk.qcow2");
                let _ = std::fs::remove_file(&image);
                create(&image, "64M");
                fed(program, &["-f", "qcow2", image.to_str().unwrap()], script)
            })
            .collect();
        assert_eq!(
            filtered(&outputs[1].stdout),
            filtered(&outputs[0].stdout),
            "script {index}"
        );
        assert_eq!(
            filtered(&outputs[1].stderr),
            filtered(&outputs[0].stderr),
            "script {index}"
        );
        assert_eq!(
            outputs[1].status.code(),
            outputs[0].status.code(),
            "script {index}"
        );
    }
}

#[test]
fn an_image_that_cant_be_opened_is_refused_in_the_same_words() {
    if !have("qemu-io") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let ours = as_qemu_io(directory.path());
    let image = directory.path().join("disk.qcow2");
    create(&image, "1M");
    let good = std::fs::read(&image).unwrap();
    let name = image.to_str().unwrap();
    for (offset, bytes) in [
        (0, *b"XXXX"),
        (4, [0, 0, 0, 9]),
        (20, [0, 0, 0, 63]),
        (36, [255; 4]),
    ] {
        let mut bad = good.clone();
        bad[offset..offset + 4].copy_from_slice(&bytes);
        std::fs::write(&image, bad).unwrap();
        let outputs: Vec<Output> = [Path::new("qemu-io"), ours.as_path()]
            .iter()
            .map(|program| {
                Command::new(program)
                    .args(["-f", "qcow2", "-c", "length", name])
                    .output()
                    .unwrap()
            })
            .collect();
        assert_eq!(
            filtered(&outputs[1].stderr),
            filtered(&outputs[0].stderr),
            "at {offset}"
        );
        assert_eq!(outputs[1].status.code(), outputs[0].status.code());
    }
}

#[test]
fn options_open_the_image_as_they_say() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.qcow2");
    create(&image, "1M");
    let name = image.to_str().unwrap();
    let opts = format!("driver=qcow2,file.filename={name}");
    let run = |args: &[&str]| Command::new(BLK).arg("io").args(args).output().unwrap();
    for args in [
        vec![
            "-f", "qcow2", "-n", "-d", "unmap", "-t", "none", "-i", "threads", "-c", "length", name,
        ],
        vec!["-c", "length", name],
        vec!["-r", "-c", "read 0 4k", name],
        vec!["--image-opts", "-c", "length", &opts],
        vec![
            "-i",
            "io_uring",
            "-t",
            "directsync",
            "-c",
            "write 0 4k",
            "-c",
            "read -P 0xcd 0 4k",
            name,
        ],
    ] {
        let out = run(&args);
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    }
    for (args, message) in [
        (
            vec!["-r", "-c", "write 0 4k", name],
            "Block node is read-only",
        ),
        (
            vec!["-c", "length", "/nowhere/x.qcow2"],
            "No such file or directory",
        ),
        (
            vec!["-f", "bogus", "-c", "length", name],
            "Unknown driver 'bogus'",
        ),
        (vec!["-t", "bogus", "-c", "length", name], "cache"),
        (
            vec!["--image-opts", "-f", "raw", "-c", "length", name],
            "mutually exclusive",
        ),
    ] {
        let out = run(&args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(stderr.contains(message), "{args:?}: {stderr}");
    }
}

#[test]
fn interleaved_writes_and_discards_from_standard_input_leave_a_clean_image() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.qcow2");
    create(&image, "64M");
    let mut script = String::from("write -q -P 200 32M 1M\n");
    let mut state = 12345u64;
    for _ in 0..2000 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let at = (state >> 33) % 16 * 65536;
        script += &match (state >> 50) % 4 {
            0 => format!("aio_write -q -P {} {at} 64k\n", state >> 40 & 0x7f),
            1 => format!("aio_write -q -z {at} 64k\n"),
            2 => format!("aio_write -q -z -u {at} 64k\n"),
            _ => format!("discard -q {at} 64k\n"),
        };
    }
    script += "aio_flush\nread -q -P 200 32M 1M\n";
    let name = image.to_str().unwrap();
    let out = fed(
        Path::new(BLK),
        &["io", "-f", "qcow2", "-t", "writeback", name],
        &script,
    );
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stdout)
    );
    let check = Command::new(BLK)
        .args(["check", "-q", name])
        .status()
        .unwrap();
    assert!(check.success());
    if have("qemu-img") {
        let check = Command::new("qemu-img")
            .args(["check", "-q", name])
            .status()
            .unwrap();
        assert!(check.success());
    }
}

#[test]
fn a_reader_that_went_away_stops_no_command_and_the_image_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.qcow2");
    create(&image, "64M");
    let name = image.to_str().unwrap();
    let mut child = Command::new(BLK)
        .args(["io", "-f", "qcow2", name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    drop(child.stderr.take());
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"help\nwrite -P 7 0 1M\nlength\nread -P 8 0 1M\nmap\nwrite -P 9 1M 1M\n")
        .unwrap();
    // A panic would be 101, a signal no code at all. (The pattern that isn't there makes it 1.)
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let script = "read -P 7 0 1M\nread -P 9 1M 1M\n";
    let out = fed(Path::new(BLK), &["io", "-f", "qcow2", name], script);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stdout)
    );
}
