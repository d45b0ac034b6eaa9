//! Compressed writes: what takes them, what is refused, and that compressed clusters which share a place don't harm each
//! other.

use std::sync::Arc;

use block_core::{Capabilities, ErrorKind, IoBuf, RequestFlags, status::StatusFlags};

use crate::{
    bench::{Bench, Outcome, case, must, not_covered, wrong},
    case::{Case, Group, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Rw,
            "rw-compressed-write-where-there-is-none",
            "a compressed write fails with ENOTSUP before anything is touched where the format has no compression",
            unsupported,
        ),
        case(
            Group::Rw,
            "rw-compressed-zero-write-is-refused",
            "a zero write can't be compressed: it is refused as invalid, through either call",
            zeroes,
        ),
        case(
            Group::Rw,
            "rw-compressed-write-of-whole-clusters",
            "clusters that were written compressed read back, are reported as compressed when that made them smaller, and \
             what can't be compressed is stored all the same",
            whole,
        ),
        case(
            Group::Rw,
            "rw-compressed-write-of-a-part-is-refused",
            "a compressed write that isn't made of whole clusters is refused as invalid and changes nothing",
            partial,
        ),
        case(
            Group::Rw,
            "rw-compressed-write-over-data",
            "a compressed write to a cluster that has data either replaces it or fails and leaves it",
            over_data,
        ),
        case(
            Group::Rw,
            "rw-compressed-last-cluster-of-unaligned-disk",
            "the last cluster of a disk that ends inside of it can be written compressed",
            tail,
        ),
        case(
            Group::Rw,
            "rw-compressed-neighbours-survive-each-others-changes",
            "overwriting, zeroing and discarding compressed clusters one after the other never harms those that share their \
             place in the storage",
            neighbours,
        ),
    ]
}

/// Data that shrinks to almost nothing, and still differs from place to place.
fn small(seq: u8, len: u64) -> Vec<u8> {
    let mut data = vec![seq | 1; len as usize];
    data[7] = seq ^ 0x55 | 1;
    data
}

async fn unsupported(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    if bench.capabilities().contains(Capabilities::COMPRESSED) {
        return not_covered("the driver has compressed");
    }
    bench.write(0, bench.size()).await?;
    let position = bench.disk.log_position();
    let data = small(1, bench.cluster);
    match bench
        .handle
        .write(0, data, RequestFlags::WRITE_COMPRESSED)
        .await
    {
        Err(error) if error.kind() == ErrorKind::NotSupported => {}
        other => return wrong(format!("a compressed write: {other:?}")),
    }
    must(bench.disk.log_since(position).is_empty(), || {
        "the storage was reached".into()
    })?;
    bench.finish().await
}

async fn zeroes(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.write(0, bench.size()).await?;
    let len = bench.cluster;
    let flags = RequestFlags::WRITE_COMPRESSED;
    let both = flags | RequestFlags::ZERO_WRITE;
    for result in [
        bench.handle.write_zeroes(0, len, flags).await,
        bench
            .handle
            .write(0, IoBuf::zeroes(len as usize), both)
            .await,
    ] {
        match result {
            Err(error) if error.kind() == ErrorKind::InvalidInput => {}
            other => return wrong(format!("a compressed zero write: {other:?}")),
        }
    }
    bench.finish().await
}

async fn whole(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 16).await?;
    bench.needs(Capabilities::COMPRESSED)?;
    let cluster = bench.cluster;
    let flags = RequestFlags::WRITE_COMPRESSED;
    let data = small(3, 3 * cluster);
    bench.handle.write(cluster, data.clone(), flags).await?;
    bench.expect(cluster, &data);
    // This has no pattern that could be found.
    bench.write_with(6 * cluster, 2 * cluster, flags).await?;
    bench.check_all("after compressed writes").await?;
    let status = bench.handle.block_status(cluster, cluster).await?;
    must(
        status.is_data() && status.flags.contains(StatusFlags::COMPRESSED),
        || format!("a compressed cluster: {:?}", status.flags),
    )?;
    must(!status.flags.contains(StatusFlags::OFFSET_VALID), || {
        "a compressed cluster is said to be found at an offset".into()
    })?;
    let status = bench.handle.block_status(6 * cluster, cluster).await?;
    must(status.is_data(), || {
        format!("the other: {:?}", status.flags)
    })?;
    bench
        .check_range(cluster + 100, 2 * cluster, "from inside to inside")
        .await?;
    let bench = bench.reopen().await?;
    bench.check_all("opened again").await?;
    bench.finish().await
}

