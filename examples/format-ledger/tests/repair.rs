//! What only this format has, and so the suite can't know: damage in its own tables, and a ledger that is full.

use std::sync::Arc;

use block_core::{
    BlockHandle, ErrorKind, Node, OpenOptions, Options, Registry, RequestFlags, Result,
    image::{CheckMode, CheckReport, Progress},
    registry::ImplicitOpens,
};
use format_ledger::{
    LedgerFactory,
    layout::{GuestCluster, HEADER_BYTES, Header, Owner},
};
use iotests::lab::{Lab, LabOptions};

const CLUSTER: u64 = 4096;
const FILE: &str = "image";

fn lab() -> Lab {
    let registry = Registry::new().with(LedgerFactory);
    Lab::new(&registry, LabOptions::default())
}

async fn open(lab: &Lab, for_check: bool) -> Result<(Arc<Node>, Arc<BlockHandle>)> {
    let how = OpenOptions {
        implicit: ImplicitOpens::Permit,
        for_check,
        ..OpenOptions::default()
    };
    let node = lab
        .registry
        .open_file(&lab.graph, FILE, Some("ledger"), Options::new(), how)
        .await?;
    let handle = lab.attach(&node, "test")?;
    Ok((node, handle))
}

async fn close(lab: &Lab, image: (Arc<Node>, Arc<BlockHandle>)) -> Result<()> {
    let (node, handle) = image;
    drop(handle);
    lab.graph.release(&node).await
}

/// An image whose first four clusters hold the numbers 1 to 4.
async fn make(lab: &Lab) -> Result<()> {
    let options = Options::new().with("cluster_size", CLUSTER);
    lab.create("ledger", FILE, 256 * CLUSTER, &options, None)
        .await?;
    let image = open(lab, false).await?;
    for at in 0..4 {
        let data = vec![at as u8 + 1; CLUSTER as usize];
        let none = RequestFlags::empty();
        image.1.write(at * CLUSTER, data, none).await?;
    }
    close(lab, image).await
}

/// Changes the file behind the driver's back.
fn tamper(lab: &Lab, change: impl FnOnce(&Header, &mut dyn FnMut(u64, u64))) -> Result<()> {
    let disk = lab.disk(FILE)?;
    let mut content = disk.content();
    let mut head = vec![0; HEADER_BYTES];
    content.read(0, &mut head);
    let header = Header::parse(&head)?;
    change(&header, &mut |at, value| {
        content.write(at, &value.to_le_bytes());
    });
    disk.restore(content);
    Ok(())
}

async fn check(handle: &BlockHandle, mode: CheckMode) -> Result<CheckReport> {
    handle.check(mode, Progress::new()).await
}

async fn has_its_data(handle: &BlockHandle) -> Result<bool> {
    for at in 0..4 {
        let bytes = handle.read(at * CLUSTER, CLUSTER as usize).await?;
        if bytes.iter().any(|byte| u64::from(*byte) != at + 1) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[test]
fn a_leak_is_found_repaired_and_used_again() -> Result<()> {
    let lab = lab();
    lab.env.run(async {
        make(&lab).await?;
        tamper(&lab, |header, set| {
            let leaked = header.ledger_at() + (header.first_data().0 + 9) * 8;
            set(leaked, Owner::Guest(GuestCluster(77)).encode());
        })?;
        let image = open(&lab, false).await?;
        let report = check(&image.1, CheckMode::ReadOnly).await?;
        assert_eq!((report.leaks, report.corruptions), (1, 0));
        let report = check(&image.1, CheckMode::RepairLeaks).await?;
        assert_eq!((report.leaks, report.leaks_fixed), (0, 1));
        close(&lab, image).await?;
        let image = open(&lab, false).await?;
        assert!(check(&image.1, CheckMode::ReadOnly).await?.is_clean());
        assert!(has_its_data(&image.1).await?);
        close(&lab, image).await
    })
}

#[test]
fn a_linked_cluster_without_its_owner_is_refused_until_it_is_repaired() -> Result<()> {
    let lab = lab();
    lab.env.run(async {
        make(&lab).await?;
        tamper(&lab, |header, set| {
            let owner = header.ledger_at() + header.first_data().0 * 8;
            set(owner, Owner::Nobody.encode());
        })?;
        let refused = open(&lab, false).await.map(|_| ());
        let kind = refused.map_err(|error| error.kind());
        assert_eq!(kind, Err(ErrorKind::Corrupt));
        let image = open(&lab, true).await?;
        let report = check(&image.1, CheckMode::RepairLeaks).await?;
        assert_eq!(report.corruptions, 1, "only leaks were to be repaired");
        let report = check(&image.1, CheckMode::RepairAll).await?;
        assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
        close(&lab, image).await?;
        let image = open(&lab, false).await?;
        assert!(has_its_data(&image.1).await?);
        close(&lab, image).await
    })
}

#[test]
fn a_cluster_with_two_links_is_never_repaired_by_guessing() -> Result<()> {
    let lab = lab();
    lab.env.run(async {
        make(&lab).await?;
        tamper(&lab, |header, set| {
            set(header.map_at() + 8, header.first_data().0);
        })?;
        assert!(open(&lab, false).await.is_err());
        let image = open(&lab, true).await?;
        let report = check(&image.1, CheckMode::RepairAll).await?;
        assert_eq!(report.corruptions, 1);
        close(&lab, image).await?;
        assert!(open(&lab, false).await.is_err());
        Ok(())
    })
}

#[test]
fn a_map_that_refers_to_the_tables_is_refused_with_the_entry() -> Result<()> {
    let lab = lab();
    lab.env.run(async {
        make(&lab).await?;
        tamper(&lab, |header, set| set(header.map_at() + 8 * 5, 2))?;
        let refused = open(&lab, true).await.map(|_| ());
        let text = refused.map_err(|error| error.to_string());
        assert!(
            matches!(&text, Err(text) if text.contains("map[5]")),
            "{text:?}"
        );
        Ok(())
    })
}

#[test]
fn clusters_on_their_way_are_waited_for_before_the_guest_is_told_that_there_is_no_space()
-> Result<()> {
    let lab = lab();
    lab.env.run(async {
        make(&lab).await?;
        let image = open(&lab, false).await?;
        let size = 256 * CLUSTER;
        // The ledger has room for the disk four times, and nothing is flushed in between.
        for round in 0..8 {
            let data = vec![round + 1; size as usize];
            image.1.write(0, data, RequestFlags::empty()).await?;
            image.1.discard(0, size).await?;
        }
        let bytes = image.1.read(0, size as usize).await?;
        assert!(bytes.iter().all(|byte| *byte == 0));
        close(&lab, image).await?;
        let image = open(&lab, false).await?;
        assert!(check(&image.1, CheckMode::ReadOnly).await?.is_clean());
        close(&lab, image).await
    })
}
