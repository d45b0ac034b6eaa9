//! Images with features that have an issue of their own are refused by name.

mod common;

use common::*;

#[test]
fn options_that_make_no_sense_are_refused_by_name() {
    let rig = Rig::new();
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("a.qcow2");
    create_by_qemu(&path, "compat=0.10", 1 << 20);
    for (options, message) in [
        ("bogus=1", "does not support the option 'bogus'"),
        ("l2-cache-entry-size=1000", "power of two"),
        ("l2-cache-entry-size=128k", "power of two"),
        (
            "cache-size=1M,l2-cache-size=2M",
            "l2-cache-size may not exceed cache-size",
        ),
        ("lazy-refcounts=on", "Lazy refcounts require"),
        ("discard-no-unref=on", "only supported since"),
    ] {
        let error = rig.block_on(rig.open(&path, options)).unwrap_err();
        assert!(error.to_string().contains(message), "{options}: {error}");
    }
    for options in [
        "cache-size=1M",
        "l2-cache-size=64k,l2-cache-entry-size=512",
        "lazy-refcounts=off",
    ] {
        rig.block_on(async {
            let handle = rig.open(&path, options).await.unwrap();
            rig.close(handle).await.unwrap();
        });
    }
}
