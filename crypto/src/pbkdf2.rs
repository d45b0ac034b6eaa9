//! PBKDF2 (RFC 8018) with HMAC, in slices: a hostile header may ask for 2^32 iterations, which takes minutes, so whoever
//! waits for a key can give up between two slices. Also how many iterations fit into a time.

use std::{sync::Arc, time::Duration};

use block_core::{
    env::{Environment, offload},
    error::{Error, ErrorKind, Result},
};
use zeroize::Zeroizing;

use crate::hash::{HashAlgorithm, Prf};

/// Iterations between two chances to give up: some milliseconds.
const SLICE: u32 = 16 << 10;
/// The fewest iterations that a new key gets.
pub(crate) const MIN_ITERATIONS: u32 = 1000;
/// The benchmark gives up on a clock that stands still after so many.
const MAX_MEASURED: u32 = 1 << 22;
/// How long the benchmark runs at least, so that its clock and the scheduler don't matter.
const MEASURED: Duration = Duration::from_millis(50);

/// A derivation under way.
struct Derivation {
    prf: Box<dyn Prf>,
    salt: Vec<u8>,
    iterations: u32,
    out: Zeroizing<Vec<u8>>,
    wanted: usize,
    /// Of the block that is being computed.
    left: u32,
    u: Zeroizing<Vec<u8>>,
    sum: Zeroizing<Vec<u8>>,
}

impl Derivation {
    fn new(hash: HashAlgorithm, password: &[u8], salt: &[u8], iterations: u32, len: usize) -> Self {
        let prf = hash.keyed(password);
        let block = prf.len();
        Self {
            prf,
            salt: salt.to_vec(),
            iterations,
            out: Zeroizing::new(Vec::with_capacity(len)),
            wanted: len,
            left: 0,
            u: Zeroizing::new(vec![0; block]),
            sum: Zeroizing::new(vec![0; block]),
        }
    }

    fn is_done(&self) -> bool {
        self.out.len() == self.wanted
    }

    /// Up to `budget` iterations more.
    fn run(&mut self, mut budget: u32) {
        while budget > 0 && !self.is_done() {
            if self.left == 0 {
                let number = self.out.len() / self.prf.len() + 1;
                self.prf.first(&self.salt, number as u32, &mut self.u);
                self.sum.copy_from_slice(&self.u);
                self.left = self.iterations;
                // U_1 is done.
                self.left -= 1;
                budget -= 1;
            }
            let now = self.left.min(budget);
            self.prf.rounds(&mut self.u, &mut self.sum, now);
            self.left -= now;
            budget -= now;
            if self.left == 0 {
                let len = self.sum.len().min(self.wanted - self.out.len());
                self.out.extend_from_slice(&self.sum[..len]);
            }
        }
    }
}

/// `len` bytes derived from a password, on the environment's CPU workers.
///
/// Cancellation: dropping the future stops the work after the slice that is being computed.
///
/// # Errors
/// EINVAL for no iterations, ECANCELED when the environment shuts down.
pub async fn derive(
    env: &Arc<dyn Environment>,
    hash: HashAlgorithm,
    password: &[u8],
    salt: &[u8],
    iterations: u32,
    len: usize,
) -> Result<Zeroizing<Vec<u8>>> {
    if iterations == 0 {
        return Err(Error::invalid("PBKDF2 needs at least one iteration"));
    }
    let mut work = Derivation::new(hash, password, salt, iterations, len);
    while !work.is_done() {
        work = offload(env, move || {
            work.run(SLICE);
            work
        })
        .await?;
    }
    Ok(std::mem::take(&mut work.out))
}

/// How many iterations it takes to derive `len` bytes for `time`: measured with the environment's clock, at least
/// [`MIN_ITERATIONS`]; a clock that stands still (a simulation's) gives those.
///
/// # Errors
/// ERANGE when the iterations don't fit a header.
pub async fn iterations_for(
    env: &Arc<dyn Environment>,
    hash: HashAlgorithm,
    len: usize,
    time: Duration,
    divisor: u64,
) -> Result<u32> {
    let mut count = 4096u32;
    let per_second = loop {
        let clock = env.clone();
        let took = offload(env, move || {
            let mut work = Derivation::new(hash, b"password", b"salt", count, len);
            let start = clock.now();
            while !work.is_done() {
                work.run(SLICE);
            }
            clock.now().saturating_sub(start)
        })
        .await?;
        if took.is_zero() {
            break 0;
        }
        if took >= MEASURED {
            break u128::from(count) * 1_000_000_000 / took.as_nanos().max(1);
        }
        if count >= MAX_MEASURED {
            break 0;
        }
        count *= 4;
    };
    let wanted = per_second * time.as_millis() / 1000;
    if wanted > u128::from(u32::MAX) {
        return Err(Error::new(
            ErrorKind::Os(34),
            format!(
                "PBKDF iterations {wanted} larger than {}: Numerical result out of range",
                u32::MAX
            ),
        )
        .with_field("encrypt.iter-time", time.as_millis(), "fewer milliseconds"));
    }
    let wanted = wanted as u64 / divisor;
    Ok((wanted as u32).max(MIN_ITERATIONS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(
        hash: HashAlgorithm,
        password: &str,
        salt: &str,
        count: u32,
        len: usize,
        slice: u32,
    ) -> String {
        let mut work = Derivation::new(hash, password.as_bytes(), salt.as_bytes(), count, len);
        while !work.is_done() {
            work.run(slice);
        }
        work.out
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    }

    #[test]
    fn the_vectors_of_rfc_6070_come_out_however_the_work_is_cut() {
        for slice in [1, 3, 1000, SLICE] {
            let sha1 = HashAlgorithm::Sha1;
            assert_eq!(
                run(sha1, "password", "salt", 4096, 20, slice),
                "4b007901b765489abead49d926f721d065a429c1"
            );
            assert_eq!(
                run(
                    sha1,
                    "passwordPASSWORDpassword",
                    "saltSALTsaltSALTsaltSALTsaltSALTsalt",
                    4096,
                    25,
                    slice
                ),
                "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038"
            );
        }
    }

    #[test]
    fn sha256_gives_the_known_vector() {
        assert_eq!(
            run(HashAlgorithm::Sha256, "password", "salt", 2, 32, SLICE),
            "ae4d0c95af6b46d32d0adff928f06dd02a303f8ef3c251dfd6e2d85a95474c43"
        );
    }
}
