//! `blk snapshot`: lists, takes, goes back to and removes the internal snapshots of an image.

use std::time::{SystemTime, UNIX_EPOCH};

use block_core::{BlockHandle, Error, ErrorKind, NewSnapshot, SnapshotKey, image::Progress};

use super::{
    Command,
    args::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, QUIET, one_image},
};
use crate::common::{
    failure::{Failure, Outcome},
    getopt::{Opt, Parsed},
    open::{self, Access},
    session::Session,
    snapshots,
};

pub const COMMAND: Command = Command {
    name: "snapshot",
    about: "List, create, apply or delete the internal snapshots of an image",
    usage: "[-q] [-f FMT | --image-opts] [-U] [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] FILE",
    options: &[
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        FORCE_SHARE,
        OBJECT,
        Opt::flag('l', "list", "list the snapshots (the default)"),
        Opt::value('c', "create", "SNAPSHOT", "take a snapshot of that name"),
        Opt::value(
            'a',
            "apply",
            "SNAPSHOT",
            "make the disk what it was, size included",
        ),
        Opt::value('d', "delete", "SNAPSHOT", "remove a snapshot"),
    ],
    run: |session, parsed| session.run(execute(session, parsed)),
};

/// The longest name that qemu's tools can show.
const MAX_NAME: usize = 255;

enum Action<'a> {
    List,
    Create(&'a str),
    Apply(&'a str),
    Delete(&'a str),
}

impl<'a> Action<'a> {
    fn read(parsed: &'a Parsed) -> Result<Self, Failure> {
        let given = ["list", "apply", "create", "delete"];
        let count: usize = given.iter().map(|name| parsed.count(name)).sum();
        if count > 1 {
            return Err(Failure::usage(
                "snapshot",
                "Cannot mix '-l', '-a', '-c', '-d'",
            ));
        }
        Ok(if let Some(name) = parsed.get("create") {
            Self::Create(name)
        } else if let Some(name) = parsed.get("apply") {
            Self::Apply(name)
        } else if let Some(name) = parsed.get("delete") {
            Self::Delete(name)
        } else {
            Self::List
        })
    }
}

/// Asks a long operation to stop when the command is interrupted.
struct StopOnDrop(Progress);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

async fn execute(session: &Session, parsed: &Parsed) -> Outcome {
    let action = Action::read(parsed)?;
    let image = one_image(parsed, "snapshot")?;
    let write = !matches!(action, Action::List);
    let access = Access {
        write,
        resize: write,
        force_share: parsed.has("force-share"),
        ..Access::default()
    };
    let handle = open::open(session, image, access).await?;
    let stop = StopOnDrop(Progress::new());
    let done = match action {
        Action::List => list(&handle).await,
        Action::Create(name) => create(&handle, name, &stop.0).await,
        Action::Apply(name) => handle
            .snapshot_apply(SnapshotKey::IdOrName(name.to_owned()), stop.0.clone())
            .await
            .map_err(|error| apply_failed(name, &error)),
        Action::Delete(name) => handle
            // As with qemu-img, an identifier won't do here.
            .snapshot_delete(SnapshotKey::Name(name.to_owned()), stop.0.clone())
            .await
            .map_err(|error| delete_failed(name, &error)),
    };
    done?;
    handle.close().await?;
    Ok(0)
}

async fn list(handle: &BlockHandle) -> Result<(), Failure> {
    let listed = handle.snapshot_list().await;
    match listed {
        // A format without snapshots has none.
        Err(error) if error.kind() == ErrorKind::NotSupported => Ok(()),
        Err(error) => Err(error.into()),
        Ok(listed) => {
            if !listed.is_empty() {
                snapshots::print("", &listed);
            }
            Ok(())
        }
    }
}

async fn create(handle: &BlockHandle, name: &str, progress: &Progress) -> Result<(), Failure> {
    let context = format!("Could not create snapshot '{name}'");
    if name.len() > MAX_NAME {
        return Err(Failure::new(format!(
            "{context}: the name has more than {MAX_NAME} bytes"
        )));
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let new = NewSnapshot {
        name: name.to_owned(),
        date_sec: now.as_secs() as u32,
        // In microseconds, as qemu has it.
        date_nsec: now.subsec_micros() * 1000,
        vm_clock_nsec: 0,
        icount: Some(0),
        vm_state_size: 0,
    };
    handle
        .snapshot_create(new, progress.clone())
        .await
        .map(drop)
        .map_err(|error| Failure::io(context, &error))
}

fn apply_failed(name: &str, error: &Error) -> Failure {
    let context = format!("Could not apply snapshot '{name}'");
    let words = error.kind().strerror();
    let says_all = error.kind() == ErrorKind::Busy
        || error.kind() == ErrorKind::NotSupported && error.reason() != words;
    if says_all {
        Failure::context(context, error)
    } else {
        Failure::io(format!("{context}: Failed to load snapshot"), error)
    }
}

fn delete_failed(name: &str, error: &Error) -> Failure {
    let context = format!("Could not delete snapshot '{name}'");
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotSupported => {
            Failure::new(format!("{context}: snapshot not found"))
        }
        _ => Failure::io(context, error),
    }
}
