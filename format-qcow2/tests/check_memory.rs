//! A check takes memory by the size of the image: not more than two bytes for each cluster, besides buffers whose size doesn't depend on
//! it.

mod common;

use block_core::image::{CheckMode, Progress};
use common::*;

/// What allocators and page sizes make of it.
const SLACK: u64 = 2 << 20;

/// The most memory that this process had since [`forget_peak`], in bytes.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let number = line.split_whitespace().nth(1)?;
    Some(number.parse::<u64>().ok()? << 10)
}

/// From here on the peak is what there is now.
fn forget_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// The peak while an image of so many clusters is checked, all of them in use; `None` where the system doesn't tell.
fn peak_of_check(scratch: &std::path::Path, clusters: u64) -> Option<u64> {
    let path = scratch.join("large.qcow2");
    let size = (clusters << 16).to_string();
    let options = "preallocation=metadata";
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, &size]);
    let rig = Rig::new();
    rig.block_on(async {
        let handle = rig.open(&path, "read-only=on").await.unwrap();
        let measured = forget_peak();
        let report = handle.check(CheckMode::ReadOnly, Progress::new()).await;
        let report = report.unwrap();
        let peak = peak().filter(|_| measured);
        assert!(report.is_clean(), "{:?}", report.findings);
        assert_eq!(report.allocated_clusters, clusters);
        rig.close(handle).await.unwrap();
        peak
    })
}

#[test]
fn a_check_takes_no_more_than_two_bytes_for_each_cluster() {
    let scratch = tempfile::tempdir().unwrap();
    let (few, many) = (1 << 20, 5 << 20);
    // The first one also pays for what the process needs at all.
    peak_of_check(scratch.path(), few);
    let (small, large) = (
        peak_of_check(scratch.path(), few),
        peak_of_check(scratch.path(), many),
    );
    let (Some(small), Some(large)) = (small, large) else {
        eprintln!("this system doesn't tell how much memory a process had: nothing measured");
        return;
    };
    let more = large.saturating_sub(small);
    println!("{small} bytes for {few} clusters, {more} more for {many}");
    assert!(more > (many - few) / 4, "measured nothing: {more}");
    assert!(more <= 2 * (many - few) + SLACK, "{more} bytes");
}
