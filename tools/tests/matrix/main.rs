//! The generated matrix of qcow2 images: all combinations of cluster size, refcount width, version, extended L2 entries,
//! compression type, data file, encryption and lazy refcounts that the format allows, each with a random program of writes,
//! zero writes, discards, snapshots and resizes, carried out by the installed qemu-img and qemu-io, by `blk`, or by both in turns.
//! Whoever made it, both sides have to call an image clean, to say the same of it, and to read the oracle's bytes.
//!
//! `cargo test -p tools --test matrix` makes a part of the images (every value of every option is among them);
//! `cargo test -p tools --test matrix -- --ignored` (or `just matrix`) makes all of them. An image is decided by its options
//! and its seed. `MATRIX_IMAGE='options,seed=N'` makes that one alone, prints what is run, and leaves its files; `MATRIX_COUNT` and
//! `MATRIX_BASE` ask for more images and for others. Without qemu's tools nothing is made, and that is said.

mod judge;
mod model;
mod options;
mod plan;
mod program;
mod run;

use std::{
    collections::{BTreeMap, HashSet},
    env, fs,
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Instant,
};

use crate::{
    model::Patterns,
    options::{FACTORS, Maker, Options},
    plan::Image,
    run::{Bench, Shop},
};

/// How many images are made in all, at least 500.
const ALL: usize = 640;
/// How many of them `cargo test` makes.
const SOME: usize = 48;

fn qemu_is_installed() -> bool {
    let found = ["qemu-img", "qemu-io"]
        .iter()
        .all(|tool| Command::new(tool).arg("-V").output().is_ok());
    if !found {
        eprintln!("NOTE: qemu-img and qemu-io are not installed: no image of the matrix was made");
    }
    found
}

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text}: not a number")),
    )
}

/// The one image that is asked for, if one is.
fn asked_for() -> Option<Image> {
    let text = env::var("MATRIX_IMAGE").ok()?;
    let parsed = text.rsplit_once(",seed=").and_then(|(options, seed)| {
        let options = Options::parse(options)?;
        let seed = seed.parse().ok()?;
        Some(Image { options, seed })
    });
    Some(parsed.unwrap_or_else(|| panic!("MATRIX_IMAGE={text}: no image is called so")))
}

fn name_of(image: &Image) -> String {
    format!("{},seed={}", image.options, image.seed)
}

fn with_shop<T>(work: impl FnOnce(&Shop) -> T) -> T {
    let dir = tempfile::tempdir().unwrap();
    let shop = Shop {
        patterns: Patterns::new(),
        pattern_files: dir.path().to_owned(),
    };
    shop.patterns.save(dir.path());
    work(&shop)
}

/// What came of one image.
struct Made {
    counts: BTreeMap<&'static str, usize>,
    failure: Option<String>,
}

fn make(shop: &Shop, image: Image, keep: bool) -> Made {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(shop, image, dir.path());
    let result = bench.make();
    let counts = std::mem::take(&mut bench.counts);
    let history = std::mem::take(&mut bench.history);
    if keep {
        eprintln!("{history}\nThe files are in {}", dir.keep().display());
    }
    let failure = result.err().map(|why| {
        let name = name_of(&image);
        format!(
            "{why}\n  MATRIX_IMAGE='{name}' cargo test -p tools --test matrix matrix -- --nocapture\n{history}"
        )
    });
    Made { counts, failure }
}

/// Makes the images on all cores; gives how often each kind of step was done, and fails if any image did.
fn make_all(images: &[Image]) -> BTreeMap<&'static str, usize> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new((BTreeMap::new(), Vec::new()));
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let begun = Instant::now();
    with_shop(|shop| {
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some(image) = images.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let begun = Instant::now();
                        let made = make(shop, *image, images.len() == 1);
                        let verdict = if made.failure.is_some() {
                            "FAILED"
                        } else {
                            "ok"
                        };
                        println!(
                            "{} {verdict} ({} ms)",
                            name_of(image),
                            begun.elapsed().as_millis()
                        );
                        let mut results = results.lock().unwrap();
                        for (kind, count) in made.counts {
                            *results.0.entry(kind).or_default() += count;
                        }
                        results.1.extend(made.failure);
                    }
                });
            }
        });
    });
    let (counts, failures): (BTreeMap<&'static str, usize>, Vec<String>) =
        results.into_inner().unwrap();
    println!(
        "{} images in {:.0?}, {} failed; steps: {counts:?}",
        images.len(),
        begun.elapsed(),
        failures.len()
    );
    assert!(
        failures.is_empty(),
        "{} of {} images failed:\n\n{}",
        failures.len(),
        images.len(),
        failures.join("\n\n")
    );
    counts
}

