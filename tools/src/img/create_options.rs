//! Create options (`-o`): which a format takes, reading them with qemu's messages, and listing them.

use block_core::{
    DriverFactory, DriverKind, ErrorKind, Options, Registry, options::parse_size,
    registry::CreateOption,
};
use serde_json::Value;

use crate::common::{failure::Failure, output::say};

const SIZE_HINT: &str = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                         and exabytes, respectively.";

/// The order in which qemu-img lists a format's options after `Formatting`, and the defaults that it shows.
fn display_order(format: &str) -> &'static [(&'static str, Option<&'static str>)] {
    match format {
        "qcow2" => &[
            ("encryption", None),
            ("encrypt.format", None),
            ("encrypt.key-secret", None),
            ("encrypt.cipher-alg", None),
            ("encrypt.cipher-mode", None),
            ("encrypt.ivgen-alg", None),
            ("encrypt.ivgen-hash-alg", None),
            ("encrypt.hash-alg", None),
            ("encrypt.iter-time", None),
            ("cluster_size", Some("65536")),
            ("extended_l2", Some("off")),
            ("preallocation", None),
            ("compression_type", Some("zlib")),
            ("size", None),
            ("compat", None),
            ("backing_file", None),
            ("backing_fmt", None),
            ("data_file", None),
            ("data_file_raw", None),
            ("lazy_refcounts", Some("off")),
            ("refcount_bits", Some("16")),
            ("nocow", None),
        ],
        "vmdk" => &[
            ("size", None),
            ("adapter_type", None),
            ("backing_file", None),
            ("backing_fmt", None),
            ("compat6", Some("off")),
            ("hwversion", Some("undefined")),
            ("toolsversion", None),
            ("subformat", None),
            ("zeroed_grain", None),
            ("nocow", None),
        ],
        _ => &[("size", None), ("nocow", None), ("preallocation", None)],
    }
}

/// The create options of one image: those of its format and of its storage.
pub struct CreateOptions {
    format: String,
    known: Vec<CreateOption>,
    /// Options of creation, where an image is amended.
    creation_only: &'static [CreateOption],
    values: Options,
}

impl CreateOptions {
    /// For an image in `format`, stored with the driver `protocol`.
    pub fn new(format: &dyn DriverFactory, protocol: Option<&dyn DriverFactory>) -> Self {
        let protocol = protocol.filter(|_| format.kind() != DriverKind::Protocol);
        Self::of_list(format.name(), format.create_options(), protocol)
    }

    /// For an image of the format called `format`, which has the options `known`, stored with the driver `protocol`.
    pub fn of_list(
        format: &str,
        known: &[CreateOption],
        protocol: Option<&dyn DriverFactory>,
    ) -> Self {
        let mut known = known.to_vec();
        for option in protocol
            .into_iter()
            .flat_map(|protocol| protocol.create_options())
        {
            if !known.iter().any(|other| other.name == option.name) {
                known.push(*option);
            }
        }
        Self {
            format: format.to_owned(),
            known,
            creation_only: &[],
            values: Options::new(),
        }
    }

    /// The options that images in `format` can be amended with; `None` when they can't be.
    pub fn of_amend(format: &dyn DriverFactory) -> Option<Self> {
        let known = format.amend_options().to_vec();
        (!known.is_empty()).then(|| Self {
            format: format.name().to_owned(),
            known,
            creation_only: format.create_options(),
            values: Options::new(),
        })
    }

    /// For the image `filename` in the format called `format`, with what `-o` says.
    pub fn of(
        registry: &Registry,
        format: &str,
        filename: &str,
        list: Option<&str>,
    ) -> Result<Self, Failure> {
        let factory = registry
            .get(format)
            .map_err(|_| Failure::new(format!("Unknown file format '{format}'")))?;
        let protocol = registry.get(&protocol_of(registry, filename)?)?;
        let mut options = Self::new(&**factory, Some(&**protocol));
        if let Some(list) = list {
            options.read(list)?;
        }
        Ok(options)
    }

    /// Sets the backing file and its format, if they are given.
    pub fn set_backing(&mut self, file: Option<&str>, format: Option<&str>) -> Result<(), Failure> {
        for (key, value, what) in [
            ("backing_file", file, "Backing file"),
            ("backing_fmt", format, "Backing format"),
        ] {
            let Some(value) = value else { continue };
            if !self.takes(key) {
                return Err(Failure::new(format!(
                    "{what} not supported for file format '{}'",
                    self.format
                )));
            }
            self.set(key, value)?;
        }
        Ok(())
    }

    /// Reads `-o`.
    pub fn read(&mut self, list: &str) -> Result<(), Failure> {
        let given = Options::from_dotted(list)?;
        for (key, value) in flatten(given.0) {
            let text = match value {
                Value::String(text) => text,
                other => other.to_string(),
            };
            self.set(&key, &text)?;
        }
        Ok(())
    }

