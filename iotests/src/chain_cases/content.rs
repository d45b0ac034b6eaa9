//! What a guest reads and writes through a chain: each layer's own, zeroes beyond the ends, whole clusters copied up, and
//! nothing written below; and which file an image names as its backing file.

use std::sync::Arc;

use block_core::{Capabilities, ErrorKind, Options, RequestFlags};

use crate::{
    bench::{Bench, Outcome, case, must, not_covered, wrong},
    case::{Case, Group, Scene},
    storage::Disk,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            Group::Backing,
            "backing-one-read-over-many-layers",
            "one read over clusters of different layers, beginning and ending inside of them, puts each layer's bytes in place",
            over_layers,
        ),
        case(
            Group::Backing,
            "backing-ten-layers",
            "through ten overlays with a cluster each, every byte is the topmost layer's that has it",
            ten_layers,
        ),
        case(
            Group::Backing,
            "backing-small-writes-copy-up-from-every-layer",
            "small writes into clusters of every layer copy the rest of the cluster up, and no layer below is written to",
            copy_up,
        ),
        case(
            Group::Backing,
            "backing-write-over-the-end-of-a-shorter-one",
            "a write into the cluster in which a shorter backing file ends fills the rest with its data and then zeroes",
            over_the_end,
        ),
        case(
            Group::Backing,
            "backing-grown-overlay-doesnt-show-a-longer-one",
            "an overlay that grows over a longer backing file reads as zeroes where it is new",
            grown_overlay,
        ),
        case(
            Group::Backing,
            "backing-cut-and-grown-overlay-doesnt-show-a-longer-one",
            "an overlay that is cut and grows again reads as zeroes where it was cut, not as the backing file",
            cut_overlay,
        ),
        case(
            Group::Backing,
            "backing-another-file-is-named-durably",
            "after the header names another backing file, opening the image again shows that one",
            renamed,
        ),
        case(
            Group::Backing,
            "backing-name-is-removed",
            "after the backing file's name was removed from the header, the image is opened without one and reads as zeroes \
             where it has nothing",
            removed,
        ),
        case(
            Group::Backing,
            "backing-missing-file-is-named",
            "an image whose backing file is missing can't be opened, the error names the file, and nothing stays open",
            missing,
        ),
        case(
            Group::Backing,
            "backing-unneeded-zeroes-cost-no-space",
            "zeroes over what reads as zeroes below allocate no data",
            zeroes_over_zeroes,
        ),
    ]
}

async fn over_layers(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 9).await?;
    let cluster = bench.cluster;
    bench.write(0, 6 * cluster).await?;
    let mut bench = bench.overlay(9).await?;
    bench.write(cluster, cluster).await?;
    bench
        .zero(4 * cluster, cluster, RequestFlags::MAY_UNMAP)
        .await?;
    let mut bench = bench.overlay(9).await?;
    bench.write(3 * cluster + 512, 512).await?;
    for (offset, len) in [
        (0, 9 * cluster),
        (1, 9 * cluster - 2),
        (cluster - 1, 2),
        (cluster / 2, 4 * cluster),
        (3 * cluster + 511, 514),
        (4 * cluster - 100, cluster + 200),
    ] {
        bench.check_range(offset, len, "over the layers").await?;
    }
    bench.finish().await
}

async fn ten_layers(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 12).await?;
    bench.write(0, bench.size()).await?;
    for layer in 0..10 {
        bench = bench.overlay(12).await?;
        let cluster = bench.cluster;
        bench.write(layer * cluster, cluster).await?;
        bench.write((layer + 1) * cluster + 512, 1024).await?;
    }
    bench.check_all("through ten overlays").await?;
    bench.truthful().await?;
    bench.finish().await
}

async fn copy_up(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 10).await?;
    let cluster = bench.cluster;
    bench.write(0, 5 * cluster).await?;
    let mut bench = bench.overlay(10).await?;
    bench.write(2 * cluster, 2 * cluster).await?;
    bench
        .zero(4 * cluster, 2 * cluster, RequestFlags::empty())
        .await?;
    let mut bench = bench.overlay(10).await?;
    for at in 0..10 {
        bench.write(at * cluster + 100 * at + 1, 3).await?;
    }
    bench.check_all("after the small writes").await?;
    bench.write(2 * cluster - 7, 4 * cluster).await?;
    bench.truthful().await?;
    bench.finish().await
}

async fn over_the_end(scene: Arc<Scene>) -> Outcome {
    for (place, len) in [(100, 50), (1600, 100), (1000, 1000)] {
        let mut bench = Bench::with_size(&scene, |cluster| 2 * cluster + 1536).await?;
        let cluster = bench.cluster;
        bench.write(0, bench.size()).await?;
        let mut bench = bench.overlay(5).await?;
        bench.write(2 * cluster + place, len).await?;
        bench.check_all("after the write").await?;
        bench
            .zero(cluster + 512, cluster, RequestFlags::MAY_UNMAP)
            .await?;
        bench.check_all("after zeroes").await?;
        bench.truthful().await?;
        bench.finish().await?;
    }
    Ok(())
}

