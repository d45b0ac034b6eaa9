//! One test per case in the crate of a driver: what [`conformance!`](crate::conformance!) expands to.
//!
//! The tests are run by libtest-mimic, which has the command line of Rust's own test harness (`cargo test NAME`,
//! `-- --list`, `--exact`, `--skip`, `--test-threads`), because Rust's own can't say "ignored" of a test that is running: a
//! case that a driver doesn't cover would have to be called "ok" there. Here it is called "ignored", with the reason.

use std::{collections::BTreeMap, ops::Range, process::ExitCode, sync::Arc};

use block_core::{Options, Registry, registry::DriverFactory};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use parking_lot::Mutex;

use crate::{
    case::{Case, FormatUnderTest, Verdict},
    runner::run_case,
    say::say,
    suite::all_cases,
};

/// One `#[test]`-like test for each case of the suite, on the driver that is given: a [`DriverFactory`], or a
/// [`Subject`] where there is more to say.
///
/// The whole of `tests/conformance.rs`:
///
/// ```
/// # use iotests::memdriver::ThirdPartyFactory as MyDriver;
/// iotests::conformance!(MyDriver);
/// ```
///
/// and in `Cargo.toml`:
///
/// ```toml
/// [dev-dependencies]
/// iotests = { version = "0.1", default-features = false }
///
/// [[test]]
/// name = "conformance"
/// harness = false
/// ```
///
/// Without `harness = false` there is one test, which fails and says so. What the driver doesn't declare
/// is reported as "ignored, not covered: …" and counted at the end. `IOTESTS_SEED=17` (or `0..100`) chooses the
/// schedules; each failure prints the command that runs it again.
///
/// With options of image creation, safeguards that the driver claims, and cases of its own:
///
/// ```
/// # use iotests::{Subject, memdriver::ThirdPartyFactory as MyDriver};
/// # fn my_cases() -> Vec<iotests::case::Case> { Vec::new() }
/// iotests::conformance!(
///     Subject::new(MyDriver)
///         .created_with("cluster_size=4k")
///         .created_with("cluster_size=64k")
///         .with_cases(my_cases())
/// );
/// ```
#[macro_export]
macro_rules! conformance {
    ($subject:expr) => {
        fn main() -> ::std::process::ExitCode {
            $crate::conformance::main($crate::Subject::from($subject))
        }

        // Exists only when the target is compiled with Rust's own harness, which never calls `main`.
        #[cfg(test)]
        #[test]
        fn this_test_target_needs_harness_false_in_cargo_toml() {
            panic!("{}", $crate::conformance::NEEDS_HARNESS_FALSE);
        }
    };
}

/// What a forgotten `harness = false` is answered with.
pub const NEEDS_HARNESS_FALSE: &str = "iotests::conformance! brings a test harness of its own, so that a case can be \
    reported as not covered. Add to Cargo.toml:\n\n    [[test]]\n    name = \"conformance\"\n    harness = false\n";

/// A driver whose conformance is to be tested, and how its images are made.
pub struct Subject {
    registry: Registry,
    name: String,
    create: Vec<String>,
    safeguards: bool,
    crash_safe: bool,
    cases: Vec<Case>,
    seeds: Range<u64>,
}

impl<F: DriverFactory> From<F> for Subject {
    fn from(factory: F) -> Self {
        Self::new(factory)
    }
}

impl Subject {
    /// A driver of image files.
    pub fn new(factory: impl DriverFactory) -> Self {
        Self {
            name: factory.name().to_owned(),
            registry: Registry::new().with(factory),
            create: Vec::new(),
            safeguards: false,
            crash_safe: true,
            cases: Vec::new(),
            seeds: 0..4,
        }
    }

    /// Every case also on images that are created with these options (`key=value,…`). Without any, the cases run on
    /// images with the driver's defaults.
    #[must_use]
    pub fn created_with(mut self, options: &str) -> Self {
        self.create.push(options.to_owned());
        self
    }

    /// Another driver that images of this one are opened on, or named by.
    #[must_use]
    pub fn with_driver(mut self, factory: impl DriverFactory) -> Self {
        self.registry = self.registry.with(factory);
        self
    }

    /// The driver claims to keep other ranges whole also when there is no gate, and is to be held to that.
    #[must_use]
    pub fn with_safeguards(mut self) -> Self {
        self.safeguards = true;
        self
    }

    /// The driver doesn't claim that its images survive a power cut: cases about that aren't covered.
    #[must_use]
    pub fn without_crash_safety(mut self) -> Self {
        self.crash_safe = false;
        self
    }

    /// Cases of the driver's own, beside the suite's.
    #[must_use]
    pub fn with_cases(mut self, cases: Vec<Case>) -> Self {
        self.cases.extend(cases);
        self
    }