    /// Sets one option, checked and normalised by its kind.
    pub fn set(&mut self, key: &str, text: &str) -> Result<(), Failure> {
        let Some(option) = self.known.iter().find(|option| option.name == key) else {
            let mut message = format!("Invalid parameter '{key}'");
            if self.creation_only.iter().any(|option| option.name == key) {
                message += "\nThis option is only supported for image creation";
            }
            return Err(Failure::new(message));
        };
        let value = if option.kind.starts_with("bool") {
            match text {
                "on" | "yes" | "true" | "y" => "on".to_owned(),
                "off" | "no" | "false" | "n" => "off".to_owned(),
                _ => {
                    return Err(Failure::new(format!(
                        "Parameter '{key}' expects 'on' or 'off'"
                    )));
                }
            }
        } else if option.kind == "size" {
            parse_size(text)
                .map_err(|error| {
                    let negative = text.trim().strip_prefix('-').map(str::parse::<u64>);
                    if error.kind() == ErrorKind::TooBig || matches!(negative, Some(Ok(_))) {
                        return Failure::new(format!(
                            "Value '{text}' is out of range for parameter '{key}'"
                        ));
                    }
                    Failure::new(format!(
                        "Parameter '{key}' expects a non-negative number below 2^64\n{SIZE_HINT}"
                    ))
                })?
                .to_string()
        } else if option.kind == "num" {
            text.parse::<u64>()
                .map_err(|_| Failure::new(format!("Parameter '{key}' expects a number")))?
                .to_string()
        } else {
            text.to_owned()
        };
        self.values.set(key, value);
        Ok(())
    }

    /// Whether the format takes this option.
    pub fn takes(&self, key: &str) -> bool {
        self.known.iter().any(|option| option.name == key)
    }

    /// What was given for an option.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get_str(key)
    }

    /// A size that was given.
    pub fn get_size(&self, key: &str) -> Option<u64> {
        self.get(key).and_then(|text| text.parse().ok())
    }

    /// What goes to `create`; what is only the storage's goes there.
    pub fn values(&self) -> Options {
        self.values.clone()
    }

    /// What was given of the options in `known`.
    pub fn known_to(&self, known: &[CreateOption]) -> Options {
        let mut values = self.values.clone();
        values
            .0
            .retain(|key, _| known.iter().any(|option| option.name == key));
        values
    }

    /// The line that says what is being made.
    pub fn describe(&self, filename: &str) -> String {
        use std::fmt::Write as _;
        let mut line = format!("Formatting '{filename}', fmt={}", self.format);
        let order = display_order(&self.format);
        let mut show = |key: &str, value: &str| {
            let _ = write!(line, " {key}={}", value.replace(',', ",,"));
        };
        for (key, default) in order {
            if let Some(value) = self.get(key).or(default.filter(|_| self.takes(key))) {
                show(key, value);
            }
        }
        for option in &self.known {
            if !order.iter().any(|(key, _)| *key == option.name)
                && let Some(value) = self.get(option.name)
            {
                show(option.name, value);
            }
        }
        line
    }

    /// Prints what `-o help` asks for when an image is to be amended.
    pub fn print_amend_help(&self) {
        say!("Amend options for '{}':", self.format);
        print_list(self.known.iter().collect());
    }

    /// Prints what `-o help` asks for.
    pub fn print_help(&self, with_storage: bool) {
        if with_storage {
            say!("Supported options:");
        } else {
            say!("Supported {} options:", self.format);
        }
        let known: Vec<&CreateOption> = self.known.iter().collect();
        print_list(known);
        if !with_storage {
            say!(
                "\nThe protocol level may support further options.\n\
                 Specify the target filename to include those options."
            );
        }
    }
}

/// One line for each option, by name.
fn print_list(mut known: Vec<&CreateOption>) {
    known.sort_by_key(|option| option.name);
    for option in known {
        say!(
            "  {:22} - {}",
            format!("{}=<{}>", option.name, option.kind),
            option.help
        );
    }
}

/// Nested options as dotted keys again: `-o` has none that nest.
fn flatten(map: serde_json::Map<String, Value>) -> Vec<(String, Value)> {
    let mut flat = Vec::new();
    for (key, value) in map {
        match value {
            Value::Object(inner) => {
                for (rest, value) in flatten(inner) {
                    flat.push((format!("{key}.{rest}"), value));
                }
            }
            other => flat.push((key, other)),
        }
    }
    flat
}

/// The driver that stores `filename`.
pub fn protocol_of(registry: &Registry, filename: &str) -> Result<String, Failure> {
    let options = registry.filename_options(filename)?;
    Ok(options.get_str("driver").unwrap_or("file").to_owned())
}
