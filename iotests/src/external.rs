//! The installed qemu tools as a second opinion: an image's bytes go to a temporary file, the tool's verdict comes back.
//! When a tool isn't there, that is said, never passed over.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
};

/// A file that is removed when this is dropped.
#[derive(Debug)]
pub struct TempFile(PathBuf);

impl TempFile {
    /// A new file with these bytes.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new(label: &str, bytes: &[u8]) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("iotests-{}-{number}-{label}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::File::create(&path)?.write_all(bytes)?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// What a tool said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Its exit status; `None` when a signal ended it.
    pub status: Option<i32>,
    /// Both of its outputs.
    pub text: String,
}

/// Runs a program with `input` on its standard input. `None` when it isn't installed.
///
/// # Errors
/// Those of starting and feeding it.
pub fn run(program: &str, arguments: &[&str], input: &str) -> io::Result<Option<Said>> {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let feeder = child.stdin.take().map(|mut stdin| {
        let input = input.to_owned();
        // A program that ends early closes the pipe: that shows in its status.
        std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())))
    });
    let output = child.wait_with_output()?;
    if let Some(feeder) = feeder {
        let _ = feeder.join();
    }
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok(Some(Said {
        status: output.status.code(),
        text,
    }))
}

/// What `qemu-img check` says of an image file. `None` when it isn't installed.
///
/// # Errors
/// Those of starting it.
pub fn check_file(format: &str, path: &Path) -> io::Result<Option<Said>> {
    run(
        "qemu-img",
        &["check", "-f", format, &path.to_string_lossy()],
        "",
    )
}

/// Whether the installed `qemu-img check` finds these bytes clean: `Ok(None)` when it isn't installed, or knows no
/// check for the format.
///
/// # Errors
/// What it found, in its own words.
pub fn check_bytes(format: &str, bytes: &[u8]) -> Result<Option<()>, String> {
    let file = TempFile::new(format, bytes).map_err(|error| error.to_string())?;
    match check_file(format, file.path()).map_err(|error| error.to_string())? {
        None => Ok(None),
        Some(said) if said.status == Some(0) => Ok(Some(())),
        Some(said) if said.status == Some(63) || said.text.contains("Unknown driver") => Ok(None),
        Some(said) => Err(said.text),
    }
}

/// A directory that is removed, with all that is in it, when this is dropped.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// A new, empty directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new(label: &str) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("iotests-{}-{number}-{label}.d", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
