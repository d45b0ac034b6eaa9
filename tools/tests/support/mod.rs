//! Runs `blk` under the name of qemu's program beside the installed one, on equal images, and compares all that they
//! say. Where qemu isn't installed the tests say so and pass.

#![allow(dead_code, reason = "not every test program uses all of it")]

#[path = "../../../format-qcow2/tests/bitmap_files/mod.rs"]
mod bitmap_files;

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

/// Two directories with the same images, one for each program.
pub struct SideBySide {
    theirs: tempfile::TempDir,
    ours: tempfile::TempDir,
    differences: Vec<String>,
    commands: usize,
}

/// Whether the tests can run; says so if not.
pub fn qemu_is_installed() -> bool {
    let found = Command::new("qemu-img").arg("-V").output().is_ok()
        && Command::new("qemu-io").arg("-V").output().is_ok();
    if !found {
        eprintln!("NOTE: qemu-img and qemu-io are not installed: nothing was compared");
    }
    found
}

/// Runs a shell script in `dir`.
fn make(setup: &str, dir: &Path) {
    let made = Command::new("bash")
        .args(["-ec", setup])
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
}

/// Lets our programs follow names in images that aren't paths, as qemu's do.
const TRUST: &str = "BLK_TRUST_IMAGE_NAMES";

impl SideBySide {
    /// Runs the shell script `setup` with qemu's programs, and gives both sides its result.
    pub fn new(setup: &str) -> Self {
        let theirs = tempfile::tempdir().unwrap();
        let ours = tempfile::tempdir().unwrap();
        make(setup, theirs.path());
        let copied = Command::new("cp")
            .arg("-a")
            .arg(theirs.path().join("."))
            .arg(ours.path())
            .status()
            .unwrap();
        assert!(copied.success());
        Self {
            theirs,
            ours,
            differences: Vec::new(),
            commands: 0,
        }
    }

    /// Runs the shell script `setup` with qemu's programs once for each side. A copy of a file that is preallocated isn't: where that
    /// matters, images are made twice.
    pub fn made_twice(setup: &str) -> Self {
        let (theirs, ours) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for side in [&theirs, &ours] {
            make(setup, side.path());
        }
        Self {
            theirs,
            ours,
            differences: Vec::new(),
            commands: 0,
        }
    }

    fn run(program: &Path, dir: &Path, args: &[&str]) -> Output {
        Command::new(program)
            .arg0("qemu-img")
            .args(args)
            .env(TRUST, "1")
            .current_dir(dir)
            .output()
            .unwrap()
    }

    /// Runs one command line (words are split at spaces; `''` is an empty word) on both sides and notes differences.
    pub fn compare(&mut self, line: &str) {
        let args: Vec<&str> = line
            .split_whitespace()
            .map(|word| if word == "''" { "" } else { word })
            .collect();
        let theirs = Self::run(Path::new("qemu-img"), self.theirs.path(), &args);
        let ours = Self::run(
            Path::new(env!("CARGO_BIN_EXE_blk")),
            self.ours.path(),
            &args,
        );
        self.commands += 1;
        let (a, b) = (Said::of(&theirs), Said::of(&ours));
        if a != b {
            self.differences
                .push(format!("qemu-img {line}\n  theirs: {a:?}\n  ours:   {b:?}"));
        }
    }

    /// Runs one command line on both sides; what is printed on standard output has to be the same to the letter, places in files included.
    pub fn places(&mut self, line: &str) {
        let args: Vec<&str> = line.split_whitespace().collect();
        let theirs = Self::run(Path::new("qemu-img"), self.theirs.path(), &args);
        let blk = Path::new(env!("CARGO_BIN_EXE_blk"));
        let ours = Self::run(blk, self.ours.path(), &args);
        self.commands += 1;
        if theirs != ours {
            self.differences.push(format!(
                "qemu-img {line}\n  theirs: {theirs:?}\n  ours:   {ours:?}"
            ));
        }
    }