fn run_matrix(count: usize) {
    if !qemu_is_installed() {
        return;
    }
    if let Some(image) = asked_for() {
        make_all(&[image]);
        return;
    }
    let base = number("MATRIX_BASE").unwrap_or(1);
    let images = plan::images(ALL.max(count), base);
    let images = &images[..count];
    for (factor, (name, values)) in FACTORS.iter().enumerate() {
        for (value, word) in values.iter().enumerate() {
            let occurs = images
                .iter()
                .any(|image| usize::from(image.options.0[factor]) == value);
            assert!(occurs, "{name}={word} doesn't occur");
        }
    }
    let counts = make_all(images);
    for kind in program::KINDS {
        assert!(counts.contains_key(kind), "no step was a {kind}");
    }
}

#[test]
fn a_part_of_the_matrix_is_read_and_made_as_qemus_tools_do() {
    run_matrix(SOME);
}

#[test]
#[ignore = "minutes; `just matrix`"]
fn the_whole_matrix_is_read_and_made_as_qemus_tools_do() {
    let count = number("MATRIX_COUNT").map_or(ALL, |count| count as usize);
    run_matrix(count);
}

/// At least 500 images, and any two values that can go together do.
#[test]
fn the_matrix_has_every_pair_of_values_that_can_occur() {
    let all: Vec<Options> = Options::all().collect();
    let possible = plan::possible_pairs(&all);
    let images = plan::images(ALL, number("MATRIX_BASE").unwrap_or(1));
    assert!(images.len() >= 500);
    let planned: HashSet<_> = images
        .iter()
        .flat_map(|image| plan::pairs(image.options))
        .collect();
    assert!(possible.len() > 500, "{}", possible.len());
    assert_eq!(possible.difference(&planned).count(), 0);
    let needed = (1..=images.len())
        .find(|count| {
            let part = images[..*count].iter();
            let pairs: HashSet<_> = part.flat_map(|image| plan::pairs(image.options)).collect();
            pairs == possible
        })
        .unwrap();
    let mut makers = [0; 3];
    for image in &images {
        makers[match image.options.maker() {
            Maker::Qemu => 0,
            Maker::Blk => 1,
            Maker::Mixed => 2,
        }] += 1;
    }
    println!(
        "{} combinations, {} pairs, all of them in the first {needed} images; made by qemu, blk, both: {makers:?}",
        all.len(),
        possible.len()
    );
}

/// A matrix that can't fail would prove nothing.
#[test]
fn one_changed_byte_of_an_image_is_found_by_the_judge() {
    if !qemu_is_installed() {
        return;
    }
    let text = "cluster_size=4096,refcount_bits=16,compat=1.1,extended_l2=off,compression_type=zlib,data_file=none,\
                encrypt=none,lazy_refcounts=off,maker=blk";
    let options = Options::parse(text).unwrap();
    with_shop(|shop| {
        for seed in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            let mut bench = Bench::new(shop, Image { options, seed }, dir.path());
            bench.make().unwrap();
            let world = bench.world.clone().unwrap();
            judge::everything(&mut bench, &world).unwrap();
            let image = dir.path().join("disk.qcow2");
            let before = fs::read(&image).unwrap();
            assert!(judge::spoil_a_byte(&image, &world.disk.bytes));
            let why = judge::everything(&mut bench, &world).unwrap_err();
            assert!(why.contains(": 1 bytes differ"), "{why}");
            fs::write(&image, before).unwrap();
            judge::everything(&mut bench, &world).unwrap();
        }
    });
}
