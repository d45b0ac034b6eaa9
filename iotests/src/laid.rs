//! Images of a simulated world as real files in a directory of their own, for the installed tools. It runs the tools, and
//! leaves it to others what their answers mean.

use std::{
    fs, io,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use crate::{
    case::Failure,
    external::{self, Said, TempDir},
    lab::Lab,
    parts::ToolImage,
    storage::Content,
};

/// A directory with images in it.
pub(crate) struct Laid<'a> {
    lab: &'a Lab,
    format: &'a str,
    dir: TempDir,
}

fn broken(error: io::Error) -> Failure {
    Failure(format!("a temporary directory: {error}"))
}

/// Writes a file, holes as holes.
fn write(path: &Path, content: &Content) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.set_len(content.len())?;
    let mut at = 0;
    while at < content.len() {
        let (data, len) = content.run(at, content.len() - at);
        if data {
            let mut bytes = vec![0; len as usize];
            content.read(at, &mut bytes);
            file.seek(SeekFrom::Start(at))?;
            file.write_all(&bytes)?;
        }
        at += len;
    }
    Ok(())
}

impl<'a> Laid<'a> {
    /// An empty directory for images of `format`.
    pub fn new(lab: &'a Lab, format: &'a str) -> Result<Self, Failure> {
        let dir = TempDir::new().map_err(broken)?;
        Ok(Self { lab, format, dir })
    }

    /// The file with that name.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts an image there, with its data file.
    pub fn put(&self, name: &str, content: &Content) -> Result<(), Failure> {
        for (name, content) in self.lab.files_of(name, content) {
            write(&self.path(&name), &content).map_err(broken)?;
        }
        Ok(())
    }

    /// Puts bytes there.
    pub fn put_bytes(&self, name: &str, bytes: &[u8]) -> Result<String, Failure> {
        let path = self.dir.put(name, bytes).map_err(broken)?;
        Ok(path.to_string_lossy().into_owned())
    }

    /// How the tools are told of an image.
    pub fn image(&self, name: &str) -> ToolImage {
        self.lab
            .tool_image(self.format, name, self.dir.path(), false)
    }

    /// Runs qemu-img on an image. `None` when it isn't installed or has no driver for the format.
    pub fn img(&self, name: &str, command: &[&str]) -> Result<Option<Said>, Failure> {
        if !external::knows(self.format) {
            return Ok(None);
        }
        let image = self.image(name);
        external::run("qemu-img", &image.arguments(command), "").map_err(broken)
    }

    /// Runs `qemu-img check`, and fails unless it calls the image clean, or has no check for the format. Leaks are allowed
    /// when `leaks` says so.
    pub fn check(&self, name: &str, leaks: bool) -> Result<(), Failure> {
        match self.img(name, &["check"])? {
            Some(said) if said.status == Some(3) && leaks => Ok(()),
            Some(said) if !matches!(said.status, Some(0 | 63)) => {
                Err(Failure(format!("qemu-img check: {}", said.text)))
            }
            _ => Ok(()),
        }
    }

    /// Fails unless qemu-img reads these bytes from an image.
    pub fn compare(&self, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        let ours = self.put_bytes("iotests-shown.raw", bytes)?;
        if !external::knows(self.format) {
            return Ok(());
        }
        let image = self.image(name);
        let mut arguments = image.arguments(&["compare", "-F", "raw"]);
        arguments.push(&ours);
        let said = external::run("qemu-img", &arguments, "").map_err(broken)?;
        match said {
            Some(said) if said.status != Some(0) => {
                Err(Failure(format!("qemu-img compare: {}", said.text.trim())))
            }
            _ => Ok(()),
        }
    }
}

/// What the installed qemu-img's check says of an image without a backing file.
pub(crate) fn check(
    lab: &Lab,
    format: &str,
    name: &str,
    content: &Content,
    leaks: bool,
) -> Result<(), Failure> {
    if !external::knows(format) {
        return Ok(());
    }
    let laid = Laid::new(lab, format)?;
    laid.put(name, content)?;
    laid.check(name, leaks)
}
