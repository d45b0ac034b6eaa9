//! The deterministic races as commands for qemu-io and `blk io`: a request is stopped in the storage by a breakpoint, another
//! comes that frees its cluster, a third gets what was freed, and then the first is let go. Data only; nothing is run here.
//!
//! A program reads the commands one after the other, so a command that waits must be an asynchronous one. There is no
//! asynchronous discard: in a program whose gate makes it wait, a scene with one can't go on, and is marked as such.

use std::fmt::Write as _;

/// How the target's cluster is freed while somebody is at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Freed {
    ZeroUnmap,
    Discard,
}

/// What is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parked {
    WriteInPlace,
    WriteToZeroAllocated,
    Read,
    CompressedRead,
}

/// A race as a command file.
#[derive(Debug, Clone)]
pub struct Scene {
    /// Its name.
    pub name: &'static str,
    /// What must not happen.
    pub proves: &'static str,
    /// Options of the image's creation.
    pub create: &'static str,
    /// A command of it waits, in a program that has a gate, for one that comes after it.
    pub waits_for_later: bool,
    /// The commands.
    pub script: String,
}

/// Bytes of a cluster.
const CLUSTER: u64 = 65536;
/// The cluster that everything is about.
const TARGET: u64 = 8 * CLUSTER;
/// The first of the clusters that get what was freed.
const FRESH: u64 = 16 * CLUSTER;

fn script(parked: Parked, freed: Freed) -> String {
    let mut text = String::new();
    let mut say = |line: String| {
        let _ = writeln!(text, "{line}");
    };
    let at = format!("{TARGET} {CLUSTER}");
    match parked {
        Parked::WriteInPlace | Parked::Read => say(format!("write -q -P 0xaa {at}")),
        Parked::WriteToZeroAllocated => {
            say(format!("write -q -P 0xaa {at}"));
            say(format!("write -q -z {at}"));
        }
        Parked::CompressedRead => say(format!("write -q -c -P 0xaa {at}")),
    }
    say("flush".into());
    let (event, request) = match parked {
        Parked::WriteInPlace | Parked::WriteToZeroAllocated => {
            ("write_aio", format!("aio_write -q -P 1 {at}"))
        }
        Parked::Read => ("read_aio", format!("aio_read -q -P 0xaa {at}")),
        Parked::CompressedRead => ("read_compressed", format!("aio_read -q -P 0xaa {at}")),
    };
    say(format!("break {event} A"));
    say(request);
    say("wait_break A".into());
    say(match freed {
        Freed::ZeroUnmap => format!("aio_write -q -z -u {at}"),
        Freed::Discard => format!("discard -q {at}"),
    });
    // Clusters that were never written: they are what must never change from here on.
    say(format!("write -q -P 0xf5 {FRESH} {CLUSTER}"));
    say("resume A".into());
    say("aio_flush".into());
    say("flush".into());
    say(format!("read -q -P 0xf5 {FRESH} {CLUSTER}"));
    say("quit".into());
    text
}

/// All of them.
pub fn scenes() -> Vec<Scene> {
    let mut scenes = Vec::new();
    let mut add = |name, proves, create, parked, freed| {
        scenes.push(Scene {
            name,
            proves,
            create,
            waits_for_later: freed == Freed::Discard,
            script: script(parked, freed),
        });
    };
    add(
        "late-write-after-zero-unmap",
        "a write that was under way when its cluster was freed by a zero write doesn't land in the next owner's data",
        "",
        Parked::WriteInPlace,
        Freed::ZeroUnmap,
    );
    add(
        "late-write-after-zero-unmap-version-2",
        "the same in an image of version 2, where zeroes can only be left out",
        "compat=0.10",
        Parked::WriteInPlace,
        Freed::ZeroUnmap,
    );
    add(
        "late-write-after-discard",
        "a write that was under way when its cluster was discarded doesn't land in the next owner's data",
        "",
        Parked::WriteInPlace,
        Freed::Discard,
    );
    add(
        "freed-cluster-is-linked-after-zero-unmap",
        "a write into a preallocated zero cluster doesn't link the cluster after a zero write has freed it",
        "",
        Parked::WriteToZeroAllocated,
        Freed::ZeroUnmap,
    );
    add(
        "freed-cluster-is-linked-after-discard",
        "a write into a preallocated zero cluster doesn't link the cluster after a discard has freed it",
        "",
        Parked::WriteToZeroAllocated,
        Freed::Discard,
    );
    add(
        "late-read-after-zero-unmap",
        "a read that was under way when its cluster was freed doesn't return the next owner's data",
        "",
        Parked::Read,
        Freed::ZeroUnmap,
    );
    add(
        "late-compressed-read-after-zero-unmap",
        "a read of a compressed cluster that was freed under way doesn't decompress the next owner's data",
        "",
        Parked::CompressedRead,
        Freed::ZeroUnmap,
    );
    scenes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scene_parks_frees_recycles_and_lets_go_in_this_order() {
        for scene in scenes() {
            let place = |what: &str| {
                scene
                    .script
                    .lines()
                    .position(|line| line.contains(what))
                    .unwrap_or_else(|| panic!("{}: no {what}", scene.name))
            };
            let freed = if scene.waits_for_later {
                "discard"
            } else {
                "-z -u"
            };
            let order = [
                "break",
                "wait_break",
                freed,
                "0xf5",
                "resume",
                "read -q -P 0xf5",
            ];
            let places = order.map(place);
            assert!(places.is_sorted(), "{}: {places:?}", scene.name);
        }
    }
}
