//! A power cut while the header is rewritten, between any two sectors, also of one write: the header is the old or the new one, for every
//! cluster size; where there is no room for that, nothing is written and the change is refused.

mod offline;

use std::collections::HashSet;

use block_core::ErrorKind;
use format_qcow2::{
    header_update::{change_backing, rewrite},
    layout::{Header, extensions::UnknownExtension},
};
use futures::executor::block_on;
use offline::{Event, Image};

const SECTOR: usize = 512;

/// All that may be on the disk when the power goes: of the sectors that were written since the last flush, any.
fn states(start: &[u8], log: &[Event]) -> HashSet<Vec<u8>> {
    let mut durable = start.to_vec();
    let mut states = HashSet::from([durable.clone()]);
    let mut pending: Vec<Event> = Vec::new();
    for event in log {
        match event {
            Event::Flush => {
                for part in pending.drain(..) {
                    part.apply(&mut durable);
                }
            }
            Event::Write(at, bytes) => {
                for (n, part) in bytes.chunks(SECTOR).enumerate() {
                    assert_eq!(*at as usize % SECTOR, 0);
                    pending.push(Event::Write(at + (n * SECTOR) as u64, part.to_vec()));
                }
            }
            Event::Length(_) => panic!("the length changes"),
        }
        assert!(
            pending.len() <= 10,
            "too many sectors at once to try all of it"
        );
        for which in 0..1u32 << pending.len() {
            let mut state = durable.clone();
            for (n, part) in pending.iter().enumerate() {
                if which >> n & 1 != 0 {
                    part.apply(&mut state);
                }
            }
            states.insert(state);
        }
    }
    states
}

/// What a header says to those who use the image.
fn meaning(header: &Header) -> Header {
    let mut header = header.clone();
    header.extensions.feature_names.clear();
    // A part that is skipped says nothing.
    header
        .extensions
        .unknown
        .retain(|unknown| unknown.kind != 0x736b_6970);
    header
}

fn backing_name(len: usize, letter: char) -> Option<String> {
    (len > 0).then(|| letter.to_string().repeat(len))
}

#[test]
fn a_cut_while_a_backing_file_is_renamed_leaves_the_old_or_the_new_name() {
    let lens = [0, 5, 60, 300, 390, 520, 800, 1000];
    let (mut tried, mut refused) = (0, Vec::new());
    for size in [512usize, 1024, 2048, 4096, 65536] {
        for compat in ["0.10", "1.1"] {
            for from in lens {
                for to in lens {
                    let options = format!("size=1M,cluster_size={size},compat={compat}");
                    let image = Image::create(&options).unwrap();
                    let mut header = image.header().unwrap();
                    let name = backing_name(from, 'a');
                    let format = name.as_ref().map(|_| "raw");
                    let set = block_on(change_backing(
                        &image.child,
                        &mut header,
                        name.as_deref(),
                        format,
                    ));
                    if set.is_err() {
                        continue;
                    }
                    let old = header.clone();
                    let start = image.data();
                    let written = image.log().len();
                    let name = backing_name(to, 'b');
                    let format = name.as_ref().map(|_| "qcow2");
                    let changed = block_on(change_backing(
                        &image.child,
                        &mut header,
                        name.as_deref(),
                        format,
                    ));
                    let log = image.log().split_off(written);
                    let what = format!("{options}: {from} to {to}");
                    if let Err(error) = changed {
                        assert_eq!(error.kind(), ErrorKind::NoSpace, "{what}: {error}");
                        assert!(log.is_empty() && image.data() == start, "{what}");
                        refused.push((size, from, to));
                        continue;
                    }
                    assert_eq!(
                        meaning(&image.header().unwrap()),
                        meaning(&header),
                        "{what}"
                    );
                    for state in states(&start, &log) {
                        let found = Image::new(state).header();
                        let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
                        let found = meaning(&found);
                        assert!(
                            found == meaning(&old) || found == meaning(&header),
                            "{what}: {found:?}"
                        );
                        tried += 1;
                    }
                }
            }
        }
    }
    println!("{tried} states; refused: {refused:?}");
    assert!(tried > 1000);
    // Only what has no room beside what is there.
    for (size, from, to) in refused {
        assert!(size < from + to + 300, "{size}: {from} to {to}");
    }
}

#[test]
fn a_cut_while_large_extensions_move_leaves_the_old_or_the_new_header() {
    let mut tried = 0;
    for size in [4096usize, 65536] {
        for len in [200, 500, 900] {
            for name in [0, 700] {
                let options = format!("size=1M,cluster_size={size}");
                let image = Image::create(&options).unwrap();
                let mut old = image.header().unwrap();
                old.backing_file = backing_name(name, 'a').map(String::into_bytes);
                old.extensions.unknown.push(UnknownExtension {
                    kind: 0x1234_5678,
                    data: vec![7; len],
                });
                block_on(rewrite(&image.child, &old)).unwrap();
                let start = image.data();
                let written = image.log().len();
                let mut new = old.clone();
                new.extensions.backing_format = Some("qcow2".into());
                new.backing_file = Some(b"another".to_vec());
                block_on(rewrite(&image.child, &new)).unwrap();
                for state in states(&start, &image.log()[written..]) {
                    let found = meaning(&Image::new(state).header().unwrap());
                    assert!(
                        found == meaning(&old) || found == meaning(&new),
                        "{size} {len} {name}: {found:?}"
                    );
                    tried += 1;
                }
                let last = image.header().unwrap();
                assert_eq!(
                    last.extensions.unknown, new.extensions.unknown,
                    "nothing is left behind"
                );
            }
        }
    }
    println!("{tried} states");
    assert!(tried > 60);
}
