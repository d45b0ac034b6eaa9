//! {gate on, off} × {the driver's own safeguards on, off} × regions × seeds, and what each must come to.

use block_core::Registry;
use serde::Serialize;

use super::storm::{StormConfig, StormReport, storm};
use crate::case::{FormatUnderTest, Verdict};

/// What a storm must come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expect {
    /// Everything right, and requests did wait at the gate.
    Clean,
    /// No other range touched, and the safeguards caught something.
    OthersIntact,
    /// Corruption: otherwise the test sees nothing.
    Corrupt,
}

/// One configuration with its runs.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cell {
    /// Whether requests waited at the gate.
    pub gate: bool,
    /// Whether the driver had its safeguards.
    pub safeguards: bool,
    /// Clusters of the region.
    pub region: u64,
    /// What it had to come to.
    pub expect: Expect,
    /// One per seed.
    pub runs: Vec<StormReport>,
}

impl Expect {
    /// What a configuration must come to.
    pub const fn of(gate: bool, safeguards: bool) -> Option<Self> {
        match (gate, safeguards) {
            (true, true) => Some(Self::Clean),
            (false, true) => Some(Self::OthersIntact),
            (false, false) => Some(Self::Corrupt),
            // The gate alone: what a driver without safeguards can count on depends on the driver.
            (true, false) => None,
        }
    }
}

/// What the driver's safeguards caught.
pub fn caught(report: &StormReport) -> u64 {
    report.counter("frees-deferred-by-pins") + report.counter("ownership-violations-caught")
}

/// The verdict on one run.
pub fn verdict(expect: Expect, report: &StormReport) -> Verdict {
    match expect {
        Expect::Clean if !report.is_clean() => Verdict::Failed(report.summary()),
        Expect::Clean if report.counter("gate-waits") == 0 => {
            Verdict::Inconclusive("nobody waited at the gate".into())
        }
        Expect::OthersIntact
            if report.is_corrupt() || report.victims_changed > 0 || report.foreign > 0 =>
        {
            Verdict::Failed(report.summary())
        }
        Expect::OthersIntact if caught(report) == 0 => {
            Verdict::Inconclusive("the safeguards caught nothing".into())
        }
        Expect::Corrupt if !report.is_corrupt() => {
            Verdict::Failed("no corruption was detected: the test sees nothing".into())
        }
        _ => Verdict::Passed,
    }
}

impl Cell {
    /// The verdict on all its runs: the worst of them.
    pub fn verdict(&self) -> Verdict {
        let verdicts: Vec<Verdict> = self
            .runs
            .iter()
            .map(|run| verdict(self.expect, run))
            .collect();
        let worst = |wanted: fn(&Verdict) -> bool| {
            self.runs
                .iter()
                .zip(&verdicts)
                .find(|(_, verdict)| wanted(verdict))
                .map(|(run, verdict)| (run.seed, verdict.clone()))
        };
        if let Some((seed, Verdict::Failed(text))) = worst(Verdict::is_failed) {
            return Verdict::Failed(format!("seed {seed}: {text}"));
        }
        if let Some((seed, verdict)) = worst(|verdict| *verdict != Verdict::Passed) {
            return Verdict::Inconclusive(format!("seed {seed}: {}", verdict.detail()));
        }
        Verdict::Passed
    }

    /// The sum of a counter over all runs.
    pub fn total(&self, counter: &str) -> u64 {
        self.runs.iter().map(|run| run.counter(counter)).sum()
    }

    /// In how many runs corruption was detected.
    pub fn corrupt_runs(&self) -> usize {
        self.runs.iter().filter(|run| run.is_corrupt()).count()
    }
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Clusters of the regions.
    pub regions: Vec<u64>,
    /// The seeds.
    pub seeds: std::ops::Range<u64>,
    /// Commands of one storm.
    pub commands: usize,
    /// So many in a hundred requests are dropped, where everything must stay clean.
    pub drop_percent: u64,
    /// So often the power is cut, where everything must stay clean.
    pub power_cuts: usize,
    /// Also ask the installed qemu-img about each image.
    pub ask_qemu: bool,
}

impl Default for Matrix {
    fn default() -> Self {
        Self {
            regions: vec![8, 16, 32],
            seeds: 1..9,
            commands: 5000,
            drop_percent: 0,
            power_cuts: 0,
            ask_qemu: true,
        }
    }
}

/// Runs the matrix. `bare` has the same driver without its safeguards, if there is such a thing.
pub fn matrix(
    registry: &Registry,
    bare: Option<&Registry>,
    format: &FormatUnderTest,
    what: &Matrix,
    mut progress: impl FnMut(&Cell),
) -> Vec<Cell> {
    let mut cells = Vec::new();
    for gate in [true, false] {
        for safeguards in [true, false] {
            let Some(expect) = Expect::of(gate, safeguards) else {
                continue;
            };
            let drivers = match (safeguards, bare) {
                (true, _) => registry,
                (false, Some(bare)) => bare,
                (false, None) => continue,
            };
            for region in &what.regions {
                let runs = what
                    .seeds
                    .clone()
                    .map(|seed| {
                        let config = StormConfig {
                            gate,
                            commands: what.commands,
                            drop_percent: if gate { what.drop_percent } else { 0 },
                            power_cuts: if gate { what.power_cuts } else { 0 },
                            ask_qemu: what.ask_qemu && expect != Expect::Corrupt,
                            ..StormConfig::new(seed, *region)
                        };
                        storm(drivers, format, &config)
                    })
                    .collect();
                let cell = Cell {
                    gate,
                    safeguards,
                    region: *region,
                    expect,
                    runs,
                };
                progress(&cell);
                cells.push(cell);
            }
        }
    }
    cells
}
