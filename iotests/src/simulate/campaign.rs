//! Many seeds: run on as many threads as one likes, each seed in a world of its own, and added up. A range of seeds that is
//! long enough claims to have covered what its scenarios are about; a counter at zero where it claims that makes it
//! inconclusive.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use block_core::{Options, Registry, driver::Capabilities};
use parking_lot::Mutex;
use serde::Serialize;

use super::{
    generate::{Profile, generate},
    record::Failure,
    run::{How, Outcome, run},
};
use crate::{
    case::Verdict,
    lab::{Lab, LabOptions},
    memdriver,
};

/// From this many seeds on, a campaign claims coverage.
const CLAIMS: u64 = 300;
/// From this many on, also of what is rare.
const RARE_CLAIMS: u64 = 5000;

/// What is run.
#[derive(Debug, Clone)]
pub struct Campaign {
    /// Which seeds.
    pub seeds: Range<u64>,
    /// On how many threads.
    pub threads: usize,
    /// Whether requests wait at the gate.
    pub gate: bool,
    /// Whether what must hold at every step is judged; without, content and checks have to show what goes wrong.
    pub books: bool,
    /// Stop after so many failures.
    pub max_failures: usize,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Totals {
    /// Seeds that were run to their end.
    pub seeds: u64,
    /// Those that failed, ascending.
    pub failures: Vec<(u64, Failure)>,
    /// Sums of all counters.
    pub counters: BTreeMap<String, u64>,
    /// Polls.
    pub polls: u64,
    /// Of all runs, independent of their order.
    pub hash: u64,
    /// Seconds of processor time that all threads together spent in runs.
    pub busy: f64,
    /// Seconds that it took.
    pub elapsed: f64,
}

impl Totals {
    /// A counter; 0 when it isn't there.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }

    /// Seeds per hour on one core.
    pub fn rate(&self) -> f64 {
        if self.busy > 0.0 {
            self.seeds as f64 / self.busy * 3600.0
        } else {
            0.0
        }
    }

    fn add(&mut self, seed: u64, outcome: Outcome, took: Duration) {
        self.seeds += 1;
        self.polls += outcome.polls;
        self.hash ^= outcome.hash.wrapping_mul(seed * 2 + 1);
        self.busy += took.as_secs_f64();
        for (name, value) in outcome.counters {
            *self.counters.entry(name).or_default() += value;
        }
        if let Some(failure) = outcome.failure {
            self.failures.push((seed, failure));
        }
    }

    /// What is zero although so many seeds of such scenarios must have met it.
    pub fn uncovered(&self, profile: &Profile, seeds: u64) -> Vec<String> {
        let can = |capability| profile.capabilities.contains(capability);
        let backed = can(Capabilities::BACKING | Capabilities::CHANGE_BACKING);
        let mut claims: Vec<(&str, bool)> = vec![
            ("gate-waits", true),
            ("cancelled-await-points", true),
            ("dropped-at-driver", true),
            ("storage-errors", true),
            ("clean-ends", true),
            ("job-verbs", true),
            ("jobs-mirror", true),
            ("jobs-backup", true),
            ("copies-compared", true),
            ("bytes-while-guest-wrote-mirror", true),
            ("bytes-while-guest-wrote-backup", true),
            ("bytes-copied-before-write", true),
            ("bytes-written-through", true),
            ("jobs-commit", backed),
            ("bytes-while-guest-wrote-commit", backed),
            ("jobs-stream", backed),
            ("bytes-while-guest-wrote-stream", backed),
            ("power-cuts", profile.crash_safe),
            ("power-cuts-with-unflushed", profile.crash_safe),
            ("checks", can(Capabilities::CHECK)),
        ];
        if profile.is_qcow2 {
            claims.extend([
                ("images-with-books", true),
                ("frees-deferred-by-pins", true),
                ("evictions", true),
                ("copies-on-write", true),
                ("claim-waits", true),
                ("punches", true),
                ("power-cuts-in-data", true),
                ("power-cuts-in-refcounts", true),
                ("power-cuts-in-links", true),
            ]);
        }
        if profile.has_features() {
            claims.extend([
                ("images-with-compression_type", true),
                ("images-with-data_file", true),
                ("images-with-data_file_raw", true),
                ("images-with-encrypt.format", true),
                ("images-with-extended_l2", true),
                ("images-with-lazy_refcounts", true),
                ("raw-data-files-compared", true),
                ("snapshots-created", true),
                ("snapshots-applied", true),
                ("snapshots-deleted", true),
                ("snapshots-compared", true),
                ("bitmaps-added", true),
                ("bitmaps-compared", true),
                ("power-cuts-in-changes-of-snapshots", seeds >= RARE_CLAIMS),
            ]);
        }
        claims
            .into_iter()
            .filter(|(name, claimed)| *claimed && self.counter(name) == 0)
            .map(|(name, _)| name.to_owned())
            .collect()
    }

