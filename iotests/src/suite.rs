//! Which cases there are, and which drivers they are run on. It runs nothing and prints nothing.

use std::process::ExitCode;

use block_core::{DriverKind, Options, Registry, registry::CreateOption};

use crate::{
    basic,
    case::{Case, FormatUnderTest, Group},
    cases::{self, shared, with_jobs},
    chain_cases, cli, cluster_cases, concurrent_cases, crash, duties, fault_cases, graph_cases,
    hostile_cases, interop_cases, job_cases, life_cases, memdriver, parts, path_cases,
};

/// Every case there is: the races once more under the name of their cancellation.
pub fn all_cases() -> Vec<Case> {
    let mut all = basic::all();
    all.extend(duties::all());
    all.extend(path_cases::all());
    all.extend(chain_cases::all());
    all.extend(cluster_cases::all());
    all.extend(life_cases::all());
    all.extend(graph_cases::all());
    all.extend(job_cases::all());
    all.extend(fault_cases::all());
    all.extend(concurrent_cases::all());
    all.extend(hostile_cases::all());
    all.extend(interop_cases::all());
    all.extend(crash::cases());
    let mut races = cases::all();
    races.extend(with_jobs::cases());
    races.extend(shared::cases());
    let cancels: Vec<Case> = races.iter().cloned().map(cancelled).collect();
    all.extend(races);
    all.extend(cancels);
    all
}

/// The same case as its cancellation: with each request dropped at each of its await points.
fn cancelled(mut case: Case) -> Case {
    case.group = Group::Cancel;
    case.quick = false;
    case.proves = format!("whichever request is dropped wherever: {}", case.proves);
    case.name = case.name.replacen("race-", "cancel-", 1);
    case
}

/// The drivers that a program tests.
pub struct Suite {
    registry: Registry,
    bare: Option<Registry>,
    safeguards: Vec<String>,
    called: String,
    cases: Vec<Case>,
}

impl Suite {
    /// The drivers of `registry`. The crate's own third-party driver is there as well, by its name.
    pub fn new(registry: &Registry) -> Self {
        Self {
            registry: registry.clone().with(memdriver::ThirdPartyFactory),
            bare: None,
            safeguards: Vec::new(),
            called: std::env::args().next().unwrap_or_default(),
            cases: all_cases(),
        }
    }

    /// The same drivers without their own safeguards, for the half of the race matrix that must corrupt.
    #[must_use]
    pub fn with_bare(mut self, bare: &Registry) -> Self {
        self.bare = Some(bare.clone().with(memdriver::ThirdPartyFactory));
        self
    }

    /// The formats whose drivers claim to keep other ranges whole also when there is no gate.
    #[must_use]
    pub fn with_safeguards(mut self, formats: &[&str]) -> Self {
        self.safeguards = formats.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    /// How a person starts this program: commands that reproduce a failure begin with it.
    #[must_use]
    pub fn called(mut self, command: &str) -> Self {
        command.clone_into(&mut self.called);
        self
    }

    /// Cases of the driver's own, beside the suite's.
    #[must_use]
    pub fn with_cases(mut self, cases: Vec<Case>) -> Self {
        self.cases.extend(cases);
        self
    }

    /// Runs the program on the process's arguments, and gives its exit status.
    pub fn main(&self) -> ExitCode {
        cli::main(self)
    }

    /// The drivers.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The drivers without their safeguards, if there is such a thing.
    pub fn bare(&self) -> Option<&Registry> {
        self.bare.as_ref()
    }

    /// All cases.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// How this program is started.
    pub fn command(&self) -> &str {
        &self.called
    }

    /// The names of all formats that can be tested; the crate's own only where there is no other.
    pub fn format_names(&self) -> Vec<&'static str> {
        let mut names: Vec<&'static str> = self
            .registry
            .factories()
            .iter()
            .filter(|factory| factory.kind() == DriverKind::Format)
            .map(|factory| factory.name())
            .collect();
        if names.len() > 1 {
            names.retain(|name| *name != memdriver::NAME);
        }
        names
    }

    /// One format with options of creation as `-o` has them.
    ///
    /// # Errors
    /// An unknown format or option.
    pub fn format(&self, name: &str, options: &str) -> Result<FormatUnderTest, String> {
        let factory = self
            .registry
            .get(name)
            .ok()
            .filter(|factory| factory.kind() == DriverKind::Format)
            .ok_or_else(|| {
                let known = self.format_names().join(", ");
                format!(
                    "Unknown format '{name}' (known: {known}, {})",
                    memdriver::NAME
                )
            })?;
        let mut format = FormatUnderTest::new(name);
        if !options.is_empty() {
            format.create = Options::from_dotted(options).map_err(|error| error.to_string())?;
        }
        let known = factory.create_options();
        for pair in parts::text(&format.create).split(',') {
            let key = pair.split('=').next().unwrap_or(pair);
            let named = |option: &CreateOption| {
                let top = key.split('.').next().unwrap_or(key);
                option.name == key || option.name == top
            };
            if !key.is_empty() && !known.iter().any(named) {
                let names: Vec<&str> = known.iter().map(|option| option.name).collect();
                return Err(format!(
                    "Format '{name}' has no create option '{key}' (known: {})",
                    names.join(", ")
                ));
            }
        }
        if format
            .create
            .get("encrypt.key-secret")
            .or_else(|| format.create.get("encrypt")?.get("key-secret"))
            .is_some()
        {
            return Err(
                "the key of encrypted images is the suite's: leave encrypt.key-secret out".into(),
            );
        }
        format.crash_safe = name != memdriver::NAME;
        format.safeguards = self.safeguards.iter().any(|known| known == name);
        Ok(format)
    }
}