    /// Runs `qemu-io` with these arguments, and `input` to read, on both sides and notes differences.
    pub fn io(&mut self, args: &[&str], input: &str) {
        let run = |program: &str, dir: &Path| {
            use std::io::Write as _;
            let mut child = Command::new(program)
                .arg0("qemu-io")
                .args(args)
                .env(TRUST, "1")
                .current_dir(dir)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            // A program that has failed already doesn't read it.
            let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
            let mut output = child.wait_with_output().unwrap();
            output.stdout = forget_times(&output.stdout);
            output
        };
        let theirs = run("qemu-io", self.theirs.path());
        let ours = run(env!("CARGO_BIN_EXE_blk"), self.ours.path());
        self.commands += 1;
        let (a, b) = (Said::of(&theirs), Said::of(&ours));
        if a != b {
            self.differences.push(format!(
                "qemu-io {args:?} {input:?}\n  theirs: {a:?}\n  ours:   {b:?}"
            ));
        }
    }

    /// Runs one command line with our program alone, on a copy of the images of its own.
    pub fn ours_alone(&self, line: &str) -> Output {
        let args: Vec<&str> = line.split_whitespace().collect();
        let dir = tempfile::tempdir().unwrap();
        let copied = Command::new("cp")
            .arg("-a")
            .arg(self.ours.path().join("."))
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(copied.success());
        let blk = Path::new(env!("CARGO_BIN_EXE_blk"));
        Self::run(blk, dir.path(), &args)
    }

    /// Runs one command line on both sides; only the exit status is compared.
    pub fn silently(&mut self, line: &str) {
        let args: Vec<&str> = line.split_whitespace().collect();
        let theirs = Self::run(Path::new("qemu-img"), self.theirs.path(), &args);
        let blk = Path::new(env!("CARGO_BIN_EXE_blk"));
        let ours = Self::run(blk, self.ours.path(), &args);
        self.commands += 1;
        if theirs.status.code() != ours.status.code() {
            self.differences
                .push(format!("qemu-img {line}: {theirs:?}, {ours:?}"));
        }
    }

    /// Runs all lines of `lines`.
    pub fn compare_all(&mut self, lines: &str) {
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            self.compare(line);
        }
    }

    /// Both sides' images have the same content, read by qemu-img, and ours is clean.
    pub fn same_content(&mut self, format: &str, name: &str) {
        let (a, b) = (self.theirs.path().join(name), self.ours.path().join(name));
        let paths = [a.to_str().unwrap(), b.to_str().unwrap()];
        let compared = Self::run(
            Path::new("qemu-img"),
            self.ours.path(),
            &["compare", "-f", format, "-F", format, paths[0], paths[1]],
        );
        if !compared.status.success() {
            self.differences
                .push(format!("content of {name}: {:?}", Said::of(&compared)));
        }
        if format != "raw" {
            let checked = Self::run(
                Path::new("qemu-img"),
                self.ours.path(),
                &["check", "-f", format, name],
            );
            if !checked.status.success() {
                self.differences
                    .push(format!("check of {name}: {:?}", Said::of(&checked)));
            }
        }
    }

    /// Both sides' images have the same bitmaps with the same bits, in the same order.
    pub fn same_bitmaps(&mut self, name: &str) {
        let read = |dir: &tempfile::TempDir| {
            let image = fs::read(dir.path().join(name)).unwrap();
            let mut found = bitmap_files::stored(&image);
            // Where they are is nobody's business.
            for bitmap in &mut found {
                (bitmap.entry, bitmap.table) = (0, 0);
            }
            found
        };
        let (theirs, ours) = (read(&self.theirs), read(&self.ours));
        if theirs != ours {
            let names = |list: &[bitmap_files::StoredBitmap]| -> Vec<_> {
                list.iter()
                    .map(|bitmap| {
                        let dirty = bitmap.bits.iter().filter(|bit| **bit).count();
                        format!("{} {:x} {dirty}", bitmap.name, bitmap.flags)
                    })
                    .collect()
            };
            let what = format!(
                "bitmaps of {name}: {:?}, {:?}",
                names(&theirs),
                names(&ours)
            );
            self.differences.push(what);
        }
    }

    /// Fails if there was any difference.
    pub fn finish(self) {
        assert!(self.commands > 0);
        assert!(
            self.differences.is_empty(),
            "{} of {} commands differ:\n{}",
            self.differences.len(),
            self.commands,
            self.differences.join("\n")
        );
    }
}

/// What a program said, without what may differ.
#[derive(Debug, PartialEq)]
struct Said {
    status: Option<i32>,
    out: Text,
    err: String,
}

#[derive(Debug, PartialEq)]
enum Text {
    Json(Value),
    Plain(String),
}

