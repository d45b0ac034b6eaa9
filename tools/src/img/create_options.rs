//! Create options (`-o`): which a format takes, reading them with qemu's messages, and listing them.

use std::{collections::BTreeMap, num::IntErrorKind};

use block_core::{
    DriverFactory, DriverKind, ErrorKind, Options, Registry, options::parse_size,
    registry::CreateOption,
};
use serde_json::Value;

use crate::common::{failure::Failure, output::say};

const SIZE_HINT: &str = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                         and exabytes, respectively.";

/// The names of drivers that qemu-img 10.0 lets a qcow2 image give as the format of its backing file, whether or not it can open them.
const DRIVERS: [&str; 42] = [
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "file",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "iscsi",
    "luks",
    "nbd",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "parallels",
    "preallocate",
    "qcow",
    "qcow2",
    "qed",
    "quorum",
    "raw",
    "rbd",
    "replication",
    "snapshot-access",
    "ssh",
    "throttle",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "vvfat",
];

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
    /// Values that are shown otherwise than they are used: switches as they were spelled, numbers with their sign.
    spelled: BTreeMap<String, String>,
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
            spelled: BTreeMap::new(),
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
            spelled: BTreeMap::new(),
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
            ("backing_fmt", format, "Backing file format"),
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
            parse_num(key, text)?.to_string()
        } else {
            text.to_owned()
        };
        let spelled = if option.kind.starts_with("bool") {
            Some(text.to_owned())
        } else if option.kind == "num" {
            value
                .parse::<u64>()
                .ok()
                .map(|number| number.cast_signed().to_string())
        } else {
            None
        };
        match spelled {
            Some(spelled) => self.spelled.insert(key.to_owned(), spelled),
            None => self.spelled.remove(key),
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

    /// What goes to `create`, after a look at what qemu-img refuses by its value alone.
    pub fn for_creation(&self) -> Result<Options, Failure> {
        let refused = |name: &str, value: &str| {
            Err(Failure::new(format!(
                "Parameter '{name}' does not accept value '{value}'"
            )))
        };
        if self.format == "qcow2" {
            if let Some(spelled) = self.spelled.get("encryption")
                && !matches!(spelled.as_str(), "on" | "off")
            {
                return refused("format", spelled);
            }
            if let Some(format) = self.get("backing_fmt")
                && !DRIVERS.contains(&format)
            {
                return refused("backing-fmt", format);
            }
        }
        Ok(self.values())
    }

    /// All that was given; what is only the storage's is for the storage.
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

    fn shown(&self, key: &str) -> Option<&str> {
        let spelled = self.spelled.get(key).map(String::as_str);
        spelled.or_else(|| self.get(key))
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
            if let Some(value) = self.shown(key).or(default.filter(|_| self.takes(key))) {
                show(key, value);
            }
        }
        for option in &self.known {
            if !order.iter().any(|(key, _)| *key == option.name)
                && let Some(value) = self.shown(option.name)
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

    /// Prints the options `known` of `format`, without its storage's.
    pub fn print_own(format: &str, known: &[CreateOption]) {
        print_without_storage(format, known.iter().collect());
    }

    /// Prints what `-o help` asks for when an image in `format` is to be created, in `file` if that is known already.
    pub fn print_help(
        registry: &Registry,
        format: &str,
        file: Option<&str>,
    ) -> Result<(), Failure> {
        let factory = registry
            .get(format)
            .map_err(|_| Failure::new(format!("Unknown file format '{format}'")))?;
        let cannot = |what: &str, name: &str| {
            Failure::new(format!(
                "{what} driver '{name}' does not support image creation"
            ))
        };
        if factory.create_options().is_empty() {
            return Err(cannot("Format", format));
        }
        let Some(file) = file else {
            let mut known: Vec<_> = factory.create_options().iter().collect();
            // All formats but qcow2 leave it to their storage.
            let leaves = factory.kind() == DriverKind::Format && format != "qcow2";
            known.retain(|option| !leaves || option.name != "preallocation");
            print_without_storage(format, known);
            return Ok(());
        };
        let protocol = registry.get(&protocol_of(registry, file)?)?;
        if protocol.create_options().is_empty() {
            return Err(cannot("Protocol", protocol.name()));
        }
        say!("Supported options:");
        let options = Self::new(&**factory, Some(&**protocol));
        print_list(options.known.iter().collect());
        Ok(())
    }
}

fn print_without_storage(format: &str, known: Vec<&CreateOption>) {
    say!("Supported {format} options:");
    print_list(known);
    say!(
        "\nThe protocol level may support further options.\n\
         Specify the target filename to include those options."
    );
}

/// A number as C's programs read them: decimal, octal or hexadecimal, and a negative one wraps around.
fn parse_num(key: &str, text: &str) -> Result<u64, Failure> {
    let trimmed = text.trim_start_matches(|c: char| c.is_ascii_whitespace());
    let (negative, digits) = match trimmed.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, trimmed.strip_prefix('+').unwrap_or(trimmed)),
    };
    let hex = digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"));
    let (digits, radix) = match hex {
        Some(hex) => (hex, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    // The standard library would take another sign.
    let starts_well = digits.starts_with(|c: char| c.is_digit(radix));
    match u64::from_str_radix(digits, radix) {
        Ok(number) if starts_well && negative => Ok(number.wrapping_neg()),
        Ok(number) if starts_well => Ok(number),
        Err(error) if starts_well && *error.kind() == IntErrorKind::PosOverflow => Err(
            Failure::new(format!("Value '{text}' is too large for parameter '{key}'")),
        ),
        _ => Err(Failure::new(format!("Parameter '{key}' expects a number"))),
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
