//! The duties of a driver, one by one: what the contract asks for, in words, and the cases that are about one duty alone. A
//! failure of theirs says which duty was forgotten and where `docs/writing-a-driver.md` explains it. Cases that exercise
//! many duties at once are elsewhere; they can't tell whose fault it is.

mod claims;
mod content;
mod crash;
mod edges;

use crate::{
    case::{Case, Failure},
    pattern::Seen,
};

/// Where duties are explained.
pub const TUTORIAL: &str = "docs/writing-a-driver.md";

/// Something that the contract (`block_core::driver`, design section 4) leaves to the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Duty {
    /// Flush is a flush.
    Flush,
    /// One allocation of a guest cluster at a time.
    Claim,
    /// A new cluster holds what the guest saw around the part that is written.
    Fill,
    /// Children come from the request.
    Children,
    /// Discards do what the capabilities say.
    Discard,
    /// A cluster isn't reused under somebody's I/O.
    Pin,
    /// A cluster isn't reused before its punch has ended.
    Punch,
    /// No link before the data.
    DataBeforeLink,
    /// No link before the owner or refcount.
    OwnerBeforeLink,
    /// No reuse before the unlink is durable.
    UnlinkBeforeReuse,
}

impl Duty {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Flush,
        Self::Claim,
        Self::Fill,
        Self::Children,
        Self::Discard,
        Self::Pin,
        Self::Punch,
        Self::DataBeforeLink,
        Self::OwnerBeforeLink,
        Self::UnlinkBeforeReuse,
    ];

    /// What the driver has to do, as a heading of the tutorial puts it.
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::Flush => "make everything durable in flush that completed before it",
            Self::Claim => "claim a cluster while it is being allocated",
            Self::Fill => "fill a new cluster with what the guest saw around the write",
            Self::Children => "take children from the request and never keep them",
            Self::Discard => "make discarded ranges read as declared",
            Self::Pin => "pin a cluster while I/O to it is in flight",
            Self::Punch => "end a cluster's punch before the cluster is used again",
            Self::DataBeforeLink => "make data durable before a link to it",
            Self::OwnerBeforeLink => "make a cluster's owner durable before a link to it",
            Self::UnlinkBeforeReuse => "make an unlink durable before the cluster is used again",
        }
    }

    /// A failure that says that this duty was forgotten, and what was seen.
    pub fn forgotten(self, seen: impl std::fmt::Display) -> Failure {
        Failure(self.explain(&seen.to_string()))
    }

    /// What was seen, with the duty. A text that names a duty already stays as it is.
    pub fn explain(self, seen: &str) -> String {
        if seen.contains("duty: ") {
            return seen.to_owned();
        }
        let sentence = self.sentence();
        format!("{seen}\n    duty: {sentence} ({TUTORIAL}, \"Duty: {sentence}\")")
    }
}

/// The cases that are about one duty alone and have no other place.
pub fn all() -> Vec<Case> {
    let mut cases = claims::cases();
    cases.extend(content::cases());
    cases.extend(edges::cases());
    cases.extend(crash::cases());
    cases
}

/// Whether a sector holds what `owner` wrote for that place.
fn is_of(seen: Seen, owner: u32, at: u64) -> bool {
    matches!(seen, Seen::Stamp(stamp) if stamp.owner == owner && stamp.sector == at / 512)
}
