//! What the sequential cases work with: an image, over as many backing files as a case wants, beside an exact model of
//! its bytes; and the final judgement. The probe lets a case see what the core makes of a request.
//!
//! Nothing here races: where a case has several requests in flight, it tells the model itself what comes of them. It knows no
//! format: what the driver declares decides, and [`Stop::NotCovered`] says what is missing.

mod image;
mod judge;
mod probe;

use std::{future::Future, sync::Arc};

pub use self::{
    image::{Bench, Parked},
    judge::same,
    probe::{Call, CallKind, Probe, Topped},
};
use crate::case::{Case, CaseResult, Failure, Group, Scene, Verdict};

/// Why a case ends early.
#[derive(Debug, Clone)]
pub enum Stop {
    /// The driver doesn't have what the case is about.
    NotCovered(String),
    /// What the case is about didn't happen.
    Inconclusive(String),
    /// Something is wrong.
    Failed(Failure),
}

/// How a case ends: `Ok` when it has passed.
pub type Outcome = Result<(), Stop>;

impl<T: Into<Failure>> From<T> for Stop {
    fn from(failure: T) -> Self {
        Self::Failed(failure.into())
    }
}

/// "Not covered", with the reason.
pub fn not_covered<T>(why: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::NotCovered(why.into()))
}

/// "Failed", with what is wrong.
pub fn wrong<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Failed(Failure(what.into())))
}

/// Fails with `what` unless it `holds`.
pub fn must(holds: bool, what: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { wrong(what()) }
}

/// A case whose function ends with an [`Outcome`].
pub fn case<F>(
    group: Group,
    name: impl Into<String>,
    proves: impl Into<String>,
    run: impl Fn(Arc<Scene>) -> F + Send + Sync + 'static,
) -> Case
where
    F: Future<Output = Outcome> + Send + 'static,
{
    Case::new(group, name, proves, move |scene| verdict(run(scene)))
}

async fn verdict(outcome: impl Future<Output = Outcome>) -> CaseResult {
    match outcome.await {
        Ok(()) => Ok(Verdict::Passed),
        Err(Stop::NotCovered(why)) => Ok(Verdict::NotCovered(why)),
        Err(Stop::Inconclusive(why)) => Ok(Verdict::Inconclusive(why)),
        Err(Stop::Failed(failure)) => Err(failure),
    }
}

/// Bytes that are never zero, and different at every place and for every `seq`.
pub fn pattern(seq: u64, offset: u64, len: u64) -> Vec<u8> {
    let end = offset + len;
    let mut bytes = Vec::with_capacity(len as usize + 16);
    for word in offset / 8..end.div_ceil(8) {
        let mixed = (word ^ (seq << 40) ^ seq).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = mixed ^ (mixed >> 29);
        bytes.extend_from_slice(&(mixed | 0x0101_0101_0101_0101).to_le_bytes());
    }
    bytes.drain(..(offset % 8) as usize);
    bytes.truncate(len as usize);
    bytes
}

/// Whether all of them are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Comparing blocks is quick also where nothing is optimised.
    static ZEROES: [u8; 4096] = [0; 4096];
    bytes
        .chunks(4096)
        .all(|chunk| *chunk == ZEROES[..chunk.len()])
}
