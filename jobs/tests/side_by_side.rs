//! Two jobs on one chain: over the same part of it the second is refused at its start, in words that name node and job; over
//! parts that have nothing in common both run to their end, in whatever order they begin and end.

mod common;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
    mpsc,
};

use block_core::{BlockDriver, Node, PermissionSet, Result};
use common::{Bench, LENGTH, Layer, assert_same, guest::Guest, run};
use jobs::{BackupOptions, CommitOptions, Job, JobKind, JobOptions, MirrorOptions, StreamOptions};

/// A chain; the guest is at the last.
const CHAIN: [&str; 6] = ["A", "B", "C", "D", "E", "F"];

/// A job on nodes of these names. A mirror and a backup copy to a node of their own.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// What is copied into, and what stays below it.
    Stream(&'static str, Option<&'static str>),
    /// From, and into.
    Commit(&'static str, &'static str),
    Mirror(&'static str),
    Backup(&'static str),
}
use Work::{Backup, Commit, Mirror, Stream};

impl Work {
    /// Starts it. Its filter is called `over` if it is the first, and `second` otherwise; `slow` lets it copy next to nothing.
    async fn start(self, bench: &Bench, is_first: bool, slow: bool) -> Result<Arc<Job>> {
        let node = |name: &str| -> Arc<Node> {
            bench
                .graph
                .node(name)
                .unwrap_or_else(|| panic!("there is a node {name}"))
        };
        let (id, filter, target) = if is_first {
            ("job-1", "over", "target-1")
        } else {
            ("job-2", "second", "target-2")
        };
        let job = JobOptions {
            id: Some(id.to_owned()),
            speed: u64::from(slow),
            ..JobOptions::default()
        };
        let filter_node_name = Some(filter.to_owned());
        let manager = &bench.manager;
        match self {
            Stream(top, base) => {
                let options = StreamOptions {
                    job,
                    base: base.map(node),
                    ..StreamOptions::new(&node(top))
                };
                manager.stream(options).await
            }
            Commit(top, base) => {
                let options = CommitOptions {
                    job,
                    filter_node_name,
                    ..CommitOptions::new(&node("F"))
                };
                let options = options.top(&node(top)).base(&node(base));
                manager.commit(options).await
            }
            Mirror(device) => {
                let target = bench.layer(target, LENGTH, None);
                let options = MirrorOptions {
                    job,
                    filter_node_name,
                    ..MirrorOptions::new(&node(device), &target.node)
                };
                manager.mirror(options).await
            }
            Backup(device) => {
                let target = bench.layer(target, LENGTH, None);
                bench.graph.keep(&target.node);
                let options = BackupOptions {
                    job,
                    filter_node_name,
                    ..BackupOptions::new(&node(device), &target.node)
                };
                manager.backup(options).await
            }
        }
    }

    /// Whether it waits to be completed.
    fn follows(self) -> bool {
        matches!(self, Mirror(_) | Commit("F", _))
    }
}

/// Brings a job to its end.
async fn end(job: &Arc<Job>, work: Work) -> Result<()> {
    // One that was fast may have ended by itself.
    let _ = job.set_speed(0);
    if work.follows() {
        job.wait_ready().await?;
        job.complete()?;
    }
    job.wait().await
}

#[test]
fn a_job_over_what_another_works_on_is_refused_at_its_start_by_node_and_job() {
    let busy = |node: &str, job: JobKind| {
        format!("Node '{node}' is busy: block device is in use by block job: {job}")
    };
    let (stream, commit) = (JobKind::Stream, JobKind::Commit);
    let (mirror, backup) = (JobKind::Mirror, JobKind::Backup);
    let whole = Stream("F", None);
    let cases = [
        // A stream, and what is over a part of it.
        (Stream("F", Some("B")), Commit("D", "B"), busy("D", stream)),
        (Stream("F", Some("B")), Commit("E", "D"), busy("D", stream)),
        (Stream("F", Some("B")), Commit("C", "A"), busy("C", stream)),
        (Stream("F", Some("B")), Commit("F", "B"), busy("F", stream)),
        (Stream("F", Some("B")), Stream("D", None), busy("D", stream)),
        (Stream("F", Some("B")), Backup("D"), busy("D", stream)),
        (Stream("F", Some("B")), Mirror("F"), busy("F", stream)),
        (Stream("D", Some("B")), whole, busy("D", stream)),
        (whole, Commit("B", "A"), busy("A", stream)),
        // A commit into the stream's lowest layer, and one from the layer that the stream lets stay: it would change the
        // link that the stream ends with.
        (Stream("F", Some("B")), Commit("E", "C"), busy("C", stream)),
        (
            Stream("F", Some("B")),
            Commit("B", "A"),
            "Cannot change frozen 'backing' link from 'C' to 'B': in use by block job: stream"
                .to_owned(),
        ),
        (
            Stream("F", Some("B")),
            Backup("B"),
            "Cannot change frozen 'backing' link from 'C' to 'B': in use by block job: stream"
                .to_owned(),
        ),
        // A commit, and what is over a part of it: its filter is one.
        (Commit("D", "B"), whole, busy("D", commit)),
        (Commit("D", "B"), Stream("F", Some("C")), busy("D", commit)),
        (
            Commit("D", "B"),
            Stream("F", Some("D")),
            busy("over", commit),
        ),
        (
            Commit("D", "B"),
            Stream("F", Some("over")),
            "Cannot freeze 'backing' link from 'E' to 'over': node is in use by block job: commit"
                .to_owned(),
        ),
        (
            Commit("D", "B"),
            Stream("E", Some("over")),
            "Cannot freeze 'backing' link from 'E' to 'over': node is in use by block job: commit"
                .to_owned(),
        ),
        (Commit("D", "B"), Stream("C", Some("A")), busy("C", commit)),
        (Commit("D", "B"), Stream("B", None), busy("B", commit)),
        (Commit("D", "B"), Commit("E", "C"), busy("C", commit)),
        (Commit("D", "B"), Commit("E", "D"), busy("D", commit)),
        (Commit("D", "B"), Commit("B", "A"), busy("B", commit)),
        (Commit("D", "B"), Commit("F", "A"), busy("D", commit)),
        (Commit("D", "B"), Backup("D"), busy("D", commit)),
        // A commit of the guest's own layer.
        (Commit("F", "C"), Stream("F", Some("E")), busy("F", commit)),
        (Commit("F", "C"), Stream("D", Some("B")), busy("D", commit)),
        (Commit("F", "C"), Commit("D", "B"), busy("D", commit)),
        (Commit("F", "C"), Mirror("F"), busy("F", commit)),
        (Commit("F", "C"), Backup("over"), busy("over", commit)),
        // Copies of a disk, and of a layer.
        (Mirror("F"), Stream("F", Some("E")), busy("F", mirror)),
        (Mirror("F"), Commit("F", "D"), busy("F", mirror)),
        (Mirror("F"), Backup("F"), busy("F", mirror)),
        (Mirror("F"), Backup("over"), busy("over", mirror)),
        (Backup("F"), Stream("F", Some("E")), busy("F", backup)),
        (Backup("F"), Commit("F", "D"), busy("F", backup)),
        (Backup("F"), Mirror("over"), busy("over", backup)),
        (Backup("D"), Stream("F", Some("C")), busy("D", backup)),
        (Backup("D"), Stream("E", Some("D")), busy("over", backup)),
        (Backup("D"), Commit("E", "C"), busy("D", backup)),
        (Backup("D"), Commit("D", "C"), busy("D", backup)),
    ];
    for (first, second, message) in cases {
        run(|bench| async move {
            let (_, content) = bench.chain(&CHAIN).await;
            let guest = bench.guest_handle(&bench.graph.node("F").expect("a node"));
            let job = first.start(&bench, true, true).await.expect("the first");
            let nodes = || {
                let mut names = bench.names();
                names.retain(|name| name != "target-2");
                names
            };
            let before = nodes();
            let error = second
                .start(&bench, false, false)
                .await
                .expect_err(&format!("{second:?} beside {first:?}"));
            assert_eq!(error.reason(), message, "{second:?} beside {first:?}");
            assert_eq!(nodes(), before, "{second:?} beside {first:?}");
            end(&job, first)
                .await
                .unwrap_or_else(|error| panic!("{first:?} after {second:?}: {error}"));
            let found = guest.read(0, LENGTH as usize).await.expect("readable");
            assert_same(&found, &content, &format!("{first:?}, {second:?}"));
        });
    }
}

/// Runs two jobs beside a guest. `slow` tells which of them ends last.
async fn both(bench: Arc<Bench>, jobs: [Work; 2], slow: usize, nodes: &[&str]) {
    let (chain, content): (Vec<Layer>, _) = bench.chain(&CHAIN).await;
    let handle = bench.guest_handle(&chain[5].node);
    let guest = Guest::start(&bench.graph, &handle, content, 7);
    let mut started = Vec::new();
    for (number, work) in jobs.into_iter().enumerate() {
        let job = work.start(&bench, number == 0, number == slow).await;
        started.push(job.unwrap_or_else(|error| panic!("{work:?} of {jobs:?}: {error}")));
    }
    for number in [1 - slow, slow] {
        let ended = end(&started[number], jobs[number]).await;
        ended.unwrap_or_else(|error| panic!("{number} of {jobs:?}, {slow} is slow: {error}"));
    }
    let expected = guest.stop().await;
    let found = handle.read(0, LENGTH as usize).await.expect("readable");
    assert_same(&found, &expected, &format!("{jobs:?}, {slow} is slow"));
    let mut left = bench.names();
    left.sort();
    assert_eq!(left, nodes, "{jobs:?}, {slow} is slow");
}

#[test]
fn jobs_over_parts_of_a_chain_with_nothing_in_common_both_run_to_their_end() {
    let upper = Stream("F", Some("D"));
    // Two jobs, and the nodes that there are afterwards.
    let cases: &[([Work; 2], &[&str])] = &[
        ([upper, Stream("D", Some("B"))], &["A", "B", "D", "F"]),
        ([upper, Stream("B", None)], &["B", "C", "D", "F"]),
        ([upper, Commit("C", "A")], &["A", "D", "F"]),
        ([upper, Backup("C")], &["A", "B", "C", "D", "F", "target"]),
        ([Commit("E", "D"), Commit("C", "A")], &["A", "D", "F"]),
        (
            [Commit("E", "D"), Stream("C", Some("A"))],
            &["A", "C", "D", "F"],
        ),
        ([Commit("E", "C"), Stream("B", None)], &["B", "C", "F"]),
        ([Commit("F", "D"), Commit("C", "A")], &["A", "D"]),
        ([Commit("F", "D"), Stream("C", Some("A"))], &["A", "C", "D"]),
        ([Mirror("F"), Commit("D", "B")], &["target"]),
        ([Mirror("F"), Commit("E", "D")], &["target"]),
        ([Mirror("F"), Stream("D", Some("B"))], &["target"]),
        ([Mirror("F"), Stream("E", None)], &["target"]),
        (
            [Backup("F"), Commit("D", "B")],
            &["A", "B", "E", "F", "target"],
        ),
        ([Backup("F"), Stream("E", None)], &["E", "F", "target"]),
    ];
    for (jobs, nodes) in cases {
        for swapped in [false, true] {
            for slow in [0, 1] {
                let mut jobs = *jobs;
                if swapped {
                    jobs.swap(0, 1);
                }
                let copies = jobs.map(|job| matches!(job, Mirror(_) | Backup(_)));
                let target = if copies[0] { "target-1" } else { "target-2" };
                let nodes: Vec<&str> = nodes
                    .iter()
                    .map(|name| if *name == "target" { target } else { name })
                    .collect();
                run(|bench| async move { both(bench, jobs, slow, &nodes).await });
            }
        }
    }
}

#[test]
fn a_read_only_layer_that_two_commits_write_to_is_read_only_again_when_both_have_ended() {
    // The upper commit writes to C, the lower one to its header.
    for turn in 0..60 {
        run(|bench| async move {
            let (chain, content) = bench.chain(&CHAIN).await;
            let middle = chain[2].mem.clone().read_only();
            let handle = bench.guest_handle(&chain[5].node);
            let lower = Commit("B", "A").start(&bench, true, false).await;
            let lower = lower.expect("the lower one");
            // The upper one starts while the lower one rewrites the header.
            while middle.is_read_only() && !lower.status().is_over() {
                std::thread::yield_now();
            }
            let upper = Commit("E", "C").start(&bench, false, false).await;
            let upper = upper.expect("the upper one");
            upper.wait().await.expect("success");
            lower.wait().await.expect("success");
            assert_eq!(bench.names(), ["A", "C", "F"], "{turn}");
            assert!(middle.is_read_only(), "{turn}");
            let found = handle.read(0, LENGTH as usize).await.expect("readable");
            assert_same(&found, &content, "the guest's disk");
        });
    }
}

/// The layers between top and base are marked as no whole disks as long as a commit writes to the base; its filter reads them as such
/// again when it is over. Who changes the graph at that moment must find the one without the other.
#[test]
fn the_graph_can_be_changed_at_every_moment_of_a_commit_and_of_its_end() {
    let works = [Commit("E", "D"), Commit("E", "C"), Commit("F", "D")];
    let (turns, changes) = (60, AtomicUsize::new(0));
    for turn in 0..turns {
        for work in works {
            let changes = &changes;
            run(|bench| async move {
                let (chain, content) = bench.chain(&CHAIN).await;
                let handle = bench.guest_handle(&chain[5].node);
                let (graph, lowest) = (bench.graph.clone(), chain[0].node.clone());
                let over = Arc::new(AtomicBool::new(false));
                let seen_over = over.clone();
                let (ready, begun) = mpsc::channel();
                // The changes begin before the job does, however late the thread gets a processor.
                let others = std::thread::spawn(move || {
                    let mut count = 0;
                    while !seen_over.load(Ordering::Relaxed) {
                        drop(graph.attach(&lowest, PermissionSet::NONE, "other")?);
                        if count == 0 {
                            let _ = ready.send(());
                        }
                        count += 1;
                    }
                    Result::<usize>::Ok(count)
                });
                begun.recv().expect("a first change");
                let job = work.start(&bench, true, false).await.expect("the job");
                let ended = end(&job, work).await;
                over.store(true, Ordering::Relaxed);
                let count = others.join().expect("no panic");
                let count = count.unwrap_or_else(|error| panic!("{turn}, {work:?}: {error}"));
                ended.unwrap_or_else(|error| panic!("{turn}, {work:?}: {error}"));
                changes.fetch_add(count, Ordering::Relaxed);
                let found = handle.read(0, LENGTH as usize).await.expect("readable");
                assert_same(&found, &content, "the guest's disk");
            });
        }
    }
    // One in each turn came before the job.
    assert!(changes.into_inner() > turns * works.len());
}
