//! What is refused before anything is touched: ranges beyond the end or beyond all numbers, and requests that the node or
//! the handle doesn't permit; and that empty requests are none.

use std::sync::Arc;

use block_core::{
    BlockHandle, Capabilities, Error, ErrorKind, IoBuf, Operation, Options, RequestFlags,
    bitmap::DirtyBitmap, driver::Truncate, flags::Permissions,
};

use crate::{
    bench::{Bench, Outcome, Probe, case, must, not_covered, wrong},
    case::{Case, Group, Scene},
    storage::OpKind,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "rw-range-beyond-all-numbers-is-refused",
            "requests whose end overflows, or lies beyond the largest offset, fail with EIO for every kind; the driver, the \
             bitmaps and the content notice nothing",
            overflow,
        ),
        case(
            Group::Rw,
            "rw-empty-requests-reach-no-driver",
            "empty requests of every kind succeed up to the end of the disk and fail beyond it, and no driver is called",
            empty,
        ),
        case(
            Group::Rw,
            "rw-too-long-data-request-is-refused",
            "a read or write of 2 GiB or more fails before anything happens, a zero write of that length isn't too long",
            too_long,
        ),
        case(
            Group::Rw,
            "rw-handle-without-resize-permission-never-grows-the-disk",
            "writes past the end through a handle that may not resize fail, also where the driver could grow",
            no_growth,
        ),
        case(
            Group::Rw,
            "rw-write-past-the-end-grows-the-disk",
            "where writes grow the disk, what lies between the old end and the write reads as zeroes, and zero writes grow \
             it too, but reads and discards don't",
            growth,
        ),
        case(
            Group::Rw,
            "rw-refusal-names-node-operation-and-range",
            "a refused request's error says on which node, in which operation and where",
            named,
        ),
        case(
            Group::Rw,
            "rw-read-only-node-refuses-every-change-by-kind",
            "every kind of change of a read-only image is refused with EPERM and nothing is written to its storage",
            read_only,
        ),
        case(
            Group::Rw,
            "rw-handle-without-write-permission-can-only-read",
            "through a handle without the permission every kind of change is refused with its name, and reads work",
            no_permission,
        ),
    ]
}

/// One request of each kind over a range.
async fn every_kind(
    handle: &BlockHandle,
    offset: u64,
    len: u64,
) -> Vec<(&'static str, Result<(), Error>)> {
    let none = RequestFlags::empty();
    let zeroes = IoBuf::zeroes(len as usize);
    vec![
        ("write", handle.write(offset, zeroes.clone(), none).await),
        ("zero write", handle.write_zeroes(offset, len, none).await),
        (
            "zero write by flag",
            handle.write(offset, zeroes, RequestFlags::ZERO_WRITE).await,
        ),
        ("discard", handle.discard(offset, len).await),
        ("read", handle.read(offset, len as usize).await.map(drop)),
    ]
}

/// All of them failed like that.
fn all_failed(results: &[(&str, Result<(), Error>)], kind: ErrorKind, when: &str) -> Outcome {
    for (name, result) in results {
        match result {
            Err(error) if error.kind() == kind => {}
            other => return wrong(format!("{name} {when}: {other:?}")),
        }
    }
    Ok(())
}

