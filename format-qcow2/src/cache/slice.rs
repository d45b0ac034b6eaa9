//! One slice of an L2 table in memory, and the sharded table in which slices are found.
//!
//! Rules that everything else relies on:
//!
//! 1. A slice has one object as long as anyone holds it: what is in the table is dropped only while the table holds the
//!    only reference, which is decided with the shard locked for everybody.
//! 2. Entries are loaded by anyone, without a lock, but changed only by the holder of the metadata lock.
//! 3. A slice whose newest version isn't known to be on disk is dirty, and is not dropped.
//! 4. The two words of an extended entry are loaded as they were stored, together: a count that is odd while a change is
//!    being stored makes readers look again. Ordinary images have no second words, and no such count.
//!
//! Nothing here does I/O, and no shard's lock is held across an await.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasherDefault, Hasher},
};

use block_core::sync::{Arc, AtomicBool, AtomicU64, AtomicUsize, Ordering, fence, spin};

use crate::layout::{Geometry, RawEntry};

#[cfg(loom)]
use self::modelled::RwLock;
#[cfg(not(loom))]
use parking_lot::RwLock;

/// The number of a slice: guest clusters, counted in slices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SliceIndex(pub u64);

/// A part of an L2 table.
#[derive(Debug)]
pub(crate) struct Slice {
    /// First words of the raw entries, in the machine's byte order.
    descriptors: Box<[AtomicU64]>,
    /// What belongs to extended entries.
    extended: Option<Box<Extended>>,
    /// Counts changes.
    version: AtomicU64,
    /// The version that is on disk.
    written: AtomicU64,
    /// It was looked up since the eviction's hand passed last.
    referenced: AtomicBool,
    /// Some entry was seen to point to metadata: nothing is written by it without a closer look.
    suspect: AtomicBool,
    /// The generation of the metadata's places that the entries were last compared with; 0 before the first time.
    compared: AtomicU64,
}

/// The second words of a slice's entries.
#[derive(Debug)]
struct Extended {
    bitmaps: Box<[AtomicU64]>,
    /// Odd while an entry is being stored, and another value after each store.
    stores: AtomicU64,
}

impl Slice {
    pub fn new(entries: impl ExactSizeIterator<Item = RawEntry>, geometry: Geometry) -> Self {
        let mut descriptors = Vec::with_capacity(entries.len());
        let mut bitmaps = Vec::new();
        for entry in entries {
            descriptors.push(AtomicU64::new(entry.descriptor));
            if geometry.has_extended_l2() {
                bitmaps.push(AtomicU64::new(entry.bitmap));
            }
        }
        Self {
            descriptors: descriptors.into(),
            extended: geometry.has_extended_l2().then(|| {
                Box::new(Extended {
                    bitmaps: bitmaps.into(),
                    stores: AtomicU64::new(0),
                })
            }),
            version: AtomicU64::new(0),
            written: AtomicU64::new(0),
            referenced: AtomicBool::new(true),
            suspect: AtomicBool::new(false),
            compared: AtomicU64::new(0),
        }
    }

    /// Whether some entry was seen to point to metadata; `compare` looks, if that wasn't done in this `generation`
    /// (counted from 1) yet.
    pub fn is_suspect(&self, generation: u64, compare: impl FnOnce() -> bool) -> bool {
        if self.compared.load(Ordering::Acquire) < generation {
            // Suspicion is never taken back, so that it doesn't matter who of several comes last.
            if compare() {
                self.suspect.store(true, Ordering::Release);
            }
            self.compared.fetch_max(generation, Ordering::Release);
        }
        self.suspect.load(Ordering::Acquire)
    }

    /// An entry's raw bits, as they were stored together. A pin taken before keeps what it points to.
    #[inline]
    pub fn load(&self, index: usize) -> RawEntry {
        match &self.extended {
            None => RawEntry::ordinary(self.load_descriptor(index)),
            Some(extended) => self.load_extended(extended, index),
        }
    }

    #[inline]
    fn load_descriptor(&self, index: usize) -> u64 {
        // SeqCst pairs with the pins: a reader that published its pin before this load either sees an unlink that
        // came before, or is waited for by the free.
        self.descriptors[index].load(Ordering::SeqCst)
    }

