//! The scenarios that there are. Each is about one way in which two requests, or a request and a job, can get in each
//! other's way. It runs nothing.

use super::scenario::{
    JobKind, Kind,
    Part::{Back, Front},
    Request, Small,
    What::{Discard, Flush, Read, Resize, Write, Zero, ZeroUnmap},
};

const fn whole(what: super::scenario::What, cluster: u64) -> Request {
    Request::whole(what, cluster)
}

/// All of them.
pub fn catalogue() -> Vec<Small> {
    let mut all = Vec::new();
    for kind in Kind::ALL {
        for freeing in [Discard, Zero, ZeroUnmap] {
            for other in [false, true] {
                all.push(write_and_free(kind, freeing, other));
            }
        }
    }
    all.extend([
        Small {
            waits: false,
            ..Small::new(
                "two-writes-new-cluster",
                vec![
                    vec![Request::part(Write, 0, Front)],
                    vec![Request::part(Write, 0, Back)],
                    vec![whole(Read, 0)],
                ],
            )
        },
        Small {
            cut: true,
            waits: false,
            fill: vec![(1, Kind::Data)],
            ..Small::new(
                "write-flush-power-cut",
                vec![
                    vec![Request::part(Write, 0, Front), whole(Flush, 0)],
                    vec![whole(Discard, 1), whole(Flush, 0), whole(Write, 2)],
                ],
            )
        },
        Small {
            fill: vec![(0, Kind::Data)],
            ..Small::new(
                "write-resize-down",
                vec![
                    vec![Request::part(Write, 2, Front)],
                    vec![whole(Resize, 1)],
                    vec![whole(Write, 0)],
                ],
            )
        },
        Small {
            fill: vec![(0, Kind::Data)],
            reuses: true,
            ..Small::new(
                "read-discard-reuse",
                vec![
                    vec![whole(Read, 0)],
                    vec![whole(Discard, 0), whole(Flush, 0), whole(Write, 1)],
                ],
            )
        },
        Small {
            fill: vec![(0, Kind::Compressed)],
            ..Small::new(
                "read-compressed-overwrite-reuse",
                vec![
                    vec![whole(Read, 0)],
                    vec![whole(Discard, 0), whole(Flush, 0), whole(Write, 1)],
                ],
            )
        },
    ]);
    for (name, freeing) in [("discard", Discard), ("zero", Zero)] {
        all.push(Small {
            dropped: true,
            fill: vec![(0, Kind::Data)],
            ..Small::new(
                format!("dropped-write-{name}"),
                vec![
                    vec![Request::part(Write, 0, Front)],
                    vec![whole(freeing, 0), whole(Write, 1)],
                ],
            )
        });
    }
    all.push(Small {
        dropped: true,
        // A discard may be a matter of a single poll.
        waits: false,
        fill: vec![(0, Kind::Data)],
        ..Small::new(
            "dropped-discard-write",
            vec![
                vec![whole(Discard, 0)],
                vec![Request::part(Write, 0, Front)],
            ],
        )
    });
    all.push(Small {
        dropped: true,
        waits: false,
        ..Small::new(
            "dropped-allocation-write",
            vec![
                vec![Request::part(Write, 0, Front)],
                vec![Request::part(Write, 0, Back)],
            ],
        )
    });
    let jobs = [
        ("mirror", JobKind::Mirror),
        ("mirror-blocking", JobKind::MirrorBlocking),
        ("backup", JobKind::Backup),
    ];
    for (job_name, job) in jobs {
        for (name, request) in [("write", Write), ("discard", Discard)] {
            all.push(Small {
                job: Some(job),
                waits: false,
                clusters: 2,
                fill: vec![(0, Kind::Data)],
                ..Small::new(format!("{job_name}-{name}"), vec![vec![whole(request, 0)]])
            });
        }
    }
    all
}

/// A write in flight, its cluster is freed meanwhile, and a later write wants a cluster.
fn write_and_free(kind: Kind, freeing: super::scenario::What, other: bool) -> Small {
    let later = u64::from(other);
    let name = format!(
        "write-{}-{}-{}",
        kind.name(),
        freeing.name(),
        if other { "other" } else { "same" }
    );
    let fill = match kind {
        Kind::Unallocated => Vec::new(),
        kind => vec![(0, kind)],
    };
    let mut second = vec![whole(freeing, 0)];
    if other {
        // A driver with a quarantine hands the cluster out again only when its unlink is durable.
        second.push(whole(Flush, 0));
    }
    second.push(whole(Write, later));
    Small {
        fill,
        reuses: other && freeing != Zero,
        ..Small::new(name, vec![vec![Request::part(Write, 0, Back)], second])
    }
}