async fn overflow(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, 2 * bench.cluster).await?;
    let topped = bench.through(Probe::new())?;
    let bitmap = Arc::new(DirtyBitmap::new(bench.size(), 4096)?);
    topped.node.add_bitmap(bitmap.clone());
    let largest = (1u64 << 63) - (1 << 30);
    for offset in [
        u64::MAX,
        u64::MAX - 511,
        (1 << 63) - 512,
        largest - 511,
        largest,
    ] {
        let results = every_kind(&bench.handle, offset, 512).await;
        all_failed(&results, ErrorKind::Io, &format!("at {offset:#x}"))?;
    }
    for (what, result) in [
        (
            "zero write",
            bench
                .handle
                .write_zeroes(512, u64::MAX, RequestFlags::empty())
                .await,
        ),
        ("discard", bench.handle.discard(512, u64::MAX).await),
        ("discard", bench.handle.discard(0, u64::MAX).await),
    ] {
        all_failed(&[(what, result)], ErrorKind::Io, "of all there is")?;
    }
    let calls = topped.probe.take();
    must(calls.is_empty(), || {
        format!("the driver was called: {calls:?}")
    })?;
    must(bitmap.dirty_granules() == 0, || {
        "a bitmap has recorded it".into()
    })?;
    must(topped.node.tracker().in_flight() == 0, || {
        "something is tracked".into()
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn empty(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.cluster).await?;
    let topped = bench.through(Probe::new().aligned(512))?;
    let size = bench.size();
    for offset in [0, 1, 700, size - 1, size] {
        for (name, result) in every_kind(&bench.handle, offset, 0).await {
            must(result.is_ok(), || {
                format!("an empty {name} at {offset:#x}: {result:?}")
            })?;
        }
    }
    for offset in [size + 1, size + 512, u64::MAX] {
        let results = every_kind(&bench.handle, offset, 0).await;
        all_failed(
            &results,
            ErrorKind::Io,
            &format!("of nothing at {offset:#x}"),
        )?;
    }
    let calls = topped.probe.take();
    must(calls.is_empty(), || {
        format!("the driver was called: {calls:?}")
    })?;
    bench.take_off(topped).await?;
    bench.finish().await
}

async fn too_long(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.cluster).await?;
    let none = RequestFlags::empty();
    let len = 1u64 << 31;
    let before = bench.disk.log_position();
    let long = IoBuf::zeroes(len as usize);
    match bench.handle.write(0, long.clone(), none).await {
        Err(error) if error.kind() == ErrorKind::Io && error.reason().contains("2 GiB") => {}
        other => return wrong(format!("a write of 2 GiB: {other:?}")),
    }
    // The length is what is refused first, not the end; and only of data.
    match bench.handle.write(0, long, RequestFlags::ZERO_WRITE).await {
        Err(error) if error.kind() == ErrorKind::Io && !error.reason().contains("2 GiB") => {}
        Ok(()) if bench.capabilities().contains(Capabilities::GROW) => {
            // It has grown: that is all that is to be said here.
            return not_covered("zero writes past the end grow the node");
        }
        other => return wrong(format!("a zero write of 2 GiB: {other:?}")),
    }
    must(bench.disk.log_since(before).is_empty(), || {
        "the storage was reached".into()
    })?;
    bench.finish().await
}

async fn no_growth(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let size = bench.size();
    let may = Permissions::CONSISTENT_READ | Permissions::WRITE;
    let handle = bench.attach(may, Permissions::all(), "no resize")?;
    let before = bench.disk.log_position();
    for (offset, len) in [
        (size, 512),
        (size - 512, 1024),
        (size - 1, 2),
        (size + 4096, 1),
    ] {
        let results = every_kind(&handle, offset, len).await;
        all_failed(&results, ErrorKind::Io, &format!("at {offset:#x}+{len:#x}"))?;
    }
    must(bench.disk.log_since(before).is_empty(), || {
        "the storage was reached".into()
    })?;
    drop(handle);
    bench.finish().await
}

async fn growth(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 2).await?;
    bench.needs(Capabilities::GROW)?;
    bench.write(0, bench.size()).await?;
    let bitmap = Arc::new(DirtyBitmap::new(bench.size(), 4096)?);
    bench.node.add_bitmap(bitmap.clone());
    let old = bench.size();
    for refused in [
        bench.handle.discard(old, 512).await,
        bench.handle.read(old, 512).await.map(drop),
    ] {
        all_failed(&[("it", refused)], ErrorKind::Io, "past the end")?;
    }
    // Across the end, beyond it, and as zeroes.
    let data = bench.data(old - 512, 1024);
    bench.resized(old + 8192);
    bench
        .handle
        .write(old - 512, data.clone(), RequestFlags::empty())
        .await?;
    bench.expect(old - 512, &data);
    let data = bench.data(old + 4096, 512);
    bench
        .handle
        .write(old + 4096, data.clone(), RequestFlags::empty())
        .await?;
    bench.expect(old + 4096, &data);
    bench
        .handle
        .write_zeroes(old + 7680, 512, RequestFlags::empty())
        .await?;
    bench.check_all("after growing").await?;
    let length = bitmap.length();
    must(length == bench.size(), || {
        format!("the bitmap covers {length} bytes")
    })?;
    must(
        bitmap.is_dirty(old + 4096) && bitmap.is_dirty(old - 512),
        || "the bitmap doesn't know of the writes".into(),
    )?;
    bench.node.remove_bitmap(&bitmap);
    bench.finish().await
}

