//! `break`, `remove_break`, `resume` and `wait_break`: requests of an image over `blkdebug` stop at an event and go on when
//! they are told to.
//!
//! Where the other program would wait for ever (for a breakpoint that isn't set, or without `blkdebug`), this one refuses.

use block_core::{Error, ErrorKind};
use iotests::faults::Debugger;

use super::{
    commands::Outcome::{self, Done, Failed},
    session::Session,
};
use crate::common::output::say;

/// Runs one of the commands; `words` were counted.
pub async fn run(session: &Session, command: &str, words: &[String]) -> Outcome {
    let debugger = session.debugger();
    let debugger = debugger
        .as_deref()
        .ok_or_else(|| Error::from_kind(ErrorKind::NotSupported));
    let (what, result) = match (command, words) {
        ("break", [event, tag]) => (
            "Could not set breakpoint".to_owned(),
            debugger.and_then(|debugger| debugger.set_breakpoint(event, tag)),
        ),
        ("remove_break", [tag]) => (
            format!("Could not remove breakpoint {tag}"),
            debugger.and_then(|debugger| debugger.remove_breakpoint(tag)),
        ),
        ("resume", [tag]) => (
            "Could not resume request".to_owned(),
            debugger.and_then(|debugger| debugger.resume(tag)),
        ),
        (_, [tag]) => {
            let waited = match debugger {
                Ok(debugger) => wait(session, debugger, tag).await,
                Err(error) => Err(error),
            };
            ("Could not wait for breakpoint".to_owned(), waited)
        }
        _ => (command.to_owned(), Err(Error::invalid(""))),
    };
    match result {
        Ok(()) => Done,
        Err(error) => {
            say!("{what}: {}", error.kind().strerror());
            Failed
        }
    }
}

async fn wait(session: &Session, debugger: &Debugger, tag: &str) -> block_core::Result<()> {
    if !debugger.may_suspend(tag) {
        return Err(Error::from_kind(ErrorKind::NotFound));
    }
    session.drive(debugger.wait_suspended(tag)).await;
    Ok(())
}