    fn load_extended(&self, extended: &Extended, index: usize) -> RawEntry {
        let mut tries = 0;
        loop {
            let before = extended.stores.load(Ordering::Acquire);
            if before % 2 == 0 {
                let entry = RawEntry {
                    descriptor: self.load_descriptor(index),
                    bitmap: extended.bitmaps[index].load(Ordering::SeqCst),
                };
                // If a word was of a later store, so is the count that is read now.
                fence(Ordering::Acquire);
                if extended.stores.load(Ordering::Relaxed) == before {
                    return entry;
                }
            }
            // Someone is between two stores.
            spin(tries);
            tries = tries.saturating_add(1);
        }
    }

    pub fn len(&self) -> usize {
        self.descriptors.len()
    }

    /// Changes an entry. Only for the holder of the metadata lock, who notes the slice as dirty.
    pub fn store(&self, index: usize, raw: RawEntry) {
        match &self.extended {
            None => self.descriptors[index].store(raw.descriptor, Ordering::SeqCst),
            Some(extended) => {
                let stores = extended.stores.load(Ordering::Relaxed);
                extended.stores.store(stores + 1, Ordering::Relaxed);
                // Whoever sees a word of this store sees the odd count, too.
                fence(Ordering::Release);
                self.descriptors[index].store(raw.descriptor, Ordering::SeqCst);
                extended.bitmaps[index].store(raw.bitmap, Ordering::SeqCst);
                extended.stores.store(stores + 2, Ordering::Release);
            }
        }
        self.touch();
    }

    /// Counts as changed, though no entry was: its place on disk is another now.
    pub fn touch(&self) {
        self.version.fetch_add(1, Ordering::Release);
    }

    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The content of `version` is on disk.
    pub fn wrote(&self, version: u64) {
        self.written.fetch_max(version, Ordering::Release);
    }

    pub fn is_dirty(&self) -> bool {
        self.version.load(Ordering::Acquire) != self.written.load(Ordering::Acquire)
    }

    /// The entries as they stand on disk. Only for the holder of the metadata lock.
    pub fn to_bytes(&self, geometry: Geometry) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len() << geometry.l2_entry_bits());
        for index in 0..self.len() {
            for word in self.load(index).words(geometry) {
                bytes.extend_from_slice(&word.to_be_bytes());
            }
        }
        bytes
    }
}

/// Spreads small consecutive numbers; deterministic, so that a simulation's runs repeat.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, n: u64) {
        let mixed = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A map with numbers as keys and a repeatable order.
pub(crate) type NumberMap<V> = HashMap<u64, V, BuildHasherDefault<NumberHasher>>;
/// A set of numbers with a repeatable order.
pub(crate) type NumberSet = HashSet<u64, BuildHasherDefault<NumberHasher>>;

/// The slices in memory, found by number.
#[derive(Debug)]
pub(crate) struct SliceTable {
    shards: Box<[RwLock<NumberMap<Arc<Slice>>>]>,
    count: AtomicUsize,
    /// Where the next eviction begins.
    hand: AtomicUsize,
}

impl SliceTable {
    pub fn new(shards: usize) -> Self {
        Self {
            shards: (0..shards.max(1))
                .map(|_| RwLock::new(NumberMap::default()))
                .collect(),
            count: AtomicUsize::new(0),
            hand: AtomicUsize::new(0),
        }
    }

    fn shard(&self, index: SliceIndex) -> &RwLock<NumberMap<Arc<Slice>>> {
        &self.shards[(index.0 % self.shards.len() as u64) as usize]
    }

    /// Looks at a slice in place: the shortest way, for a lookup that needs nothing afterwards.
    #[inline]
    pub fn with<T>(&self, index: SliceIndex, look: impl FnOnce(&Slice) -> T) -> Option<T> {
        let shard = self.shard(index).read();
        let slice = shard.get(&index.0)?;
        if !slice.referenced.load(Ordering::Relaxed) {
            slice.referenced.store(true, Ordering::Relaxed);
        }
        Some(look(slice))
    }

    /// The slice, if it is in memory.
    pub fn get(&self, index: SliceIndex) -> Option<Arc<Slice>> {
        let shard = self.shard(index).read();
        let slice = shard.get(&index.0)?;
        slice.referenced.store(true, Ordering::Relaxed);
        Some(slice.clone())
    }

