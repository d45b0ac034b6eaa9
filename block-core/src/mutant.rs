//! Seeded bugs, to measure the tests with: what a suite doesn't find, it doesn't prove.
//!
//! Each has a name in [`MUTANTS`] and one or two places in the code that ask [`is_active`]. Without the feature `mutants`,
//! which nothing but the test program's own feature turns on, that is a constant `false` and the places vanish; there is
//! no way to choose a bug then. With it, one bug at a time is chosen for the whole process.
//!
//! No decision of the real code is made here.

/// A seeded bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mutant {
    /// Its name: the part that it is in, then what it does.
    pub name: &'static str,
    /// What goes wrong, in a sentence.
    pub what: &'static str,
    /// Chosen from the code alone, without a look at any test.
    pub blind: bool,
}

const fn blind(name: &'static str, what: &'static str) -> Mutant {
    Mutant {
        name,
        what,
        blind: true,
    }
}

const fn asked(name: &'static str, what: &'static str) -> Mutant {
    Mutant {
        name,
        what,
        blind: false,
    }
}

/// All of them.
pub const MUTANTS: &[Mutant] = &[
    // The gate and the request path.
    asked("gate-not-for-discard", "discards aren't serialising"),
    asked(
        "gate-not-for-zero-flag",
        "zero writes that come through the write call aren't serialising",
    ),
    asked(
        "gate-not-for-write-zeroes",
        "zero writes that come through the write-zeroes call aren't serialising",
    ),
    blind(
        "gate-not-for-padded-writes",
        "the read-modify-write of an unaligned write isn't serialising",
    ),
    blind(
        "gate-not-for-copy-on-read",
        "copy-on-read isn't serialising",
    ),
    blind(
        "gate-ignores-serialise-writes",
        "a driver's wish to have its writes serialised is ignored",
    ),
    asked("gate-not-for-truncate", "truncate isn't serialising"),
    blind(
        "gate-truncate-holds-new-end-only",
        "a shrinking truncate doesn't hold what it cuts off",
    ),
    blind(
        "gate-range-not-rounded-out",
        "a serialising range isn't rounded out to the granularity",
    ),
    asked(
        "gate-last-wake-lost",
        "when several waiters are to be woken at once, the last one isn't",
    ),
    blind(
        "gate-serialising-ignores-plain",
        "a serialising request doesn't wait for plain ones",
    ),
    blind(
        "gate-serialising-ignores-serialising",
        "a serialising request doesn't wait for others of its kind",
    ),
    blind(
        "gate-plain-ignores-serialising",
        "a plain request doesn't wait for serialising ones",
    ),
    asked(
        "gate-ticket-order-broken",
        "a request waits also for one that came after it",
    ),
    asked(
        "ticket-released-on-drop",
        "a dropped request gives its ticket back before its I/O has ended",
    ),
    blind(
        "dropped-request-not-serialising",
        "a dropped plain write holds nobody back",
    ),
    blind(
        "path-no-second-look",
        "after a wait at the gate nothing is validated again",
    ),
    asked(
        "path-stale-edges",
        "the edges from before a wait are used after it",
    ),
    blind(
        "path-length-change-unnoticed",
        "a truncate doesn't tell those who looked at the length before",
    ),
    blind(
        "path-max-transfer-ignored",
        "data requests aren't split at the driver's limit",
    ),
    blind(
        "path-padded-write-zeroes-tail",
        "the last block of a padded write is filled with zeroes",
    ),
    blind(
        "path-fua-lost-in-fallback",
        "zeroes written as data forget FUA",
    ),
    blind(
        "path-no-fallback-ignored",
        "NO_FALLBACK gets plain zeroes written all the same",
    ),
    blind("path-detect-zeroes-unmaps", "detect-zeroes=on unmaps"),
    blind(
        "path-discard-mode-ignored",
        "discard=ignore lets discards through",
    ),
    blind(
        "path-discard-enlarged",
        "an unaligned discard is enlarged to whole blocks",
    ),
    blind(
        "path-grown-range-not-zeroed",
        "growing over a longer backing file doesn't ask for zeroes",
    ),
    blind(
        "path-pin-dropped",
        "the pin that came with a mapping ends before the I/O",
    ),
    blind(
        "path-write-permission-unchecked",
        "a handle without the write permission may write",
    ),
    asked(
        "bitmap-not-set-on-zero-write",
        "zero writes don't mark dirty bitmaps",
    ),
    blind(
        "bitmap-not-set-on-discard",
        "discards don't mark dirty bitmaps",
    ),
    blind(
        "bitmap-not-set-on-failed-write",
        "a write that failed half-way doesn't mark dirty bitmaps",
    ),
    blind(
        "flush-failure-forgotten",
        "a failed flush is retried into success",
    ),
    blind(
        "flush-covers-later-writes",
        "a flush counts for writes that end while it runs",
    ),
    blind(
        "flush-forgets-discard",
        "after a discard there is nothing to flush",
    ),
    blind(
        "flush-ignores-dropped-requests",
        "a flush doesn't wait for dropped requests",
    ),
    blind(
        "drain-ignores-dropped-requests",
        "a drain doesn't wait for dropped requests",
    ),
    blind(
        "drain-end-resumes-nested",
        "the end of an inner drained section ends the outer one",
    ),
    blind(
        "status-beyond-short-backing-not-zero",
        "beyond the end of a short backing file status says nothing",
    ),
    // qcow2.
    asked(
        "qcow2-claims-ignored",
        "two writes allocate the same guest cluster at once",
    ),
    asked(
        "qcow2-link-before-data",
        "a new cluster is linked before its data is written",
    ),
    blind(
        "qcow2-cow-head-zeroed",
        "copy-on-write fills what is before the data with zeroes",
    ),
    blind(
        "qcow2-cow-tail-of-first-cluster",
        "copy-on-write fills the end of the last cluster from the first",
    ),
    blind(
        "qcow2-cow-ignores-backing-file",
        "copy-on-write doesn't read the backing file",
    ),
    asked(
        "qcow2-link-frees-what-was-planned",
        "a write frees what its clusters held when it was planned, whatever they hold by then",
    ),
    blind(
        "qcow2-overwritten-cluster-not-unreferenced",
        "what a write replaces is never freed",
    ),
    blind(
        "qcow2-compressed-frees-first-cluster-only",
        "of a compressed cluster over two host clusters one leaks",
    ),
    blind(
        "qcow2-link-not-noted-for-barrier",
        "a link isn't followed by the barrier that it needs",
    ),
    asked(
        "qcow2-pin-dropped-before-write",
        "the pin of an overwrite ends before its I/O",
    ),
    asked(
        "qcow2-mapped-read-not-pinned",
        "what try_map gives out isn't pinned",
    ),
    asked(
        "qcow2-overwrite-of-shared-cluster",
        "a write goes on in place although a snapshot shares the cluster",
    ),
    blind(
        "qcow2-unmap-reveals-backing",
        "an unmapped cluster shows the backing file",
    ),
    blind(
        "qcow2-discard-enlarged",
        "a discard takes clusters that it covers only in part",
    ),
    blind(
        "qcow2-zero-always-unmaps",
        "zero writes without MAY_UNMAP give their space away",
    ),
    blind(
        "qcow2-discard-leaks",
        "discarded clusters are unlinked and never freed",
    ),
    blind(
        "qcow2-partial-zero-takes-whole-cluster",
        "a partial zero write hides the rest of the backing file's cluster",
    ),
    blind(
        "qcow2-free-before-unlink-is-durable",
        "a cluster is reused before its unlink is on disk",
    ),
    asked(
        "qcow2-free-ignores-pins",
        "a cluster is reused while I/O to it is in flight",
    ),
    asked(
        "qcow2-publish-before-punch",
        "a cluster is allocatable before it is punched",
    ),
    asked(
        "qcow2-no-barrier-between-data-and-links",
        "links may reach the disk before data and refcounts",
    ),
    blind(
        "qcow2-links-written-before-refcounts",
        "links are written before the refcounts",
    ),
    blind(
        "qcow2-no-barrier-after-links",
        "a flush ends before its links are durable",
    ),
    blind(
        "qcow2-slice-clean-although-changed",
        "an L2 slice that changed during write-back counts as clean",
    ),
    blind(
        "qcow2-refcount-block-clean-although-changed",
        "a refcount block that changed during write-back counts as clean",
    ),
    blind(
        "qcow2-write-back-error-swallowed",
        "metadata that can't be written counts as written",
    ),
    asked(
        "qcow2-refcount-increment-by-two",
        "adding a reference adds two",
    ),
    asked(
        "qcow2-refcount-decrement-by-none",
        "dropping a reference drops none",
    ),
    blind(
        "qcow2-refcount-decrement-not-dirty",
        "a lowered refcount isn't written back",
    ),
    asked(
        "qcow2-refcount-one-taken-for-free",
        "a cluster with one reference is taken for free",
    ),
    asked(
        "qcow2-refcount-block-does-not-count-itself",
        "a new refcount block has no reference to itself",
    ),
    blind(
        "qcow2-packed-neighbour-not-counted",
        "compressed data in a shared cluster adds no reference",
    ),
    blind(
        "qcow2-failed-allocation-leaks",
        "clusters of a write that failed are never given back",
    ),
    blind(
        "qcow2-freed-space-never-reused",
        "freed clusters are never found again",
    ),
    blind(
        "qcow2-grown-range-shows-backing",
        "what grows shows what the backing file has there",
    ),
    blind(
        "qcow2-shrink-leaves-tail",
        "the rest of the last cluster comes back when a shrunk disk grows again",
    ),
    blind(
        "qcow2-new-l1-table-not-counted-durably",
        "the header points to an L1 table without refcounts",
    ),
    // Jobs.
    asked(
        "mirror-dirty-bit-cleared-after-copy",
        "mirror clears a dirty bit after it has read",
    ),
    blind(
        "mirror-zero-write-not-written-through",
        "a write-blocking mirror leaves zero writes out",
    ),
    blind(
        "mirror-partial-write-cleans-granule",
        "a write to a part of a dirty granule makes it clean",
    ),
    blind(
        "mirror-target-error-swallowed",
        "a write that failed at the target counts as done",
    ),
    blind(
        "mirror-no-last-pass",
        "what is dirty at the switch-over isn't copied",
    ),
    blind(
        "mirror-failed-chunk-forgotten",
        "a chunk that failed isn't copied again",
    ),
    blind(
        "mirror-target-not-flushed",
        "the target isn't flushed before the switch-over",
    ),
    blind(
        "job-chunk-without-ticket",
        "chunks that should hold a ticket don't",
    ),
    blind("job-skips-zeroes", "what reads as zeroes isn't copied"),
    blind(
        "job-failed-chunk-not-retried",
        "with on-error=ignore or stop a failed chunk is left out",
    ),
    asked(
        "backup-discard-not-copied-before",
        "a discard doesn't copy the old content first",
    ),
    blind(
        "backup-zero-write-not-copied-before",
        "a zero write doesn't copy the old content first",
    ),
    blind(
        "backup-cluster-marked-before-copied",
        "a cluster counts as saved before it is",
    ),
    blind(
        "backup-filter-not-serialising",
        "the copy-before-write filter doesn't serialise writes",
    ),
    blind(
        "backup-error-ignored",
        "a failed copy before a write breaks neither the write nor the backup",
    ),
    blind(
        "commit-header-not-rewritten",
        "the overlay's header names a layer that is gone",
    ),
    blind(
        "commit-base-not-flushed",
        "a commit ends before its base is durable",
    ),
    blind(
        "stream-copies-nothing",
        "stream drops the layers below without having copied them",
    ),
];

#[cfg(feature = "mutants")]
static ACTIVE: parking_lot::RwLock<Option<&'static str>> = parking_lot::RwLock::new(None);

/// Whether the bug called `name` was chosen.
#[cfg(feature = "mutants")]
pub fn is_active(name: &str) -> bool {
    *ACTIVE.read() == Some(name)
}

/// Whether the bug called `name` was chosen: never, without the feature `mutants`.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
pub const fn is_active(_name: &str) -> bool {
    false
}

/// Chooses a bug for the whole process, or none. False when there is no such bug.
#[cfg(feature = "mutants")]
pub fn select(name: Option<&str>) -> bool {
    let found = match name {
        None => None,
        Some(name) => match MUTANTS.iter().find(|mutant| mutant.name == name) {
            Some(mutant) => Some(mutant.name),
            None => return false,
        },
    };
    *ACTIVE.write() = found;
    true
}
