//! The bits of a dirty bitmap: a tree that holds nothing for what is all clear or all set, so that the bitmap of a huge disk
//! costs what was written to it and no more.
//!
//! Leaves are arrays of atomic words: whoever holds the tree shared can change bits in leaves that exist. What makes or
//! drops leaves needs the tree to itself. Nothing here knows what a bit stands for.

use std::sync::atomic::{AtomicU64, Ordering};

/// Words in a leaf.
const LEAF_WORDS: usize = 64;
/// log2 of the bits in a leaf.
const LEAF_BITS: u32 = 12;
/// log2 of the children of an inner part.
const FAN_BITS: u32 = 6;
const FAN: usize = 1 << FAN_BITS;

type Leaf = [AtomicU64; LEAF_WORDS];

/// A part of the tree.
enum Part {
    /// All clear.
    Clear,
    /// All set.
    Set,
    Inner(Box<[Part; FAN]>),
    Leaf(Box<Leaf>),
}

/// A sequence of bits, all of them clear at first.
pub(super) struct Tree {
    root: Part,
    /// 0: the root is a leaf.
    level: u32,
    bits: u64,
}

/// Bits in a part at `level`.
const fn span_bits(level: u32) -> u32 {
    LEAF_BITS + FAN_BITS * level
}

/// The bits from `low` to `high` of a word, both included.
const fn mask(low: u64, high: u64) -> u64 {
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

fn new_leaf(value: u64) -> Box<Leaf> {
    Box::new(std::array::from_fn(|_| AtomicU64::new(value)))
}

/// The words of a leaf that the bits from `first` to `last` (within the leaf) touch, with a mask each.
fn words(first: u64, last: u64) -> impl Iterator<Item = (usize, u64)> {
    (first / 64..=last / 64).map(move |word| {
        let low = if word == first / 64 { first % 64 } else { 0 };
        let high = if word == last / 64 { last % 64 } else { 63 };
        (word as usize, mask(low, high))
    })
}

impl Part {
    /// Changes bits in leaves that exist. Says how many changed, and whether that was all there was to do.
    fn change_shared(&self, level: u32, first: u64, last: u64, on: bool) -> (u64, bool) {
        match self {
            Self::Clear => (0, !on),
            Self::Set => (0, on),
            Self::Leaf(leaf) => {
                let mut changed = 0;
                for (word, mask) in words(first, last) {
                    let old = if on {
                        leaf[word].fetch_or(mask, Ordering::SeqCst)
                    } else {
                        leaf[word].fetch_and(!mask, Ordering::SeqCst)
                    };
                    let differ = if on { !old } else { old };
                    changed += u64::from((differ & mask).count_ones());
                }
                (changed, true)
            }
            Self::Inner(parts) => {
                let (mut changed, mut all) = (0, true);
                for (at, first, last) in children(level, first, last) {
                    let (more, done) = parts[at].change_shared(level - 1, first, last, on);
                    changed += more;
                    all &= done;
                }
                (changed, all)
            }
        }
    }

    /// How many bits are set.
    fn count(&self, level: u32) -> u64 {
        match self {
            Self::Clear => 0,
            Self::Set => 1 << span_bits(level),
            Self::Leaf(leaf) => leaf
                .iter()
                .map(|word| u64::from(word.load(Ordering::SeqCst).count_ones()))
                .sum(),
            Self::Inner(parts) => parts.iter().map(|part| part.count(level - 1)).sum(),
        }
    }

    /// Changes bits, and says how many changed.
    fn change(&mut self, level: u32, first: u64, last: u64, on: bool) -> u64 {
        let span = 1u64 << span_bits(level);
        if last - first == span - 1 {
            let set = self.count(level);
            *self = if on { Self::Set } else { Self::Clear };
            return if on { span - set } else { set };
        }
        if matches!((&self, on), (Self::Clear, false) | (Self::Set, true)) {
            return 0;
        }
        if matches!(self, Self::Clear | Self::Set) {
            let set = matches!(self, Self::Set);
            *self = if level == 0 {
                Self::Leaf(new_leaf(if set { u64::MAX } else { 0 }))
            } else {
                Self::Inner(Box::new(std::array::from_fn(|_| {
                    if set { Self::Set } else { Self::Clear }
                })))
            };
        }
        let changed = match self {
            Self::Inner(parts) => children(level, first, last)
                .map(|(at, first, last)| parts[at].change(level - 1, first, last, on))
                .sum(),
            _ => self.change_shared(level, first, last, on).0,
        };
        self.merge_uniform();
        changed
    }

    /// Holds nothing for what has become all clear or all set.
    fn merge_uniform(&mut self) {
        let uniform = match self {
            Self::Inner(parts) => {
                if parts.iter().all(|part| matches!(part, Self::Clear)) {
                    Some(Self::Clear)
                } else if parts.iter().all(|part| matches!(part, Self::Set)) {
                    Some(Self::Set)
                } else {
                    None
                }
            }
            Self::Leaf(leaf) => {
                let all = |value| leaf.iter().all(|word| word.load(Ordering::SeqCst) == value);
                if all(0) {
                    Some(Self::Clear)
                } else if all(u64::MAX) {
                    Some(Self::Set)
                } else {
                    None
                }
            }
            _ => None,
        };
        if let Some(uniform) = uniform {
            *self = uniform;
        }
    }

    /// The first bit at or after `from` that is set (or clear), within this part.
    fn find(&self, level: u32, from: u64, set: bool) -> Option<u64> {
        match self {
            Self::Clear => (!set).then_some(from),
            Self::Set => set.then_some(from),
            Self::Leaf(leaf) => {
                let mut low = from % 64;
                for at in (from / 64) as usize..LEAF_WORDS {
                    let word = leaf[at].load(Ordering::SeqCst);
                    let word = (if set { word } else { !word }) & (u64::MAX << low);
                    if word != 0 {
                        return Some(at as u64 * 64 + u64::from(word.trailing_zeros()));
                    }
                    low = 0;
                }
                None
            }
            Self::Inner(parts) => {
                let bits = span_bits(level - 1);
                let mut within = from & ((1 << bits) - 1);
                for at in (from >> bits) as usize..FAN {
                    if let Some(found) = parts[at].find(level - 1, within, set) {
                        return Some(((at as u64) << bits) + found);
                    }
                    within = 0;
                }
                None
            }
        }
    }

    /// The word that begins at bit `first`, a multiple of 64.
    fn word(&self, level: u32, first: u64) -> u64 {
        match self {
            Self::Clear => 0,
            Self::Set => u64::MAX,
            Self::Leaf(leaf) => leaf[(first / 64) as usize].load(Ordering::SeqCst),
            Self::Inner(parts) => {
                let bits = span_bits(level - 1);
                parts[(first >> bits) as usize].word(level - 1, first & ((1 << bits) - 1))
            }
        }
    }

    /// Leaves in memory.
    fn leaves(&self) -> usize {
        match self {
            Self::Clear | Self::Set => 0,
            Self::Leaf(_) => 1,
            Self::Inner(parts) => parts.iter().map(Self::leaves).sum(),
        }
    }
}

/// The children that the bits from `first` to `last` of a part at `level` touch: which, and from where to where in it.
fn children(level: u32, first: u64, last: u64) -> impl Iterator<Item = (usize, u64, u64)> {
    let bits = span_bits(level - 1);
    let within = move |bit: u64| bit & ((1 << bits) - 1);
    (first >> bits..=last >> bits).map(move |at| {
        let from = if at == first >> bits {
            within(first)
        } else {
            0
        };
        let to = if at == last >> bits {
            within(last)
        } else {
            (1 << bits) - 1
        };
        (at as usize, from, to)
    })
}

impl Tree {
    /// `bits` clear bits, at most 2^54.
    pub fn new(bits: u64) -> Self {
        let mut tree = Self {
            root: Part::Clear,
            level: 0,
            bits: 0,
        };
        tree.resize(bits);
        tree
    }

    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// Changes the bits from `first` to `last` as far as that needs no memory; see [`Part::change_shared`].
    pub fn change_shared(&self, first: u64, last: u64, on: bool) -> (u64, bool) {
        self.root.change_shared(self.level, first, last, on)
    }

    /// Changes the bits from `first` to `last`, which are among [`Self::bits`], and says how many changed.
    pub fn change(&mut self, first: u64, last: u64, on: bool) -> u64 {
        self.root.change(self.level, first, last, on)
    }

    /// The first bit at or after `from` that is set (or clear).
    pub fn find(&self, from: u64, set: bool) -> Option<u64> {
        if from >= self.bits {
            return None;
        }
        let found = self.root.find(self.level, from, set)?;
        (found < self.bits).then_some(found)
    }

    pub fn is_set(&self, bit: u64) -> bool {
        bit < self.bits && self.word(bit / 64) >> (bit % 64) & 1 == 1
    }

    /// The bits from `64 * index` on; what is beyond the end is clear.
    pub fn word(&self, index: u64) -> u64 {
        if index >= self.bits.div_ceil(64) {
            return 0;
        }
        self.root.word(self.level, index * 64)
    }

    /// Sets bits of a word, and says how many changed. Bits beyond the end are left out.
    pub fn or_word(&mut self, index: u64, value: u64) -> u64 {
        let left = self.bits.saturating_sub(index.saturating_mul(64));
        let value = match left {
            0 => 0,
            64.. => value,
            _ => value & (u64::MAX >> (64 - left)),
        };
        if value == 0 {
            return 0;
        }
        let mut changed = 0;
        let mut rest = value;
        while rest != 0 {
            let low = u64::from(rest.trailing_zeros());
            let run = u64::from((rest >> low).trailing_ones());
            let high = low + run - 1;
            changed += self.change(index * 64 + low, index * 64 + high, true);
            rest &= !mask(low, high);
        }
        changed
    }

    /// Cuts bits off, or adds clear ones.
    pub fn resize(&mut self, bits: u64) {
        if bits < self.bits {
            self.change(bits, self.bits - 1, false);
        }
        self.bits = bits;
        while self.bits > 1 << span_bits(self.level) {
            let below = std::mem::replace(&mut self.root, Part::Clear);
            self.level += 1;
            if !matches!(below, Part::Clear) {
                let mut parts: [Part; FAN] = std::array::from_fn(|_| Part::Clear);
                parts[0] = below;
                self.root = Part::Inner(Box::new(parts));
            }
        }
    }

    pub fn count(&self) -> u64 {
        self.root.count(self.level)
    }

    /// Leaves that take memory.
    pub fn leaves(&self) -> usize {
        self.root.leaves()
    }
}
