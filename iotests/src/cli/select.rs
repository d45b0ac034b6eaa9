//! Which cases and formats a command line asks for.

use crate::{
    case::{Case, FormatUnderTest, Group},
    suite::Suite,
};

#[derive(clap::Args)]
pub(super) struct Selection {
    /// Formats, separated by commas, or `all`
    #[arg(long, short = 'f', default_value = "all")]
    format: String,
    /// Options of image creation, as with `qemu-img -o`; given again, the cases run again with those
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Groups of cases, separated by commas: rw, status, backing, graph, jobs, race, crash, cancel, fault, hostile,
    /// interop, or quick (what runs in a few seconds), or `all`
    #[arg(long, short = 'g', default_value = "all")]
    group: String,
    /// Only cases whose name contains one of these; `=NAME` is one case
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// The same
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
}

/// A group of the command line.
enum Wanted {
    All,
    Quick,
    Group(Group),
}

impl Wanted {
    fn parse(name: &str) -> Result<Self, String> {
        match name {
            "all" => return Ok(Self::All),
            "quick" => return Ok(Self::Quick),
            _ => {}
        }
        let group = Group::ALL.into_iter().find(|group| group.name() == name);
        group.map(Self::Group).ok_or_else(|| {
            let known: Vec<&str> = Group::ALL.iter().map(|group| group.name()).collect();
            format!(
                "Unknown group '{name}' (known: all, quick, {})",
                known.join(", ")
            )
        })
    }

    fn has(&self, case: &Case) -> bool {
        match self {
            Self::All => true,
            Self::Quick => case.quick,
            Self::Group(group) => case.group == *group,
        }
    }
}

impl Selection {
    /// The formats: each with each set of options.
    pub(super) fn formats(&self, suite: &Suite) -> Result<Vec<FormatUnderTest>, String> {
        let names: Vec<&str> = if self.format == "all" {
            suite.format_names()
        } else {
            self.format.split(',').collect()
        };
        if names.is_empty() {
            return Err("no format is registered".into());
        }
        let none = [String::new()];
        let options = if self.options.is_empty() {
            none.as_slice()
        } else {
            self.options.as_slice()
        };
        let mut formats = Vec::new();
        for name in names {
            for options in options {
                formats.push(suite.format(name, options)?);
            }
        }
        Ok(formats)
    }

    /// The cases.
    pub(super) fn cases(&self, suite: &Suite) -> Result<Vec<Case>, String> {
        let wanted: Vec<Wanted> = self
            .group
            .split(',')
            .map(Wanted::parse)
            .collect::<Result<_, _>>()?;
        let filters: Vec<&String> = self.filter.iter().chain(&self.filters).collect();
        let chosen = |case: &Case| {
            filters.is_empty()
                || filters.iter().any(|filter| match filter.strip_prefix('=') {
                    Some(name) => case.name == name,
                    None => case.name.contains(filter.as_str()),
                })
        };
        let cases: Vec<Case> = suite
            .cases()
            .iter()
            .filter(|case| wanted.iter().any(|group| group.has(case)) && chosen(case))
            .cloned()
            .collect();
        if cases.is_empty() {
            return Err("no case is chosen".into());
        }
        Ok(cases)
    }

    /// Whether the user said which formats.
    pub(super) fn names_formats(&self) -> bool {
        self.format != "all" || !self.options.is_empty()
    }
}

/// The arguments that choose one case on one format.
pub(super) fn arguments(format: &FormatUnderTest, case: &str) -> String {
    let mut text = format!("--format {}", format.name);
    if !format.create.0.is_empty() {
        text.push_str(&format!(" -o {}", quoted(&format.create_text())));
    }
    text.push_str(&format!(" --filter {}", quoted(&format!("={case}"))));
    text
}

/// For a shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=.,:/+".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}
