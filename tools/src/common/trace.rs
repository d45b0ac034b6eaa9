//! `--trace FILE`: the requests of every image that a command opens are recorded (format: `iotests::trace::format`), and
//! `iotests replay FILE` runs them again. A thread of its own writes the file, so that recording costs a request no I/O.

use std::{
    fs::File,
    io::Write,
    sync::{Arc, OnceLock, mpsc},
    thread::JoinHandle,
};

use block_core::{DriverKind, Graph};
use iotests::trace::Recorder;
use parking_lot::Mutex;

use super::failure::Failure;

/// What was asked for on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceOptions {
    file: String,
    hashes: bool,
}

static WANTED: OnceLock<TraceOptions> = OnceLock::new();

/// The trace that the command line asked for.
pub fn wanted() -> Option<&'static TraceOptions> {
    WANTED.get()
}

/// Remembers what was asked for.
pub fn want(options: TraceOptions) {
    let _ = WANTED.set(options);
}

/// Takes `--trace FILE`, `--trace=FILE` and `--trace-hashes` out of the arguments, wherever they stand before a `--`.
///
/// # Errors
/// The message for an option without a file.
pub fn take(args: Vec<String>) -> Result<(Option<TraceOptions>, Vec<String>), String> {
    let mut file = None;
    let mut hashes = false;
    let mut left = Vec::with_capacity(args.len());
    let mut rest = args.into_iter();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            left.push(arg);
            left.extend(rest.by_ref());
        } else if arg == "--trace" {
            let name = rest.next().ok_or("--trace: a file name is missing")?;
            file = Some(name);
        } else if let Some(name) = arg.strip_prefix("--trace=") {
            file = Some(name.to_owned());
        } else if arg == "--trace-hashes" {
            hashes = true;
        } else {
            left.push(arg);
        }
    }
    if hashes && file.is_none() {
        return Err("--trace-hashes: only together with --trace FILE".into());
    }
    Ok((file.map(|file| TraceOptions { file, hashes }), left))
}

/// A trace that is being written.
pub struct Tracing {
    file: String,
    recorder: Arc<Recorder>,
    pieces: Arc<Mutex<Option<mpsc::Sender<Vec<u8>>>>>,
    writer: Option<JoinHandle<std::io::Result<()>>>,
}

impl Tracing {
    /// Records every format node that comes into `graph` from now on.
    ///
    /// # Errors
    /// The file can't be made.
    pub fn start(graph: &Arc<Graph>, options: &TraceOptions) -> Result<Self, Failure> {
        let failed = |error| Failure::new(format!("Could not create '{}': {error}", options.file));
        let mut out = File::create(&options.file).map_err(failed)?;
        let (pieces, written) = mpsc::channel::<Vec<u8>>();
        let writer = std::thread::Builder::new()
            .name("trace".into())
            .spawn(move || written.iter().try_for_each(|piece| out.write_all(&piece)))
            .map_err(failed)?;
        let pieces = Arc::new(Mutex::new(Some(pieces)));
        let sink = pieces.clone();
        let recorder = Recorder::new(graph.env(), options.hashes, move |piece| {
            if let Some(pieces) = &*sink.lock() {
                // The writer is gone when the file can't be written: `finish` says so.
                let _ = pieces.send(piece);
            }
        });
        let recording = recorder.clone();
        graph.on_new_node(move |node| {
            if node.driver().kind() == DriverKind::Format {
                recording.attach(node);
            }
        });
        Ok(Self {
            file: options.file.clone(),
            recorder,
            pieces,
            writer: Some(writer),
        })
    }

    /// Writes what is left.
    ///
    /// # Errors
    /// The file couldn't be written.
    pub fn finish(mut self) -> Result<(), Failure> {
        self.recorder.finish();
        self.pieces.lock().take();
        let result = match self.writer.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(std::io::Error::other("the writing thread panicked")),
            None => Ok(()),
        };
        result.map_err(|error| Failure::new(format!("Could not write '{}': {error}", self.file)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(args: &[&str]) -> Result<(Option<TraceOptions>, Vec<String>), String> {
        take(args.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_option_is_found_anywhere_before_the_end_of_options() {
        let options = |hashes| {
            Some(TraceOptions {
                file: "t".into(),
                hashes,
            })
        };
        let rest = vec!["io".to_string(), "a".into()];
        assert_eq!(
            taken(&["--trace", "t", "io", "a"]),
            Ok((options(false), rest.clone()))
        );
        assert_eq!(
            taken(&["io", "--trace=t", "--trace-hashes", "a"]),
            Ok((options(true), rest))
        );
        let behind = vec!["io".to_string(), "--".into(), "--trace".into()];
        assert_eq!(taken(&["io", "--", "--trace"]), Ok((None, behind)));
    }

    #[test]
    fn an_option_without_its_file_is_refused() {
        assert!(taken(&["io", "--trace"]).is_err());
        assert!(taken(&["io", "--trace-hashes"]).is_err());
    }
}