async fn named(scene: Arc<Scene>) -> Outcome {
    let bench = Bench::new(&scene, 2).await?;
    let size = bench.size();
    let none = RequestFlags::empty();
    let may = Permissions::CONSISTENT_READ | Permissions::WRITE;
    let handle = bench.attach(may, Permissions::all(), "guest")?;
    let errors = [
        (
            Operation::Write,
            handle.write(size, vec![1; 24], none).await,
        ),
        (
            Operation::WriteZeroes,
            handle.write_zeroes(size, 24, none).await,
        ),
        (Operation::Discard, handle.discard(size, 24).await),
        (Operation::Read, handle.read(size, 24).await.map(drop)),
    ];
    for (operation, result) in errors {
        let Err(error) = result else {
            return wrong(format!("a {operation} past the end succeeded"));
        };
        let right = error.operation() == Some(operation)
            && error.range() == Some((size, 24))
            && error.node() == Some(bench.node.name());
        must(right, || format!("the error of a {operation} says {error}"))?;
    }
    drop(handle);
    bench.finish().await
}

async fn read_only(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let bench = bench
        .reopen_with(Options::new().with("read-only", true))
        .await?;
    let before = bench.disk.log_position();
    let results = every_kind(&bench.handle, 0, bench.cluster).await;
    let (changes, reads) = results.split_at(4);
    all_failed(changes, ErrorKind::NotPermitted, "of a read-only image")?;
    must(reads[0].1.is_ok(), || format!("a read: {:?}", reads[0].1))?;
    let data = IoBuf::from(vec![1; bench.cluster as usize]);
    let others = vec![
        (
            "resize",
            bench
                .handle
                .truncate(2 * bench.size(), Truncate::default())
                .await,
        ),
        (
            "compressed write",
            bench
                .handle
                .write(0, data, RequestFlags::WRITE_COMPRESSED)
                .await,
        ),
    ];
    all_failed(&others, ErrorKind::NotPermitted, "of a read-only image")?;
    bench.handle.flush().await?;
    let changes = |kind| !matches!(kind, OpKind::Read | OpKind::Flush);
    let reached = bench.disk.log_since(before);
    must(!reached.iter().any(|entry| changes(entry.op.kind)), || {
        "the storage of a read-only image was written to".into()
    })?;
    bench.finish().await
}

async fn no_permission(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let reader = bench.attach(Permissions::CONSISTENT_READ, Permissions::all(), "reader")?;
    let before = bench.disk.log_position();
    let mut results = every_kind(&reader, 0, 512).await;
    must(results.pop().is_some_and(|read| read.1.is_ok()), || {
        "it can't read".into()
    })?;
    results.push((
        "change of the header",
        reader.change_backing(None, None).await,
    ));
    results.push(("emptying", reader.make_empty().await));
    let (lent, buf) = block_core::Buffer::try_new(512)?.lend();
    results.push((
        "copying read",
        reader.readv(0, buf, RequestFlags::COPY_ON_READ).await,
    ));
    drop(lent);
    all_failed(&results, ErrorKind::NotPermitted, "without permission")?;
    for (name, result) in &results {
        let text = result
            .as_ref()
            .err()
            .map(ToString::to_string)
            .unwrap_or_default();
        must(text.contains("'reader'") && text.contains("write"), || {
            format!("the refusal of a {name} says: {text}")
        })?;
    }
    match reader.truncate(0, Truncate::default()).await {
        Err(error) if error.to_string().contains("'resize'") => {}
        other => return wrong(format!("a resize without permission: {other:?}")),
    }
    let reached = bench.disk.log_since(before);
    must(
        reached.iter().all(|entry| entry.op.kind == OpKind::Read),
        || "the storage was written to".into(),
    )?;
    drop(reader);
    bench.finish().await
}