    /// The schedules that each case is run under, where the environment doesn't say otherwise (default 0..4).
    #[must_use]
    pub fn with_seeds(mut self, seeds: Range<u64>) -> Self {
        self.seeds = seeds;
        self
    }

    fn formats(&self) -> Result<Vec<FormatUnderTest>, String> {
        let mut formats = Vec::new();
        let defaults = [String::new()];
        let variants = if self.create.is_empty() {
            defaults.as_slice()
        } else {
            self.create.as_slice()
        };
        for options in variants {
            let mut format = FormatUnderTest::new(&self.name);
            format.safeguards = self.safeguards;
            format.crash_safe = self.crash_safe;
            if !options.is_empty() {
                format.create = Options::from_dotted(options)
                    .map_err(|error| format!("options of creation '{options}': {error}"))?;
            }
            formats.push(format);
        }
        Ok(formats)
    }
}

/// What came out, for the sentence at the end.
#[derive(Default)]
struct Coverage {
    covered: usize,
    not_covered: BTreeMap<String, usize>,
}

impl Coverage {
    fn text(&self, name: &str) -> String {
        let missing: usize = self.not_covered.values().sum();
        let mut text = format!("{name}: {} tests covered", self.covered);
        if missing > 0 {
            text.push_str(&format!(", {missing} not covered:"));
            for (why, count) in &self.not_covered {
                text.push_str(&format!("\n{count:>6}  {why}"));
            }
        }
        text
    }
}

/// Runs the tests on the process's arguments.
pub fn main(subject: Subject) -> ExitCode {
    let arguments = Arguments::from_args();
    let prepared = seeds(&subject.seeds).and_then(|seeds| Ok((seeds, subject.formats()?)));
    let (seeds, formats) = match prepared {
        Ok(prepared) => prepared,
        Err(text) => {
            eprintln!("iotests: {text}");
            return ExitCode::FAILURE;
        }
    };
    let mut cases = all_cases();
    cases.extend(subject.cases);
    let cases: Vec<Arc<Case>> = cases.into_iter().map(Arc::new).collect();
    let coverage = Arc::new(Mutex::new(Coverage::default()));
    let mut trials = Vec::new();
    for format in &formats {
        for case in &cases {
            let name = if formats.len() > 1 {
                format!("{}::{}", format.label(), case.name)
            } else {
                case.name.clone()
            };
            // nextest asks for the list of ignored tests, to know what it needn't start.
            let ignored = arguments.list
                && arguments.ignored
                && matches!(
                    run_case(&subject.registry, format, case, &(0..1), false).0,
                    Verdict::NotCovered(_)
                );
            let test = Test {
                name: name.clone(),
                registry: subject.registry.clone(),
                format: format.clone(),
                case: case.clone(),
                seeds: seeds.clone(),
                coverage: coverage.clone(),
            };
            let trial = Trial::ignorable_test(name, move || test.run());
            trials.push(trial.with_ignored_flag(ignored));
        }
    }
    let listing = arguments.list;
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !listing {
        say!("{}", coverage.lock().text(&subject.name));
    }
    conclusion.exit_code()
}

struct Test {
    name: String,
    registry: Registry,
    format: FormatUnderTest,
    case: Arc<Case>,
    seeds: Range<u64>,
    coverage: Arc<Mutex<Coverage>>,
}

impl Test {
    fn run(self) -> Result<Completion, Failed> {
        let (verdict, seed, _) =
            run_case(&self.registry, &self.format, &self.case, &self.seeds, true);
        let word = match &verdict {
            Verdict::Passed => {
                self.coverage.lock().covered += 1;
                return Ok(Completion::Completed);
            }
            Verdict::NotCovered(why) => {
                let why = format!("not covered: {why}");
                let mut coverage = self.coverage.lock();
                *coverage.not_covered.entry(why.clone()).or_default() += 1;
                return Ok(Completion::ignored_with(why));
            }
            Verdict::Inconclusive(_) => "proves nothing",
            Verdict::Failed(_) => "failed",
        };
        self.coverage.lock().covered += 1;
        Err(Failed::from(format!(
            "{word}: {}\n  it was to prove: {}\n  again: IOTESTS_SEED={seed} cargo test -p {} --test conformance -- --exact \
             '{}'",
            verdict.detail(),
            self.case.proves,
            std::env::var("CARGO_PKG_NAME").unwrap_or_else(|_| "CRATE".into()),
            self.name,
        )))
    }
}

fn seeds(default: &Range<u64>) -> Result<Range<u64>, String> {
    match std::env::var("IOTESTS_SEED") {
        Ok(text) => {
            crate::cli::parse_seeds(&text).map_err(|error| format!("IOTESTS_SEED: {error}"))
        }
        Err(_) => Ok(default.clone()),
    }
}
