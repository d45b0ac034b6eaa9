//! What was flushed is there after a cut of the power; what was resized has the new length.

use std::sync::Arc;

use block_core::{Capabilities, ErrorKind, RequestFlags, driver::Truncate};

use super::{FILE, Fixture, same};
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict},
    duties::Duty,
    pattern::{Seen, stamped},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            Group::Rw,
            "rw-flushed-data-survives-power-cut",
            "what was written and flushed is there after a power cut, and the image is clean",
            flushed,
        )
        .duty(Duty::Flush),
        Case::new(
            Group::Rw,
            "rw-fua-data-survives-power-cut",
            "what was written with FUA is there after a power cut without a flush",
            fua,
        )
        .duty(Duty::Flush),
        Case::new(
            Group::Rw,
            "rw-grown-part-reads-as-zeroes",
            "an image that has grown has its new length, also after opening it again; the new part reads \
             as zeroes and can be written",
            grow,
        ),
    ]
}

async fn flushed(scene: Arc<Scene>) -> CaseResult {
    survives(scene, false).await
}

async fn fua(scene: Arc<Scene>) -> CaseResult {
    survives(scene, true).await
}

async fn survives(scene: Arc<Scene>, fua: bool) -> CaseResult {
    let fixture = Fixture::new(&scene, 16).await?;
    let cluster = fixture.cluster;
    let disk = scene.lab.disk(FILE)?;
    disk.track_durability();
    let flags = if fua {
        RequestFlags::FUA
    } else {
        RequestFlags::empty()
    };
    for (seq, at) in [0, 3, 7, 8, 15].into_iter().enumerate() {
        let offset = at * cluster;
        fixture
            .handle
            .write(offset, stamped(1, seq as u64, offset, cluster), flags)
            .await?;
    }
    if !fua {
        fixture.handle.flush().await?;
    }
    let expected = fixture.handle.read(0, fixture.size as usize).await?;
    let (size, env) = (fixture.size, scene.lab.env.clone());
    let mut cuts = Vec::new();
    for _ in 0..4 {
        cuts.push(disk.power_cut(&*env));
    }
    fixture.close(&scene).await?;
    for content in cuts {
        disk.restore(content);
        let fixture = Fixture::open(&scene, cluster, size).await?;
        let found = fixture.handle.read(0, size as usize).await?;
        same(&found, &expected, 0, "after the power cut")?;
        if fixture
            .node
            .driver()
            .capabilities()
            .contains(Capabilities::CHECK)
        {
            let progress = block_core::image::Progress::new();
            let mode = block_core::image::CheckMode::ReadOnly;
            let report = fixture.handle.check(mode, progress).await?;
            // Leaks are what a power cut may leave behind.
            if report.corruptions + report.check_errors > 0 {
                return Err(format!("check after the power cut: {:?}", report.findings).into());
            }
        }
        fixture.close(&scene).await?;
    }
    Ok(Verdict::Passed)
}

async fn grow(scene: Arc<Scene>) -> CaseResult {
    let fixture = Fixture::new(&scene, 4).await?;
    let (old, cluster) = (fixture.size, fixture.cluster);
    if !fixture
        .node
        .driver()
        .capabilities()
        .contains(Capabilities::TRUNCATE)
    {
        return Ok(Verdict::NotCovered("the driver has no truncate".into()));
    }
    let data = stamped(1, 1, 0, old);
    fixture.handle.write(0, data, RequestFlags::empty()).await?;
    let new = 2 * old;
    match fixture.handle.truncate(new, Truncate::default()).await {
        Err(error) if error.kind() == ErrorKind::NotSupported => {
            return Ok(Verdict::NotCovered("the driver can't grow".into()));
        }
        other => other?,
    }
    let mut fixture = fixture;
    fixture.size = new;
    for round in 0..2 {
        if fixture.node.length() != new {
            return Err(format!("round {round}: length {}", fixture.node.length()).into());
        }
        let bytes = fixture.handle.read(0, new as usize).await?;
        same(
            &bytes[..old as usize],
            &stamped(1, 1, 0, old),
            0,
            "the old part",
        )?;
        for (at, sector) in bytes[old as usize..].chunks(512).enumerate() {
            let expected = round == 1 && at as u64 * 512 >= new - old - cluster;
            if (Seen::of(sector) == Seen::Zero) == expected {
                return Err(format!("round {round}: sector {at} of the new part is wrong").into());
            }
        }
        if round == 0 {
            let data = stamped(1, 2, new - cluster, cluster);
            fixture
                .handle
                .write(new - cluster, data, RequestFlags::empty())
                .await?;
            fixture.check(&scene).await?;
            fixture = fixture.reopen(&scene).await?;
        }
    }
    fixture.close(&scene).await?;
    Ok(Verdict::Passed)
}
