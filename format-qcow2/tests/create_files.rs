//! Creating, checking and repairing through the registry and the driver, in real files.

mod common;
mod damages;
mod offline;

use std::os::unix::fs::MetadataExt;

use block_core::{
    OpenOptions, Options, PermissionSet, Permissions,
    image::{CheckMode, Progress},
};
use common::Rig;
use damages::{DAMAGES, damaged};
use offline::{Lab, exit_status};

#[test]
fn preallocation_reserves_the_space_that_it_promises() {
    let Some(lab) = Lab::new() else { return };
    let rig = Rig::new();
    for (mode, least, most) in [
        ("off", 0, 1 << 20),
        ("metadata", 0, 1 << 20),
        ("falloc", 8 << 20, 10 << 20),
        ("full", 8 << 20, 10 << 20),
    ] {
        let path = lab.path(&format!("{mode}.qcow2"));
        let options =
            Options::from_dotted(&format!("size=8M,preallocation={mode},refcount_bits=8")).unwrap();
        let create = rig
            .registry
            .create(&rig.graph, "qcow2", path.to_str().unwrap(), options);
        rig.block_on(create).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        let allocated = metadata.blocks() * 512;
        assert!(
            (least..most).contains(&allocated),
            "{mode}: {allocated} bytes"
        );
        let name = format!("{mode}.qcow2");
        assert_eq!(lab.status(&["check", &name]), 0, "{mode}");
        lab.qemu_img(&["create", "-q", "-f", "raw", "zero.raw", "8M"]);
        lab.qemu_img(&["compare", &name, "zero.raw"]);
        lab.qemu_io(&name, &["write -P 1 1M 1M", "read -P 0 0 1M"]);
        assert_eq!(lab.status(&["check", &name]), 0, "{mode}");
    }
}

#[test]
fn the_driver_checks_and_repairs_an_open_image() {
    let Some(lab) = Lab::new() else { return };
    let rig = Rig::new();
    for name in [
        "doubly used cluster",
        "refcount of data zero",
        "leaked cluster",
        "nothing",
    ] {
        let damage = DAMAGES.iter().find(|damage| damage.name == name).unwrap();
        let path = lab.path("open.qcow2");
        damaged(&lab, damage).save(&path);
        let how = OpenOptions {
            for_check: true,
            ..OpenOptions::default()
        };
        let options = Options::new();
        rig.block_on(async {
            let node = rig
                .registry
                .open_file(
                    &rig.graph,
                    path.to_str().unwrap(),
                    Some("qcow2"),
                    options,
                    how,
                )
                .await
                .unwrap();
            let used = Permissions::CONSISTENT_READ | Permissions::WRITE | Permissions::RESIZE;
            let set = PermissionSet::new(used, Permissions::all());
            let handle = rig.graph.attach(&node, set, "test").unwrap();
            let report = handle
                .check(CheckMode::ReadOnly, Progress::new())
                .await
                .unwrap();
            assert_eq!(exit_status(&report), damage.status, "{name}: {report:?}");
            let report = handle
                .check(CheckMode::RepairAll, Progress::new())
                .await
                .unwrap();
            assert_eq!(exit_status(&report), 0, "{name}: {report:?}");
            // It goes on working, with what was repaired.
            handle
                .write(3 << 20, vec![9; 200_000], block_core::RequestFlags::empty())
                .await
                .unwrap();
            let report = handle
                .check(CheckMode::ReadOnly, Progress::new())
                .await
                .unwrap();
            assert!(report.is_clean(), "{name}: {report:?}");
            rig.close(handle).await.unwrap();
        });
        assert_eq!(lab.status(&["check", "open.qcow2"]), 0, "{name}");
    }
}