async fn partial(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 4).await?;
    bench.needs(Capabilities::COMPRESSED)?;
    bench.write(0, 100).await?;
    let cluster = bench.cluster;
    let flags = RequestFlags::WRITE_COMPRESSED;
    for (offset, len) in [
        (cluster, 256),
        (cluster, cluster + 256),
        (cluster + 256, cluster),
        (2 * cluster - 1, 2),
    ] {
        match bench
            .handle
            .write(offset, small(1, len.max(8)), flags)
            .await
        {
            Err(error) if error.kind() == ErrorKind::InvalidInput => {}
            other => {
                return wrong(format!(
                    "a compressed write at {offset:#x}+{len:#x}: {other:?}"
                ));
            }
        }
    }
    bench.finish().await
}

async fn over_data(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    bench.needs(Capabilities::COMPRESSED)?;
    let cluster = bench.cluster;
    let flags = RequestFlags::WRITE_COMPRESSED;
    bench.write(0, 2 * cluster).await?;
    let first = small(9, cluster);
    bench
        .handle
        .write(2 * cluster, first.clone(), flags)
        .await?;
    bench.expect(2 * cluster, &first);
    for at in [0, 2] {
        for data in [small(5, cluster), bench.data(at * cluster, cluster)] {
            if bench
                .handle
                .write(at * cluster, data.clone(), flags)
                .await
                .is_ok()
            {
                bench.expect(at * cluster, &data);
            }
            bench
                .check_all("after a compressed write over data")
                .await?;
        }
    }
    bench.finish().await
}

async fn tail(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::with_size(&scene, |cluster| 3 * cluster + 1536).await?;
    bench.needs(Capabilities::COMPRESSED)?;
    let at = 3 * bench.cluster;
    let data = small(7, bench.size() - at);
    bench
        .handle
        .write(at, data.clone(), RequestFlags::WRITE_COMPRESSED)
        .await?;
    bench.expect(at, &data);
    bench.check_all("after the write").await?;
    let mut bench = bench.reopen().await?;
    bench.write(at + 100, 1000).await?;
    bench.check_all("after a write into it").await?;
    bench.finish().await
}

async fn neighbours(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 16).await?;
    bench.needs(Capabilities::COMPRESSED)?;
    let cluster = bench.cluster;
    for at in 0..12 {
        let data = small(at as u8 * 2 + 1, cluster);
        let flags = RequestFlags::WRITE_COMPRESSED;
        bench
            .handle
            .write(at * cluster, data.clone(), flags)
            .await?;
        bench.expect(at * cluster, &data);
    }
    bench.handle.flush().await?;
    let none = RequestFlags::empty();
    bench.write(cluster + 512, 100).await?;
    bench.check_all("after a write into one").await?;
    bench.write(3 * cluster, cluster).await?;
    bench.check_all("after a write over one").await?;
    bench
        .zero(5 * cluster, cluster, RequestFlags::MAY_UNMAP)
        .await?;
    bench.zero(6 * cluster, cluster, none).await?;
    bench.check_all("after zero writes").await?;
    bench.discard(8 * cluster, 2 * cluster).await?;
    bench.handle.flush().await?;
    // What was freed is used again.
    bench.write(12 * cluster, 4 * cluster).await?;
    bench.check_all("after new clusters").await?;
    bench.finish().await
}