    /// Puts a slice in, unless there is one already, which then is the one to use.
    pub fn insert(&self, index: SliceIndex, slice: Slice) -> Arc<Slice> {
        let mut shard = self.shard(index).write();
        if let Some(there) = shard.get(&index.0) {
            return there.clone();
        }
        let slice = Arc::new(slice);
        shard.insert(index.0, slice.clone());
        self.count.fetch_add(1, Ordering::Relaxed);
        slice
    }

    /// Forgets one slice, whose table is gone.
    pub fn remove(&self, index: SliceIndex) {
        if self.shard(index).write().remove(&index.0).is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for shard in &*self.shards {
            let mut shard = shard.write();
            self.count.fetch_sub(shard.len(), Ordering::Relaxed);
            shard.clear();
        }
    }

    /// How many slices are in memory.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Drops clean slices that nobody holds until at most `target` are left or nothing more can be dropped; those that
    /// were looked up lately go last. Gives back how many went.
    pub fn evict(&self, target: usize) -> usize {
        let mut evicted = 0;
        // The first round takes those not looked up since the hand passed, the second any.
        for _ in 0..2 * self.shards.len() {
            let count = self.count();
            if count <= target {
                break;
            }
            let at = self.hand.fetch_add(1, Ordering::Relaxed) % self.shards.len();
            let mut excess = count - target;
            let mut shard = self.shards[at].write();
            let before = shard.len();
            shard.retain(|_, slice| {
                if excess == 0 {
                    return true;
                }
                if slice.referenced.load(Ordering::Relaxed) {
                    slice.referenced.store(false, Ordering::Relaxed);
                    return true;
                }
                if Self::is_held_or_dirty(slice) {
                    return true;
                }
                excess -= 1;
                false
            });
            let gone = before - shard.len();
            self.count.fetch_sub(gone, Ordering::Relaxed);
            evicted += gone;
        }
        evicted
    }

    /// To be asked with the shard locked for writing: nobody can begin to hold the slice meanwhile.
    fn is_held_or_dirty(slice: &Arc<Slice>) -> bool {
        if Arc::strong_count(slice) > 1 {
            return true;
        }
        // Whoever let go of it last may have changed it just before; its release pairs with this.
        fence(Ordering::Acquire);
        slice.is_dirty()
    }
}

#[cfg(loom)]
mod modelled {
    use std::ops::{Deref, DerefMut};

    /// loom's lock behind `parking_lot`'s interface.
    #[derive(Debug)]
    pub struct RwLock<T>(loom::sync::RwLock<T>);

    impl<T> RwLock<T> {
        pub fn new(value: T) -> Self {
            Self(loom::sync::RwLock::new(value))
        }

        pub fn read(&self) -> impl Deref<Target = T> + '_ {
            self.0
                .read()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
        }

        pub fn write(&self) -> impl DerefMut<Target = T> + '_ {
            self.0
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const fn raw(descriptor: u64) -> RawEntry {
        RawEntry::ordinary(descriptor)
    }

    fn slice<const N: usize>(descriptors: [u64; N]) -> Slice {
        let geometry = Geometry::new(16, 4, 3).unwrap();
        Slice::new(descriptors.into_iter().map(RawEntry::ordinary), geometry)
    }

    fn filled(n: u64) -> SliceTable {
        let table = SliceTable::new(4);
        for index in 0..n {
            table.insert(SliceIndex(index), slice([index]));
        }
        table
    }

    #[test]
    fn a_held_or_dirty_slice_is_never_evicted() {
        let table = filled(16);
        let held = table.get(SliceIndex(3)).unwrap();
        table.get(SliceIndex(7)).unwrap().store(0, raw(99));
        assert_eq!(table.evict(0), 14);
        assert!(Arc::ptr_eq(&held, &table.get(SliceIndex(3)).unwrap()));
        let dirty = table.get(SliceIndex(7)).unwrap();
        assert_eq!(dirty.load(0), raw(99));
        dirty.wrote(dirty.version());
        drop((dirty, held));
        table.evict(0);
        assert_eq!(table.count(), 0);
    }

    #[test]
    fn a_slice_that_changed_while_it_was_written_stays_dirty() {
        let slice = slice([0, 0]);
        slice.store(0, raw(1));
        let version = slice.version();
        slice.store(1, raw(2));
        slice.wrote(version);
        assert!(slice.is_dirty());
        slice.wrote(slice.version());
        assert!(!slice.is_dirty());
    }

