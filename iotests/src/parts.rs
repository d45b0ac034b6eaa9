//! What an image is made of beside its own file: an external data file, and the key of an encrypted one. The options of
//! creation that ask for them name no file and no key, since there are many images in a case: each gets its own data file,
//! and all have the suite's key. It makes and opens nothing itself.

use std::path::Path;

use block_core::Options;
use serde_json::{Map, Value, json};

/// The option that gives an image a data file of its own. Its value is the ending of that file's name.
pub(crate) const DATA_FILE: &str = "data_file";
/// The option that has an image encrypted.
pub(crate) const ENCRYPTION: &str = "encrypt.format";
/// The id of the secret that encrypted images are made and opened with.
pub(crate) const SECRET: &str = "iotests";
/// The secret.
pub(crate) const PASSPHRASE: &str = "simulated";
/// Milliseconds that it takes to try a key: as few as can be, an image is opened thousands of times.
const ITER_TIME: &str = "1";

/// The name of an image's data file.
pub(crate) fn data_file(image: &str, ending: &str) -> String {
    format!("{image}.{ending}")
}

/// The ending of the names of data files, if the options of creation ask for them.
pub(crate) fn ending(options: &Options) -> Option<&str> {
    options
        .get_str(DATA_FILE)
        .filter(|ending| !ending.is_empty())
}

/// The value of an option below `encrypt`, which may be an object or dotted keys.
fn below_encrypt<'a>(options: &'a Options, key: &str) -> Option<&'a Value> {
    let dotted = options.get(&format!("encrypt.{key}"));
    dotted.or_else(|| options.get("encrypt").and_then(|below| below.get(key)))
}

/// Whether the options of creation ask for an encrypted image.
pub(crate) fn is_encrypted(options: &Options) -> bool {
    let legacy = options.get_str("encryption").is_some_and(|on| on == "on");
    legacy || below_encrypt(options, "format").is_some()
}

/// The options of creation for the image `name`: with its own data file, and with the key.
pub(crate) fn of_image(options: &Options, name: &str) -> Options {
    let mut own = options.clone();
    if let Some(ending) = ending(options) {
        own.set(DATA_FILE, data_file(name, ending));
    }
    if is_encrypted(options) {
        let luks = below_encrypt(options, "format").is_some_and(|format| format == "luks");
        let mut below = match own.take("encrypt") {
            Some(Value::Object(below)) => below,
            _ => Map::new(),
        };
        for key in own.0.keys().cloned().collect::<Vec<String>>() {
            if let Some(short) = key.strip_prefix("encrypt.")
                && let Some(value) = own.take(&key)
            {
                below.insert(short.to_owned(), value);
            }
        }
        below.insert("key-secret".into(), SECRET.into());
        if luks && !below.contains_key("iter-time") {
            below.insert("iter-time".into(), ITER_TIME.into());
        }
        for (key, value) in below {
            own.set(&format!("encrypt.{key}"), value);
        }
    }
    own
}

/// Those of the options of creation that are about data files and keys.
pub(crate) fn alone(options: &Options) -> Options {
    let mut some = options.clone();
    some.0.retain(|key, _| {
        let top = key.split('.').next().unwrap_or(key);
        [DATA_FILE, "data_file_raw", "encrypt", "encryption"].contains(&top)
    });
    some
}

/// The key, as the option `encrypt` of a node has it; with the consent to compressed data that isn't encrypted.
pub(crate) fn key(consent: bool) -> Value {
    if consent {
        json!({ "key-secret": SECRET, "compressed-plaintext": "on" })
    } else {
        json!({ "key-secret": SECRET })
    }
}

/// The options of creation as `-o` has them: `cluster_size=4k,encrypt.format=luks`.
pub(crate) fn text(options: &Options) -> String {
    fn pairs(prefix: &str, key: &str, value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Object(below) => {
                for (more, value) in below {
                    pairs(&format!("{prefix}{key}."), more, value, into);
                }
            }
            Value::String(text) => into.push(format!("{prefix}{key}={text}")),
            other => into.push(format!("{prefix}{key}={other}")),
        }
    }
    let mut all = Vec::new();
    for (key, value) in &options.0 {
        pairs("", key, value, &mut all);
    }
    all.join(",")
}

/// How a program of qemu's is told which image to work on.
#[derive(Debug, Clone)]
pub(crate) struct ToolImage {
    flags: Vec<String>,
    /// The file's name, or everything as `json:{…}`.
    name: String,
}

impl ToolImage {
    /// An image that says all of itself.
    pub fn plain(format: &str, path: &Path) -> Self {
        Self {
            flags: vec!["-f".into(), format.into()],
            name: path.to_string_lossy().into_owned(),
        }
    }

    /// An image that is opened with these options of a node, and with the key.
    pub fn with_options(options: &Value) -> Self {
        Self {
            flags: secret(),
            name: format!("json:{options}"),
        }
    }

    /// The arguments for a command: its name first, then what tells the image, then the others, the image's name last.
    pub fn arguments<'a>(&'a self, command: &[&'a str]) -> Vec<&'a str> {
        let mut all = command[..command.len().min(1)].to_vec();
        all.extend(self.flags.iter().map(String::as_str));
        all.extend(command.iter().skip(1));
        all.push(&self.name);
        all
    }

    /// The same for a command that takes no format.
    pub fn without_format<'a>(&'a self, command: &[&'a str]) -> Vec<&'a str> {
        let mut all = self.arguments(command);
        if let Some(at) = all.iter().position(|argument| *argument == "-f") {
            all.drain(at..at + 2);
        }
        all
    }

    /// The same for a program that has no commands.
    pub fn options(&self) -> Vec<&str> {
        let flags = self.flags.iter().map(String::as_str);
        flags.chain([self.name.as_str()]).collect()
    }
}

/// How the key is given to a program of qemu's.
pub(crate) fn secret() -> Vec<String> {
    let secret = format!("secret,id={SECRET},data={PASSPHRASE}");
    vec!["--object".into(), secret]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_gets_its_own_data_file_and_the_key_and_the_text_is_what_was_given() {
        let given = "data_file=data,data_file_raw=on,encrypt.format=luks,cluster_size=4k";
        let options = Options::from_dotted(given).unwrap();
        let own = of_image(&options, "disk0");
        assert_eq!(own.get_str(DATA_FILE), Some("disk0.data"));
        assert_eq!(own.get_str("encrypt.key-secret"), Some(SECRET));
        assert_eq!(own.get_str("encrypt.iter-time"), Some(ITER_TIME));
        assert_eq!(own.get_str("encrypt.format"), Some("luks"));
        let mut pairs: Vec<String> = text(&options).split(',').map(str::to_owned).collect();
        pairs.sort_unstable();
        let mut expected: Vec<&str> = given.split(',').collect();
        expected.sort_unstable();
        assert_eq!(pairs, expected);
        let aes = of_image(&Options::from_dotted("encrypt.format=aes").unwrap(), "a");
        assert!(aes.get("encrypt.iter-time").is_none());
        let plain = Options::from_dotted("cluster_size=4k").unwrap();
        assert_eq!(of_image(&plain, "a"), plain);
    }
}