async fn grown_overlay(scene: Arc<Scene>) -> Outcome {
    for written in [false, true] {
        let mut bench = Bench::new(&scene, 10).await?;
        bench.write(0, bench.size()).await?;
        let cluster = bench.cluster;
        let mut bench = bench.overlay_of(3 * cluster + 512).await?;
        if written {
            // The rest of the cluster is copied up, but not what lies behind the end.
            bench.write(3 * cluster + 10, 10).await?;
        }
        bench.truncate(9 * cluster).await?;
        bench.check_all("after growing").await?;
        bench.truthful().await?;
        bench.write(5 * cluster + 5, 5).await?;
        bench.write(3 * cluster + 5, 5).await?;
        bench.check_all("after writes").await?;
        bench.finish().await?;
    }
    Ok(())
}

async fn cut_overlay(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 8).await?;
    bench.write(0, bench.size()).await?;
    let cluster = bench.cluster;
    let mut bench = bench.overlay(8).await?;
    bench.write(2 * cluster, cluster).await?;
    bench.truncate(2 * cluster + 512).await?;
    bench.check_all("after cutting").await?;
    bench.truncate(8 * cluster).await?;
    bench.check_all("after growing again").await?;
    bench.truthful().await?;
    bench.finish().await
}

async fn renamed(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(0, bench.size()).await?;
    let base = bench.disk.clone();
    let cluster = bench.cluster;
    let mut bench = bench.overlay(6).await?;
    bench.needs(Capabilities::CHANGE_BACKING)?;
    bench.write(cluster, cluster).await?;
    // The same content under another name. The first file is gone when the image is opened again.
    scene.lab.disks.insert(Disk::new("other", base.content()));
    let format = scene.format.name.clone();
    bench
        .handle
        .change_backing(Some("other"), Some(&format))
        .await?;
    bench.check_all("before opening again").await?;
    let empty = Disk::new(base.name(), crate::storage::Content::default());
    scene.lab.disks.insert(empty);
    bench = bench.reopen().await?;
    bench.check_all("opened again").await?;
    let info = bench.handle.info().await?;
    must(info.backing_filename.as_deref() == Some("other"), || {
        format!("the header names {:?}", info.backing_filename)
    })?;
    bench.own_check().await?;
    bench.close_only().await
}

async fn removed(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 6).await?;
    bench.write(0, bench.size()).await?;
    let cluster = bench.cluster;
    let mut bench = bench.overlay(6).await?;
    bench.needs(Capabilities::CHANGE_BACKING)?;
    bench.write(cluster, cluster).await?;
    bench.handle.change_backing(None, None).await?;
    bench = bench.reopen().await?;
    must(bench.node.backing().is_none(), || {
        "there is still a backing file".into()
    })?;
    bench.model[..cluster as usize].fill(0);
    bench.model[2 * cluster as usize..].fill(0);
    bench.check_all("without a backing file").await?;
    bench.truthful().await?;
    bench.close_only().await
}

async fn missing(scene: Arc<Scene>) -> Outcome {
    let bench = Bench::new(&scene, 4).await?;
    let bench = bench.overlay(4).await?;
    let format = scene.format.name.clone();
    if !scene.lab.records_backing(&format) {
        return not_covered("images of the format don't name their backing files");
    }
    let name = bench.disk.name().to_owned();
    bench.close_only().await?;
    // The world without the base.
    let lab = crate::lab::Lab::new(&scene.lab.registry, crate::lab::LabOptions::default());
    // It knows what images of the format are made of.
    lab.create_options(&format, "none", &scene.format.create);
    lab.disks
        .insert(Disk::new(&name, scene.lab.disk(&name)?.content()));
    let options = Options::new();
    let opening = lab.open(&format, &name, None, &options);
    match lab.env.try_run(opening) {
        Ok(Err(error)) => {
            let text = error.to_string();
            must(
                error.kind() == ErrorKind::NotFound && text.contains("disk0"),
                || format!("the error is {error:?}"),
            )?;
        }
        Ok(Ok(_)) => return wrong("it was opened without its backing file"),
        Err(stuck) => return wrong(stuck.to_string()),
    }
    must(lab.graph.nodes().is_empty(), || {
        format!("left open: {:?}", lab.graph.nodes())
    })
}

async fn zeroes_over_zeroes(scene: Arc<Scene>) -> Outcome {
    let mut bench = Bench::new(&scene, 40).await?;
    let cluster = bench.cluster;
    bench.write(0, cluster).await?;
    let mut bench = bench.overlay(40).await?;
    bench.needs(Capabilities::WRITE_ZEROES)?;
    bench
        .zero(10 * cluster, cluster, RequestFlags::NO_FALLBACK)
        .await
        .map_err(|stop| match stop {
            // Of those that can't mark zeroes over a backing file, it isn't asked.
            crate::bench::Stop::Failed(_) => crate::bench::Stop::NotCovered(
                "the driver can't mark zeroes over a backing file".into(),
            ),
            other => other,
        })?;
    bench.handle.flush().await?;
    let before = bench.disk.content().allocated();
    bench
        .zero(10 * cluster, 20 * cluster, RequestFlags::MAY_UNMAP)
        .await?;
    bench.handle.flush().await?;
    let grown = bench.disk.content().allocated() - before;
    must(grown < 10 * cluster, || {
        format!("20 clusters of zeroes took {grown} bytes")
    })?;
    bench.check_all("afterwards").await?;
    bench.finish().await
}
