//! A power cut between any two writes of a repair that moves things: the image opens, every byte is there, nothing is
//! worse than before, and a second repair ends what the first began. Cancelling is no different.

mod damages;
mod damages_of_features;
mod offline;

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    task::Context,
};

use block_core::image::{CheckMode, CheckReport, Progress};
use damages_of_features::{ALIASES, BASES, BROKEN};
use offline::{Event, Image, Lab, exit_status};

/// One for each thing that is moved or replaced. (`repair_images` cuts off the separation of two L2 tables.)
const NAMES: &[&str] = &[
    "two guest clusters in one place",
    "guest cluster in its L2 table",
    "compressed cluster that reaches over its neighbour",
    "two snapshots with one L1 table",
    "active L1 table that is a snapshot's",
    "two bitmaps with one table",
    "bits of a bitmap behind the end of the disk",
    "guest cluster in the refcount table",
    "compressed cluster in an L2 table",
    "guest cluster in a snapshot's data elsewhere",
    "guest cluster in the snapshot table",
    "snapshot entry without extra data",
    "unaligned bitmap data",
    "bitmap directory of no bytes",
    "bitmaps left behind by another program",
    "entry that isn't at the guest's offset in the data file",
];

/// The disk and its snapshots, as qemu-img reads them.
fn contents(lab: &Lab, image: &Image) -> Vec<Option<Vec<u8>>> {
    image.save(&lab.path("cut.qcow2"));
    let read = |more: &[&str]| {
        let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
        args.extend(more);
        args.extend(["cut.qcow2", "cut.raw"]);
        let _ = std::fs::remove_file(lab.path("cut.raw"));
        (lab.status(&args) == 0).then(|| std::fs::read(lab.path("cut.raw")).unwrap())
    };
    let mut all = vec![read(&[])];
    if image.header().unwrap().nb_snapshots > 0 {
        all.push(read(&["-l", "snapshot.name=one"]));
        all.push(read(&["-l", "snapshot.name=two"]));
    }
    all
}

/// What is wrong, leaks aside.
fn damage(report: &CheckReport) -> u64 {
    report.corruptions + report.check_errors
}

/// States with the same bytes up to the old end of the file: what is behind it, nobody refers to yet. So many are tried.
const UNREFERRED: usize = 4;

/// What may be on the disk when the power goes: of the writes since the last flush, all up to any of them, or any alone.
fn states(start: &[u8], log: &[Event]) -> Vec<Vec<u8>> {
    let mut tried = HashSet::new();
    let mut unreferred = 0;
    let mut states = Vec::new();
    let mut durable = start.to_vec();
    let mut pending: Vec<&Event> = Vec::new();
    let mut prefix = start.to_vec();
    for event in log {
        if matches!(event, Event::Flush) {
            for event in pending.drain(..) {
                event.apply(&mut durable);
            }
            continue;
        }
        pending.push(event);
        event.apply(&mut prefix);
        let mut alone = durable.clone();
        event.apply(&mut alone);
        for state in [&prefix, &alone] {
            if state[..start.len()] == *start {
                unreferred += 1;
                if unreferred > UNREFERRED {
                    continue;
                }
            }
            let mut hasher = DefaultHasher::new();
            state.hash(&mut hasher);
            if tried.insert(hasher.finish()) {
                states.push(state.clone());
            }
        }
    }
    states
}

#[test]
fn a_repair_that_moves_things_may_be_cut_off_at_any_write() {
    let Some(lab) = Lab::new() else { return };
    let all: Vec<_> = ALIASES.iter().chain(BROKEN).collect();
    let mut cuts = 0;
    for name in NAMES {
        let (_, base, apply, ..) = all.iter().find(|damage| damage.0 == *name).unwrap();
        let image = BASES[*base](&lab);
        apply(&image);
        let start = image.data();
        let before = image.check(CheckMode::ReadOnly).unwrap();
        let readable = contents(&lab, &image);
        assert_eq!(
            exit_status(&image.check(CheckMode::RepairAll).unwrap()),
            0,
            "{name}"
        );
        let log = image.log();
        let repaired = contents(&lab, &image);
        let states = states(&start, &log);
        assert!(!states.is_empty(), "{name}");
        let mut compared = HashSet::from([image.data()]);
        println!("{name}: {} states", states.len());
        for state in states {
            cuts += 1;
            let cut = Image::new(state);
            let report = cut.check(CheckMode::ReadOnly).unwrap();
            // A leaked copy is no harm; anything else must not become more.
            assert!(
                damage(&report) <= damage(&before),
                "{name}: {before:?} became {report:?}"
            );
            // What was only written behind the end changes nothing that anybody reads.
            if cut.data()[..start.len()] != start {
                for ((now, before), repaired) in
                    contents(&lab, &cut).iter().zip(&readable).zip(&repaired)
                {
                    assert!(now.is_none() || now == repaired, "{name}: content changed");
                    assert!(
                        before.is_none() || now == before,
                        "{name}: content got lost"
                    );
                }
            }
            let report = cut.check(CheckMode::RepairAll).unwrap();
            assert_eq!(exit_status(&report), 0, "{name}: {report:?}");
            if compared.insert(cut.data()) {
                assert!(contents(&lab, &cut) == repaired, "{name}");
            }
        }
    }
    println!("{cuts} power cuts");
    assert!(cuts > 30, "{cuts}");
}

/// Polled a while, then asked to stop: whatever was done until then, a second repair makes it whole.
#[test]
fn a_cancelled_repair_leaves_what_a_second_one_completes() {
    let Some(lab) = Lab::new() else { return };
    let (name, base, apply, ..) = ALIASES[0];
    let mut cancelled = 0;
    let good = BASES[base](&lab).data();
    let mut compared = HashSet::new();
    let mut before = None;
    for requests in 0..40 {
        let image = Image::new(good.clone());
        apply(&image);
        let before = before.get_or_insert_with(|| contents(&lab, &image)).clone();
        let progress = Progress::new();
        let mut header = image.header().unwrap();
        let run =
            format_qcow2::check::run(&image.child, &mut header, CheckMode::RepairAll, &progress);
        let mut run = Box::pin(run);
        let mut context = Context::from_waker(std::task::Waker::noop());
        let writes = image.log().len();
        let mut result = None;
        // The storage answers at once: the number of its events is how far the repair is.
        image.cancel_after(requests, progress.clone());
        while result.is_none() {
            match run.as_mut().poll(&mut context) {
                std::task::Poll::Ready(done) => result = Some(done),
                std::task::Poll::Pending => std::thread::yield_now(),
            }
        }
        drop(run);
        match result.unwrap() {
            Err(error) => {
                assert_eq!(error.errno(), 125, "{name}: {error}");
                cancelled += u32::from(image.log().len() > writes);
            }
            Ok(report) => assert_eq!(exit_status(&report), 0),
        }
        assert_eq!(exit_status(&image.check(CheckMode::RepairAll).unwrap()), 0);
        if compared.insert(image.data()) {
            assert!(contents(&lab, &image) == before, "{name}");
        }
    }
    assert!(cancelled > 2, "{cancelled}");
}
