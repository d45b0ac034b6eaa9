//! Making a file for a new image. An image that somebody uses is refused before anything happens to it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
};

use block_core::{
    driver::Preallocation,
    error::{Error, ErrorKind, Operation, Result},
    flags::{PermissionSet, Permissions},
};

use crate::{
    fd_sets::FdSets,
    image_lock::{ImageLock, Locking},
    open_file::{FileKind, OpenFile, OpenHow, open_error},
    options::FileCreateOptions,
    space, sys,
};

/// What creation does to the file, and what it lets others do meanwhile (digest of locking, section 4).
const PERMISSIONS: PermissionSet = PermissionSet::new(
    Permissions::WRITE.union(Permissions::RESIZE),
    Permissions::all().difference(Permissions::RESIZE),
);

/// The error of a resize that no file can do, if this is one.
pub(crate) fn check_preallocation(preallocation: Preallocation, old: u64, new: u64) -> Result<()> {
    match preallocation {
        Preallocation::Metadata => Err(Error::unsupported(
            "Unsupported preallocation mode: metadata",
        )),
        Preallocation::Falloc | Preallocation::Full if new < old => Err(Error::invalid(
            "Preallocation can only be used for growing images",
        )),
        _ => Ok(()),
    }
}

/// Makes (or empties) a regular file. Blocks.
pub(crate) fn create(path: &str, options: &FileCreateOptions) -> Result<()> {
    let fail = |error: io::Error| {
        Error::from(error)
            .context(format_args!("Could not create '{path}'"))
            .with_file(path)
            .with_operation(Operation::Create, 0, 0)
    };
    check_preallocation(options.preallocation, 0, options.size.0)?;
    let extent_size = options.extent_size_hint.bytes()?;
    // Not truncated by opening: first it has to be known that nobody uses it.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o644)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .map_err(fail)?;
    let how = OpenHow {
        path: path.to_owned(),
        device: false,
        read_only: false,
        auto_read_only: false,
        direct: false,
    };
    let file = how.adopt(file, true)?;
    let lock = ImageLock::new(Locking::Auto, path, false);
    lock.prepare(&file, PERMISSIONS)?;
    lock.commit(&file);
    let made = fill(&file, options, extent_size).map_err(|error| {
        Error::from(error)
            .context(space::resize_failure(options.preallocation))
            .with_file(path)
            .with_operation(Operation::Create, 0, options.size.0)
    });
    lock.release(&file);
    made
}

fn fill(file: &OpenFile, options: &FileCreateOptions, extent_size: u32) -> io::Result<()> {
    empty(file)?;
    if options.nocow.0 {
        // A hint that only btrfs takes; elsewhere there is nothing to turn off.
        let _ = sys::set_no_cow(file.as_fd());
    }
    if extent_size > 0 {
        // Another hint, for file systems that know of extent sizes.
        let _ = sys::set_extent_size(file.as_fd(), extent_size);
    }
    space::resize(file, options.size.0, options.preallocation)
}

fn empty(file: &File) -> io::Result<()> {
    file.set_len(0)
}

/// A device can't be made: it must be there, nobody may be using it, and it must be large enough. Blocks.
pub(crate) fn check_device(path: &str, options: &FileCreateOptions) -> Result<()> {
    check_preallocation(options.preallocation, 0, options.size.0)?;
    let how = OpenHow {
        path: path.to_owned(),
        device: true,
        read_only: false,
        auto_read_only: false,
        direct: false,
    };
    let file = how.open(&FdSets::new())?;
    let lock = ImageLock::new(Locking::Auto, path, false);
    lock.prepare(&file, PERMISSIONS)?;
    lock.commit(&file);
    let ready = ready_device(&file, path, options);
    lock.release(&file);
    ready
}

fn ready_device(file: &OpenFile, path: &str, options: &FileCreateOptions) -> Result<()> {
    let length = file
        .query_length()
        .map_err(|error| open_error(path, error))?;
    if file.kind() != FileKind::Block {
        return Ok(());
    }
    if length < options.size.0 {
        return Err(Error::new(ErrorKind::NoSpace, "Cannot grow device files")
            .with_file(path)
            .with_operation(Operation::Create, 0, options.size.0)
            .with_field("size", options.size.0, format!("at most {length}")));
    }
    // What was there before must not be taken for the format of the new image.
    let head = file.offset_alignment().max(512).min(length);
    space::write_buffer_zeroes(file, 0, head).map_err(|error| {
        Error::from(error)
            .context(format_args!(
                "Could not clear the new image's first sector in '{path}'"
            ))
            .with_file(path)
            .with_operation(Operation::Create, 0, head)
    })
}
