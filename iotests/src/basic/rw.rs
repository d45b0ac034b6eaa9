//! Reading back what was written.

use std::sync::Arc;

use block_core::{
    BlockHandle, Capabilities, ErrorKind, Options, RequestFlags,
    flags::{PermissionSet, Permissions},
};

use super::{FILE, Fixture, same};
use crate::case::{Case, CaseResult, Failure, Group, Scene, Verdict};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new(
            Group::Rw,
            "rw-new-image-reads-as-zeroes",
            "a new image reads as zeroes everywhere, if the driver says so",
            new_image,
        ),
        Case::new(
            Group::Rw,
            "rw-request-past-the-end-fails-and-changes-nothing",
            "requests that end past the end fail with EIO and change nothing; empty requests succeed",
            past_the_end,
        ),
        Case::new(
            Group::Rw,
            "rw-read-only-image-refuses-writes",
            "an image that was opened read-only refuses to be changed and can be read",
            read_only,
        ),
    ];
    for alignment in [1, 512, 4096] {
        cases.push(
            Case::new(
                Group::Rw,
                format!("rw-random-requests-on-{alignment}-byte-storage"),
                format!(
                    "what random reads, writes, zero writes and discards of any alignment leave behind is \
                     what they should, on storage with requests of {alignment} bytes"
                ),
                random_requests,
            )
            .on_alignment(alignment),
        );
        cases.push(
            Case::new(
                Group::Rw,
                format!("rw-edges-of-clusters-on-{alignment}-byte-storage"),
                format!(
                    "writes that begin and end at and beside the edges of clusters change what they cover \
                     and nothing else, on storage with requests of {alignment} bytes"
                ),
                edges,
            )
            .on_alignment(alignment),
        );
    }
    cases
}

async fn new_image(scene: Arc<Scene>) -> CaseResult {
    let fixture = Fixture::any(&scene, 16).await?;
    if !fixture
        .node
        .driver()
        .capabilities()
        .contains(Capabilities::ZERO_INIT)
    {
        return Ok(Verdict::NotCovered("the driver has no zero_init".into()));
    }
    let bytes = fixture.handle.read(0, fixture.size as usize).await?;
    same(&bytes, &vec![0; fixture.size as usize], 0, "new image")?;
    fixture.check(&scene).await?;
    Ok(Verdict::Passed)
}

fn bytes_of(scene: &Scene, len: usize) -> Vec<u8> {
    let seed = scene.lab.env.below(1 << 32) as u32 | 1;
    (0..len as u32)
        .map(|at| (at.wrapping_mul(seed) >> 11) as u8 | 1)
        .collect()
}

/// One random request, and what the model makes of it.
async fn one_request(scene: &Scene, fixture: &Fixture, model: &mut [u8]) -> Result<(), Failure> {
    let env = &scene.lab.env;
    let capabilities = fixture.node.driver().capabilities();
    let size = fixture.size;
    let unit = [1, 1, 512, fixture.cluster][env.below(4) as usize];
    let offset = env.below(size) / unit * unit;
    let most = (size - offset).min(3 * fixture.cluster);
    let len = (env.below(most) + 1).div_ceil(unit) * unit;
    let len = len.min(size - offset);
    let range = offset as usize..(offset + len) as usize;
    let handle: &BlockHandle = &fixture.handle;
    match env.below(8) {
        0..4 => {
            let data = bytes_of(scene, len as usize);
            model[range].copy_from_slice(&data);
            handle.write(offset, data, RequestFlags::empty()).await?;
        }
        4 | 5 => {
            let flags = [
                RequestFlags::empty(),
                RequestFlags::MAY_UNMAP,
                RequestFlags::FUA,
            ][env.below(3) as usize];
            handle.write_zeroes(offset, len, flags).await?;
            model[range].fill(0);
        }
        6 => {
            handle.discard(offset, len).await?;
            // What a discard that isn't aligned drops is the driver's choice: take what is there, if it is allowed.
            let now = handle.read(offset, len as usize).await?;
            for (at, (old, new)) in model[range].iter_mut().zip(now.iter()).enumerate() {
                if *new != 0 && *new != *old {
                    return Err(
                        format!("discard made new data at {:#x}", offset + at as u64).into(),
                    );
                }
                *old = *new;
            }
            let aligned = offset % fixture.cluster == 0 && len % fixture.cluster == 0;
            if aligned
                && fixture.discard_zeroes()
                && capabilities.contains(Capabilities::DISCARD)
                && now.iter().any(|byte| *byte != 0)
            {
                return Err(format!("discarded clusters at {offset:#x} aren't zero").into());
            }
        }
        _ => {
            let found = handle.read(offset, len as usize).await?;
            same(&found, &model[range], offset, "read")?;
        }
    }
    Ok(())
}