    /// The verdict on the whole. `claimed` seeds were asked for.
    pub fn verdict(&self, profile: &Profile, claimed: u64) -> Verdict {
        if let Some((seed, failure)) = self.failures.first() {
            return Verdict::Failed(format!(
                "{} of {} seeds failed; seed {seed}: {failure}",
                self.failures.len(),
                self.seeds
            ));
        }
        if claimed >= CLAIMS {
            let uncovered = self.uncovered(profile, claimed);
            if !uncovered.is_empty() {
                return Verdict::Inconclusive(format!("never happened: {}", uncovered.join(", ")));
            }
        }
        Verdict::Passed
    }
}

/// How long this thread has been on a processor, where the system tells: on a machine that others use too, the time that
/// passes says nothing about what a seed costs.
fn busy_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanos = text.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanos))
}

/// What scenarios for `format` may contain: what a new image says that it can do, and which options there are.
///
/// # Errors
/// In words, when there is no such format or no image can be made.
pub fn profile(registry: &Registry, format: &str, create: &Options) -> Result<Profile, String> {
    let factory = registry.get(format).map_err(|error| error.to_string())?;
    let has = |name: &str| {
        factory
            .create_options()
            .iter()
            .any(|option| option.name == name)
    };
    let lab = Lab::new(registry, LabOptions::default());
    let probe = async {
        lab.create(format, "probe", 1 << 20, create, None).await?;
        let node = lab.open(format, "probe", None, &Options::new()).await?;
        let handle = lab.attach(&node, "probe")?;
        let info = handle.info().await?;
        block_core::Result::Ok((node.driver().capabilities(), info.cluster_size))
    };
    let (capabilities, cluster) = lab
        .env
        .try_run(probe)
        .map_err(|stuck| stuck.to_string())?
        .map_err(|error: block_core::Error| error.to_string())?;
    let given = create.get("cluster_size").is_some();
    let mut options = Vec::new();
    for (key, value) in &create.0 {
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        options.push((key.clone(), text));
    }
    Ok(Profile {
        format: format.to_owned(),
        capabilities,
        records_backing: has("backing_file"),
        cluster_sizes: if has("cluster_size") && !given {
            vec![512, 1024, 4096, 4096, 16384, 65536]
        } else {
            Vec::new()
        },
        default_cluster: cluster.unwrap_or(4096),
        crash_safe: format != memdriver::NAME,
        create: options,
        is_qcow2: format == "qcow2",
    })
}

impl Campaign {
    /// Runs it. `each` is called when a seed has ended, from any thread.
    pub fn run(
        &self,
        registry: &Registry,
        profile: &Profile,
        each: impl Fn(u64, &Outcome) + Sync,
    ) -> Totals {
        let next = AtomicU64::new(self.seeds.start);
        let enough = AtomicBool::new(false);
        let totals = Mutex::new(Totals::default());
        let epoch = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(|| {
                    while !enough.load(Ordering::Relaxed) {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= self.seeds.end {
                            break;
                        }
                        let began = busy_time().unwrap_or_else(|| epoch.elapsed());
                        let scenario = generate(profile, seed);
                        let mut how = How::seed(seed).without_gate(!self.gate);
                        how.books = self.books;
                        let outcome = run(registry, &scenario, &how);
                        let now = busy_time().unwrap_or_else(|| epoch.elapsed());
                        each(seed, &outcome);
                        let mut totals = totals.lock();
                        totals.add(seed, outcome, now.saturating_sub(began));
                        if totals.failures.len() >= self.max_failures {
                            enough.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let mut totals = totals.into_inner();
        totals.elapsed = epoch.elapsed().as_secs_f64();
        totals.failures.sort_by_key(|failure| failure.0);
        totals
    }
}
