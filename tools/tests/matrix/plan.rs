//! Which images are made: combinations drawn by a seed so that every pair of values of two options that can occur together
//! does. This file chooses; it makes nothing.

use std::collections::HashSet;

use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};

use crate::options::{Encryption, FACTORS, Maker, Options};

/// How many combinations are looked at for each image.
const CANDIDATES: usize = 80;

/// Two factors with a value each.
pub type Pair = (u8, u8, u8, u8);

/// One image: it is what its options and its seed say, and nothing else.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    pub options: Options,
    pub seed: u64,
}

/// The pairs of values in one combination.
pub fn pairs(options: Options) -> impl Iterator<Item = Pair> {
    let numbers = options.0;
    (0..FACTORS.len() as u8).flat_map(move |first| {
        (first + 1..FACTORS.len() as u8).map(move |second| {
            let value = |factor: u8| numbers[usize::from(factor)];
            (first, value(first), second, value(second))
        })
    })
}

/// All pairs that occur in an allowed combination.
pub fn possible_pairs(all: &[Options]) -> HashSet<Pair> {
    all.iter().flat_map(|options| pairs(*options)).collect()
}

/// `count` images; the first ones have as many new pairs as can be found, the others are anything.
pub fn images(count: usize, base: u64) -> Vec<Image> {
    let all: Vec<Options> = Options::all().collect();
    let mut missing = possible_pairs(&all);
    let mut rng = SmallRng::seed_from_u64(base);
    let mut list = Vec::with_capacity(count);
    for index in 0..count {
        let options = if missing.is_empty() {
            anything(&all, &mut rng)
        } else {
            let gain = |options: &Options| {
                pairs(*options)
                    .filter(|pair| missing.contains(pair))
                    .count()
            };
            (0..CANDIDATES)
                .map(|_| *all.choose(&mut rng).expect("there are combinations"))
                .max_by_key(gain)
                .expect("there are candidates")
        };
        for pair in pairs(options) {
            missing.remove(&pair);
        }
        let seed = base.wrapping_mul(1_000_000).wrapping_add(index as u64);
        list.push(Image { options, seed });
    }
    list
}

/// Any combination. LUKS is rarer than the others where qemu-img makes the image: that takes it two seconds.
fn anything(all: &[Options], rng: &mut SmallRng) -> Options {
    loop {
        let options = *all.choose(rng).expect("there are combinations");
        let is_slow = options.encryption() == Encryption::Luks && options.maker() != Maker::Blk;
        if !is_slow || rng.random_ratio(1, 4) {
            return options;
        }
    }
}
