//! The installed qemu tools as a second opinion: an image's bytes go to a temporary file, the tool's verdict comes back.
//! When a tool isn't there, that is said, never passed over.

use std::{
    fs,
    io::{self, Read, Seek as _, SeekFrom, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
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

/// A directory that is removed with everything in it when this is dropped.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// A new, empty directory.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new() -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("iotests-{}-{number}.d", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file in it, with holes where whole pages are zero, and gives its path.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn put(&self, name: &str, bytes: &[u8]) -> io::Result<PathBuf> {
        let path = self.0.join(name);
        let mut file = fs::File::create(&path)?;
        file.set_len(bytes.len() as u64)?;
        for (at, page) in bytes.chunks(4096).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                file.seek(SeekFrom::Start(at as u64 * 4096))?;
                file.write_all(page)?;
            }
        }
        Ok(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether a name is one file's in a directory, and nothing else.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0', ':'])
}

static FORBIDDEN: AtomicBool = AtomicBool::new(false);

/// From now on no tool is asked for a second opinion in this process.
pub fn forbid() {
    FORBIDDEN.store(true, Ordering::Relaxed);
}

/// The version that the installed qemu-img gives, if there is one and it may be asked.
pub fn version() -> Option<&'static str> {
    static VERSION: OnceLock<Option<String>> = OnceLock::new();
    if FORBIDDEN.load(Ordering::Relaxed) {
        return None;
    }
    let version = VERSION.get_or_init(|| {
        let said = run("qemu-img", &["--version"], "").ok()??;
        said.text.lines().next().map(str::to_owned)
    });
    version.as_deref()
}

/// Whether qemu-img may be asked and has a driver of that name, so that its opinion is of any worth.
pub fn knows(format: &str) -> bool {
    static FORMATS: OnceLock<Vec<String>> = OnceLock::new();
    if version().is_none() {
        return false;
    }
    let formats = FORMATS.get_or_init(|| {
        let help = run("qemu-img", &["--help"], "").ok().flatten();
        let text = help.map(|said| said.text).unwrap_or_default();
        // "Supported formats: raw …", or "Supported image formats:", a blank line, and the names on the lines below.
        let list = text.split_once("formats:").map(|(_, rest)| rest);
        let list = list.unwrap_or_default().split("See ").next();
        let names = list.unwrap_or_default().split_whitespace();
        names.map(str::to_owned).collect()
    });
    formats.iter().any(|known| known == format)
}

/// What a tool said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Its exit status; `None` when a signal ended it.
    pub status: Option<i32>,
    /// Both of its outputs.
    pub text: String,
}

/// How long a tool may take that nobody has set a limit for.
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs a program with `input` on its standard input. `None` when it isn't installed.
///
/// # Errors
/// Those of starting and feeding it.
pub fn run(program: &str, arguments: &[&str], input: &str) -> io::Result<Option<Said>> {
    run_for(program, arguments, input, PATIENCE)
}

/// [`run`] in a directory of its own: relative file names are in there.
pub(crate) fn run_in(dir: &Path, program: &str, arguments: &[&str]) -> io::Result<Option<Said>> {
    let mut command = Command::new(program);
    command.current_dir(dir).args(arguments);
    run_command(command, program, "", PATIENCE)
}

/// [`run`], for no longer than `patience`: then the program is killed.
///
/// # Errors
/// Those of starting and feeding it; `TimedOut`.
pub fn run_for(
    program: &str,
    arguments: &[&str],
    input: &str,
    patience: Duration,
) -> io::Result<Option<Said>> {
    let mut command = Command::new(program);
    command.args(arguments);
    run_command(command, program, input, patience)
}

fn run_command(
    mut command: Command,
    program: &str,
    input: &str,
    patience: Duration,
) -> io::Result<Option<Said>> {
    let child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.to_owned();
        // A program that ends early closes the pipe: that shows in its status.
        std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    }
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let deadline = Instant::now() + patience;
    let mut text = String::new();
    for output in [stdout, stderr].into_iter().flatten() {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(bytes) = output.recv_timeout(left) else {
            child.kill()?;
            child.wait()?;
            let what = format!("{program} hadn't ended after {} s", patience.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        };
        text.push_str(&String::from_utf8_lossy(&bytes));
    }
    Ok(Some(Said {
        status: child.wait()?.code(),
        text,
    }))
}

/// Everything that a pipe gives until it is closed.
fn collect(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (give, take) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is kept; a pipe whose reader has gone away is nobody's business.
        let _ = pipe.read_to_end(&mut bytes);
        let _ = give.send(bytes);
    });
    take
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
/// check for the format, or may not be asked.
///
/// # Errors
/// What it found, in its own words.
pub fn check_bytes(format: &str, bytes: &[u8]) -> Result<Option<()>, String> {
    if !knows(format) {
        return Ok(None);
    }
    let file = TempFile::new(format, bytes).map_err(|error| error.to_string())?;
    match check_file(format, file.path()).map_err(|error| error.to_string())? {
        None => Ok(None),
        Some(said) if said.status == Some(0) => Ok(Some(())),
        Some(said) if said.status == Some(63) || said.text.contains("Unknown driver") => Ok(None),
        Some(said) => Err(said.text),
    }
}