async fn random_requests(scene: Arc<Scene>) -> CaseResult {
    let mut fixture = Fixture::new(&scene, 12).await?;
    let size = fixture.size as usize;
    let mut model = vec![0; size];
    for round in 0..4 {
        for _ in 0..40 {
            one_request(&scene, &fixture, &mut model).await?;
        }
        let found = fixture.handle.read(0, size).await?;
        same(&found, &model, 0, &format!("round {round}"))?;
        fixture.check(&scene).await?;
        fixture = fixture.reopen(&scene).await?;
        let found = fixture.handle.read(0, size).await?;
        same(&found, &model, 0, &format!("round {round}, opened again"))?;
    }
    fixture.close(&scene).await?;
    Ok(Verdict::Passed)
}

async fn edges(scene: Arc<Scene>) -> CaseResult {
    let fixture = Fixture::new(&scene, 8).await?;
    let size = fixture.size as usize;
    let cluster = fixture.cluster;
    let mut model = vec![0; size];
    let near = |edge: u64| {
        [0u64, 1, 511, 512, 513]
            .into_iter()
            .flat_map(move |d| [edge + d, edge.saturating_sub(d)])
    };
    for start in near(2 * cluster) {
        for end in near(3 * cluster).chain(near(start + 600)) {
            if end <= start || end > size as u64 {
                continue;
            }
            let data = bytes_of(&scene, (end - start) as usize);
            model[start as usize..end as usize].copy_from_slice(&data);
            fixture
                .handle
                .write(start, data, RequestFlags::empty())
                .await?;
            let from = start.saturating_sub(600);
            let to = (end + 600).min(size as u64);
            let found = fixture.handle.read(from, (to - from) as usize).await?;
            same(
                &found,
                &model[from as usize..to as usize],
                from,
                "around a write",
            )?;
        }
    }
    let found = fixture.handle.read(0, size).await?;
    same(&found, &model, 0, "at the end")?;
    fixture.check(&scene).await?;
    fixture.close(&scene).await?;
    Ok(Verdict::Passed)
}

async fn past_the_end(scene: Arc<Scene>) -> CaseResult {
    let fixture = Fixture::new(&scene, 4).await?;
    let size = fixture.size;
    let handle = &fixture.handle;
    let none = RequestFlags::empty();
    let data = bytes_of(&scene, size as usize);
    handle.write(0, data.clone(), none).await?;
    let grows = fixture
        .node
        .driver()
        .capabilities()
        .contains(Capabilities::GROW);
    if !grows {
        for (offset, len) in [(size, 512), (size - 512, 1024), (u64::MAX - 511, 512)] {
            let results = [
                handle.write(offset, vec![9; len], none).await,
                handle.write_zeroes(offset, len as u64, none).await,
                handle.discard(offset, len as u64).await,
                handle.read(offset, len).await.map(|_| ()),
            ];
            for (number, result) in results.into_iter().enumerate() {
                match result {
                    Err(error) if error.kind() == ErrorKind::Io => {}
                    other => {
                        return Err(format!("request {number} at {offset:#x}: {other:?}").into());
                    }
                }
            }
        }
    }
    handle.write(size, Vec::new(), none).await?;
    handle.write_zeroes(0, 0, none).await?;
    handle.discard(size, 0).await?;
    if fixture.node.length() != size {
        return Err(format!("the image is {} bytes long", fixture.node.length()).into());
    }
    let found = handle.read(0, size as usize).await?;
    same(&found, &data, 0, "afterwards")?;
    fixture.check(&scene).await?;
    Ok(if grows {
        Verdict::NotCovered("writes past the end grow the node".into())
    } else {
        Verdict::Passed
    })
}

async fn read_only(scene: Arc<Scene>) -> CaseResult {
    let fixture = Fixture::new(&scene, 4).await?;
    let data = bytes_of(&scene, fixture.size as usize);
    fixture
        .handle
        .write(0, data.clone(), RequestFlags::empty())
        .await?;
    fixture.close(&scene).await?;
    let lab = &scene.lab;
    let before = lab.disk(FILE)?.content().all_bytes();
    let options = Options::new().with("read-only", true);
    let node = lab.open(&scene.format.name, FILE, None, &options).await?;
    let writer = PermissionSet::new(
        Permissions::CONSISTENT_READ | Permissions::WRITE,
        Permissions::all(),
    );
    if let Ok(handle) = lab.graph.attach(&node, writer, "writer") {
        for result in [
            handle.write(0, vec![1; 512], RequestFlags::empty()).await,
            handle.write_zeroes(0, 512, RequestFlags::empty()).await,
            handle.discard(0, 512).await,
        ] {
            if result.is_ok() {
                return Err("a read-only image was changed".into());
            }
        }
    }
    let reader = PermissionSet::new(Permissions::CONSISTENT_READ, Permissions::all());
    let handle = lab.graph.attach(&node, reader, "reader")?;
    let found = handle.read(0, data.len()).await?;
    same(&found, &data, 0, "read-only")?;
    drop(handle);
    lab.graph.release(&node).await?;
    let now = lab.disk(FILE)?.content().all_bytes();
    same(&now.0, &before.0, 0, "the storage")?;
    if now.1 != before.1 {
        return Err("the data file has changed".into());
    }
    Ok(Verdict::Passed)
}