    #[test]
    fn the_second_of_two_loads_gets_the_first_ones_object() {
        let table = SliceTable::new(2);
        let first = table.insert(SliceIndex(1), slice([1]));
        first.store(0, raw(5));
        let second = table.insert(SliceIndex(1), slice([1]));
        assert_eq!(second.load(0), raw(5));
    }

    #[test]
    fn what_was_looked_up_lately_goes_last() {
        let table = filled(8);
        assert_eq!(
            table.evict(7),
            1,
            "the first round only takes the marks away"
        );
        table.evict(4);
        let left: Vec<u64> = (0..8)
            .filter(|index| table.with(SliceIndex(*index), |_| ()).is_some())
            .collect();
        table.evict(2);
        assert!(table.count() <= 4 && !left.is_empty());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;

    const fn raw(descriptor: u64) -> RawEntry {
        RawEntry::ordinary(descriptor)
    }

    fn slice<const N: usize>(descriptors: [u64; N]) -> Slice {
        let geometry = Geometry::new(16, 4, 3).unwrap();
        Slice::new(descriptors.into_iter().map(RawEntry::ordinary), geometry)
    }

    fn extended(entry: RawEntry) -> Slice {
        let ordinary = Geometry::new(16, 4, 3).unwrap();
        Slice::new([entry].into_iter(), ordinary.with_extended_l2().unwrap())
    }

    /// Readers look again as often as the schedule makes them, so that all schedules are too many.
    fn bounded(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }

    #[test]
    fn the_words_of_an_extended_entry_are_never_those_of_two_stores() {
        const ENTRIES: [RawEntry; 3] = [
            RawEntry {
                descriptor: 0,
                bitmap: 0,
            },
            RawEntry {
                descriptor: 0x50000,
                bitmap: 1,
            },
            // The first descriptor again: comparing descriptors wouldn't do.
            RawEntry {
                descriptor: 0,
                bitmap: 1 << 32,
            },
        ];
        bounded(|| {
            let slice = Arc::new(extended(ENTRIES[0]));
            let changer = {
                let slice = slice.clone();
                loom::thread::spawn(move || {
                    slice.store(0, ENTRIES[1]);
                    slice.store(0, ENTRIES[2]);
                })
            };
            let seen = slice.load(0);
            assert!(ENTRIES.contains(&seen), "{seen:x?}");
            changer.join().unwrap();
            assert_eq!(slice.load(0), ENTRIES[2]);
        });
    }

    #[test]
    fn a_change_of_an_extended_entry_counts_as_one_once_it_is_whole() {
        loom::model(|| {
            let slice = Arc::new(extended(RawEntry::default()));
            let entry = RawEntry {
                descriptor: 0x50000,
                bitmap: 1,
            };
            let changer = {
                let slice = slice.clone();
                loom::thread::spawn(move || slice.store(0, entry))
            };
            if slice.version() > 0 {
                assert_eq!(slice.load(0), entry);
            }
            changer.join().unwrap();
        });
    }

    #[test]
    fn a_change_is_never_lost_to_an_eviction() {
        loom::model(|| {
            let table = Arc::new(SliceTable::new(1));
            table.insert(SliceIndex(0), slice([0]));
            let changer = {
                let table = table.clone();
                loom::thread::spawn(move || match table.get(SliceIndex(0)) {
                    Some(slice) => {
                        slice.store(0, raw(7));
                        true
                    }
                    None => false,
                })
            };
            table.evict(0);
            table.evict(0);
            let changed = changer.join().unwrap();
            if changed {
                assert_eq!(
                    table.with(SliceIndex(0), |slice| slice.load(0)),
                    Some(raw(7))
                );
            }
        });
    }

    #[test]
    fn two_loads_of_one_slice_end_with_one_object() {
        loom::model(|| {
            let table = Arc::new(SliceTable::new(1));
            let other = {
                let table = table.clone();
                loom::thread::spawn(move || {
                    let slice = table.insert(SliceIndex(0), slice([0]));
                    slice.store(0, raw(7));
                })
            };
            let mine = table.insert(SliceIndex(0), slice([0]));
            other.join().unwrap();
            assert_eq!(mine.load(0), raw(7));
        });
    }
}
