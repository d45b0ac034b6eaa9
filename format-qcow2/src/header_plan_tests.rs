//! Headers of all kinds and sizes, changed into one another.

use super::*;
use crate::{
    create::{Parameters, Plan},
    layout::extensions::UnknownExtension,
};

fn header(bits: u32, change: impl FnOnce(&mut Header)) -> Header {
    let parameters = Parameters {
        cluster_bits: bits,
        ..Parameters::default()
    };
    let mut header = Plan::new(&parameters).unwrap().header(&parameters);
    change(&mut header);
    header
}

fn named(bits: u32, len: usize, format: Option<&str>) -> Header {
    header(bits, |header| {
        if len > 0 {
            header.backing_file = Some((0..len).map(|n| b'a' + (n % 26) as u8).collect());
            header.extensions.backing_format = format.map(str::to_owned);
        }
    })
}

/// All states on the way say the one or the other; `false` when there is no way.
fn changes(from: &Header, to: &Header, what: &str) -> bool {
    let start = from.encode().unwrap();
    let Some(steps) = plan(&start, to) else {
        return false;
    };
    let (old, new) = (essence(from.clone()), essence(to.clone()));
    let mut state = start;
    for (index, bytes) in steps {
        assert_eq!(bytes.len(), SECTOR);
        state[index * SECTOR..][..SECTOR].copy_from_slice(&bytes);
        let now = meaning(&state).unwrap_or_else(|| panic!("{what}: not a header"));
        assert!(now == old || now == new, "{what}: sector {index}: {now:?}");
    }
    let last = Header::decode(&state).unwrap();
    assert_eq!(essence(last.clone()), new, "{what}");
    let skips = |unknown: &UnknownExtension| unknown.kind == SKIP;
    assert!(!last.extensions.unknown.iter().any(skips), "{what}");
    true
}

#[test]
fn names_and_formats_change_without_a_harmful_state_in_clusters_of_any_size() {
    let all_lens = [0, 1, 100, 300, 380, 500, 700, 900, 1023];
    for bits in [9, 10, 11, 12, 13, 16, 21] {
        let lens = if bits > 12 {
            &[0, 40, 1023][..]
        } else {
            &all_lens
        };
        let mut refused = Vec::new();
        let all: Vec<Header> = lens
            .iter()
            .flat_map(|len| [None, Some("qcow2-very-long")].map(|format| (*len, format)))
            .map(|(len, format)| named(bits, len, format))
            .filter(|header| header.encode().is_ok())
            .collect();
        for from in &all {
            for to in &all {
                let mut to = to.clone();
                // Another name of that length.
                if let Some(name) = &mut to.backing_file {
                    name.reverse();
                }
                let len = |header: &Header| header.backing_file.as_ref().map_or(0, Vec::len);
                let what = format!("{bits}: {} to {}", len(from), len(&to));
                if !changes(from, &to, &what) {
                    refused.push((len(from), len(&to)));
                }
            }
        }
        // Two long names have no room in one small cluster.
        let most = match bits {
            9 => usize::MAX,
            10 => 380,
            11 => 900,
            _ => usize::MAX,
        };
        for (from, to) in &refused {
            assert!(from + to > most, "{bits}: {from} to {to} is refused");
        }
        assert!(
            bits == 10 || bits == 11 || refused.is_empty(),
            "{bits}: {refused:?}"
        );
    }
}

#[test]
fn extensions_beyond_the_first_sector_change_without_a_harmful_state() {
    let unknown = |len: usize, byte: u8| UnknownExtension {
        kind: 0x1234_5678,
        data: vec![byte; len],
    };
    for bits in [12, 16] {
        for len in [300, 400, 700, 1500] {
            for name in [0, 40, 1000] {
                let base = |format| {
                    let mut header = named(bits, name, format);
                    header.extensions.unknown.push(unknown(len, 7));
                    header
                };
                let (plain, long) = (base(None), base(Some("raw")));
                let mut other = long.clone();
                other.extensions.unknown.push(unknown(len / 2, 9));
                let mut data = plain.clone();
                data.extensions.unknown = vec![unknown(len, 8)];
                for (a, b) in [
                    (&plain, &long),
                    (&plain, &other),
                    (&long, &other),
                    (&plain, &data),
                ] {
                    if a.encode().is_err() || b.encode().is_err() {
                        continue;
                    }
                    for (from, to) in [(a, b), (b, a)] {
                        let what = format!("{bits}: extension of {len}, name of {name}");
                        let fits = 2 * (len + len / 2 + name) + 400 < 1 << bits;
                        assert!(changes(from, to, &what) || !fits, "{what}: refused");
                    }
                }
            }
        }
    }
}

#[test]
fn versions_and_feature_bits_change_without_a_harmful_state() {
    for bits in [9, 10, 11, 12, 16] {
        for name in [0, 40, 200, 800] {
            let from = named(bits, name, Some("raw"));
            if from.encode().is_err() {
                continue;
            }
            let mut to = from.clone();
            to.version = 2;
            assert!(changes(&from, &to, "to version 2"), "{bits} {name}");
            let fits = to.encode().is_ok();
            assert!(fits && changes(&to, &from, "to version 3"), "{bits} {name}");
        }
    }
}

#[test]
fn what_a_cut_left_of_a_skip_is_dropped() {
    let plain = named(16, 0, None);
    let mut left = plain.clone();
    left.extensions.unknown.push(UnknownExtension {
        kind: SKIP,
        data: vec![1; 900],
    });
    assert!(changes(&left, &plain, "a leftover"));
    let start = left.encode().unwrap();
    let steps = plan(&start, &left).unwrap();
    let mut state = start;
    for (index, bytes) in steps {
        state[index * SECTOR..][..SECTOR].copy_from_slice(&bytes);
    }
    assert!(
        Header::decode(&state)
            .unwrap()
            .extensions
            .unknown
            .is_empty()
    );
}
