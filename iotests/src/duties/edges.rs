//! The backing file is replaced by one with other data while the image is open: the next request must see the new one.

use std::sync::Arc;

use block_core::{Options, RequestFlags};

use super::{Duty, is_of};
use crate::{
    case::{Case, CaseResult, Group, Scene, Verdict},
    cases::{Image, Setup, owner},
    pattern::{Seen, Stamp, stamped},
    storage::Disk,
};

/// Signs what the second backing file has.
const SECOND: u32 = 7;

pub(super) fn cases() -> Vec<Case> {
    vec![Case::new(
        Group::Graph,
        "graph-new-backing-file-is-read-at-once",
        "after the backing child was replaced, reads and copies come from the new one",
        new_backing,
    )]
}

async fn new_backing(scene: Arc<Scene>) -> CaseResult {
    let Some(image) = Image::new(&scene, Setup { backing: true }).await? else {
        let text = "the driver has no backing files";
        return Ok(Verdict::NotCovered(text.into()));
    };
    let (lab, cluster) = (&scene.lab, image.cluster);
    let (whole, part) = (image.fresh(), image.fresh());
    // A driver that keeps the child of its first read, or of its first copy, has it after this.
    let earlier = image.guest.signing(owner::NEW);
    let offset = image.fresh();
    earlier.write(offset, 512, RequestFlags::empty()).await?;
    if !is_of(image.sector(whole).await?, owner::BASE, whole) {
        return Err("the backing file doesn't show".into());
    }

    // The same image file with other data in the two clusters. The format's own check of its parent, if it has one, finds
    // the parent that it knows.
    let mut content = lab.disk("base")?.content();
    for place in content.find(&Stamp::needle(owner::BASE)) {
        let mut sector = vec![0; 512];
        content.read(place, &mut sector);
        if let Seen::Stamp(stamp) = Seen::of(&sector) {
            let at = stamp.sector * 512;
            if (whole..whole + cluster).contains(&at) || (part..part + cluster).contains(&at) {
                content.write(place, &stamped(SECOND, 0, at, 512));
            }
        }
    }
    if content.find(&Stamp::needle(SECOND)).len() as u64 != 2 * cluster / 512 {
        let text = "the format doesn't store data as it is";
        return Ok(Verdict::NotCovered(text.into()));
    }
    lab.disks.insert(Disk::new("base2", content));
    let read_only = Options::new().with("read-only", true);
    let second = lab
        .open(&scene.format.name, "base2", None, &read_only)
        .await?;
    lab.graph.set_backing(&image.node, Some(&second)).await?;
    image
        .guest
        .oracle()
        .set_initial(whole, &stamped(SECOND, 0, whole, cluster));
    image
        .guest
        .oracle()
        .set_initial(part, &stamped(SECOND, 0, part, cluster));

    let guest = image.guest.signing(owner::NEW);
    guest.write(part, 512, RequestFlags::empty()).await?;
    let checked = (whole..whole + cluster).chain(part + 512..part + cluster);
    for at in checked.step_by(512) {
        let seen = image.sector(at).await?;
        if is_of(seen, SECOND, at) {
            continue;
        }
        if is_of(seen, owner::BASE, at) {
            let what = if at < whole + cluster {
                "a read"
            } else {
                "a copy on write"
            };
            return Err(Duty::Children.forgotten(format_args!(
                "after the backing file was replaced, {what} at {at:#x} still gave what the old one has"
            )));
        }
        return Err(format!("at {at:#x} there is {seen}, of neither backing file").into());
    }
    // What the driver hasn't copied of the cluster wouldn't be the second one's any more.
    guest.write(part, cluster, RequestFlags::empty()).await?;
    drop((guest, earlier));
    // Back to the one that the image names, with the oracle told what shows there.
    let first = lab
        .open(&scene.format.name, "base", None, &read_only)
        .await?;
    lab.graph.set_backing(&image.node, Some(&first)).await?;
    image
        .guest
        .oracle()
        .set_initial(whole, &stamped(owner::BASE, 0, whole, cluster));
    image.finish().await?;
    Ok(Verdict::Passed)
}