impl Said {
    fn of(output: &Output) -> Self {
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let out = match serde_json::from_str::<Value>(&out) {
            Ok(mut value) => {
                forget_places(&mut value);
                Text::Json(value)
            }
            Err(_) => Text::Plain(forget_dates(&forget_sizes(&out))),
        };
        Self {
            status: output.status.code(),
            out,
            err: forget_numbers(&String::from_utf8_lossy(&output.stderr)),
        }
    }
}

/// The numbers of nodes that nobody gave a name.
fn forget_numbers(text: &str) -> String {
    let mut parts = text.split("#block");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push_str("#block");
        kept.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    kept
}

/// Sizes of files on the host and times are nobody's promise.
fn forget_sizes(text: &str) -> String {
    const VARYING: [&str; 5] = [
        "disk size: ",
        "file length: ",
        "Run completed in ",
        "Image end offset: ",
        "    cid: ",
    ];
    let mut lines = Vec::new();
    for line in text.lines() {
        match VARYING
            .iter()
            .find(|prefix| line.trim_start().starts_with(prefix.trim_start()))
        {
            Some(prefix) => lines.push((*prefix).to_owned()),
            // Percentages of fragmentation follow from where clusters happen to be.
            None => match line.split_once("% allocated, ") {
                Some((allocated, _)) => lines.push(allocated.to_owned()),
                None => lines.push(line.to_owned()),
            },
        }
    }
    lines.join("\n")
}

/// How long requests took, for people and for machines.
fn forget_times(out: &[u8]) -> Vec<u8> {
    let out = String::from_utf8_lossy(out);
    let lines = out.lines().map(|line| {
        if let Some((ops, _)) = line.split_once(" ops; ") {
            return format!("{ops} ops");
        }
        match line.split_once(",1,0:00:") {
            Some((bytes, _)) => format!("{bytes},1"),
            None => line.to_owned(),
        }
    });
    lines.collect::<Vec<_>>().join("\n").into_bytes()
}

/// When snapshots were taken: `2026-01-31 12:34:56` in a list of them.
fn forget_dates(text: &str) -> String {
    const DATE: &str = "0000-00-00 00:00:00";
    let is_date = |part: &[u8]| {
        let digit = |(byte, form): (&u8, u8)| match form {
            b'0' => byte.is_ascii_digit(),
            other => *byte == other,
        };
        part.iter().zip(DATE.bytes()).all(digit)
    };
    let lines = text.lines().map(|line| {
        let windows = line.as_bytes().windows(DATE.len());
        match windows.into_iter().position(is_date) {
            Some(at) => format!("{}{DATE}{}", &line[..at], &line[at + DATE.len()..]),
            None => line.to_owned(),
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn forget_places(value: &mut Value) {
    match value {
        Value::Array(list) => {
            list.iter_mut().for_each(forget_places);
            list.dedup_by(|next, last| join(last, next));
        }
        Value::Object(map) => {
            let is_file = map.get("format").is_some_and(|format| format == "file");
            for (key, value) in map.iter_mut() {
                match key.as_str() {
                    "actual-size" | "image-end-offset" | "fragmented-clusters" | "cid" => {
                        *value = Value::Null;
                    }
                    "virtual-size" if is_file => *value = Value::Null,
                    // Where a format puts its clusters is its own business.
                    "offset" => *value = Value::Null,
                    _ => forget_places(value),
                }
            }
            map.remove("fragmented-clusters");
        }
        _ => {}
    }
}

/// Two entries of a map that were apart only because of their places become one.
fn join(last: &mut Value, next: &Value) -> bool {
    let number = |value: &Value, key: &str| value[key].as_u64();
    let (Some(start), Some(len), Some(next_len)) = (
        number(last, "start"),
        number(last, "length"),
        number(next, "length"),
    ) else {
        return false;
    };
    let mut same = next.clone();
    same["start"] = last["start"].clone();
    same["length"] = last["length"].clone();
    if same == *last && number(next, "start") == Some(start + len) {
        last["length"] = (len + next_len).into();
        return true;
    }
    false
}

/// A directory and `blk` in it.
pub struct Alone(tempfile::TempDir);

impl Alone {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blk"));
        command.arg0("blk").args(args).current_dir(self.0.path());
        command
    }

    /// Exit status, standard output, standard error.
    pub fn blk(&self, args: &[&str]) -> (i32, String, String) {
        let output = self.command(args).output().unwrap();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }
}
