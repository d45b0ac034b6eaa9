//! Clusters that an internal snapshot shares: whatever is written, the snapshot keeps what it had, and the disk can be made
//! that again.

use std::sync::Arc;

use block_core::{
    Capabilities, ErrorKind, RequestFlags,
    image::Progress,
    snapshot::{NewSnapshot, SnapshotKey},
};

use crate::{
    bench::{Bench, Outcome, case, not_covered},
    case::{Case, Group, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    vec![case(
        Group::Rw,
        "cluster-shared-with-a-snapshot-is-never-changed",
        "clusters that a snapshot shares are copied when they are written in whole or in part, zeroed or discarded: the \
         snapshot has what it had, as often as it is applied",
        shared,
    )]
}

async fn shared(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 12).await?;
    bench.needs(Capabilities::SNAPSHOTS)?;
    let cluster = bench.cluster;
    let which = || SnapshotKey::Name("kept".into());
    bench.write(0, 8 * cluster).await?;
    bench.handle.flush().await?;
    let new = NewSnapshot {
        name: "kept".into(),
        ..NewSnapshot::default()
    };
    match bench.handle.snapshot_create(new, Progress::new()).await {
        Ok(_) => {}
        // An option of the image: a refcount of one bit counts one owner.
        Err(error) if error.kind() == ErrorKind::InvalidInput => {
            return not_covered("nothing in this image can be shared");
        }
        Err(error) => return Err(error.into()),
    }
    let kept = bench.model.clone();
    for round in 0..2 {
        // What was read before may be written where it is remembered to be.
        bench.check_all("shared").await?;
        bench.write(cluster, cluster).await?;
        bench.write(2 * cluster + 512, 1024).await?;
        // The copy is the disk's own: it is written in place.
        bench.write(2 * cluster + 1024, 2048).await?;
        bench
            .zero(3 * cluster, cluster, RequestFlags::empty())
            .await?;
        bench
            .zero(4 * cluster, cluster, RequestFlags::MAY_UNMAP)
            .await?;
        if bench.capabilities().contains(Capabilities::DISCARD) {
            bench.discard(5 * cluster, cluster).await?;
        }
        bench.write(6 * cluster + 100, cluster).await?;
        bench.write(9 * cluster, cluster).await?;
        bench.check_all("written beside the snapshot").await?;
        if round == 0 {
            bench.handle.flush().await?;
        }
        bench.own_check().await?;
        bench
            .handle
            .snapshot_apply(which(), Progress::new())
            .await?;
        bench.model.clone_from(&kept);
        bench.check_all("the snapshot").await?;
    }
    bench.write(7 * cluster + 1, 100).await?;
    bench
        .handle
        .snapshot_delete(which(), Progress::new())
        .await?;
    bench.write(0, 100).await?;
    bench.finish().await
}
