//! Options of nodes and images, as JSON and as dotted keys, and the loose values (`on`, `64k`) that both allow.
//!
//! A driver describes its options as a `serde` structure with `deny_unknown_fields`; [`Options::parse`] fills it and
//! names the key that is wrong. Nothing here opens anything.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A tree of options: what stands in `{"driver": "qcow2", "file": {…}}`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options(pub Map<String, Value>);

impl Options {
    /// No options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads a JSON object.
    pub fn from_json(text: &str) -> Result<Self> {
        match serde_json::from_str::<Value>(text) {
            Ok(Value::Object(map)) => Ok(Self(expand(map)?)),
            Ok(_) => Err(Error::invalid("Invalid JSON options: must be an object")),
            Err(error) => Err(Error::invalid(format!(
                "Could not parse the JSON options: {error}"
            ))),
        }
    }

    /// Reads `driver=qcow2,file.filename=a.qcow2`; `,,` stands for a comma in a value; `x.0=…,x.1=…` make a list.
    pub fn from_dotted(text: &str) -> Result<Self> {
        let mut map = Map::new();
        for pair in split_commas(text) {
            if pair.is_empty() {
                continue;
            }
            match pair.split_once('=') {
                Some(("", _)) => {
                    return Err(Error::invalid(format!("Invalid parameter '{pair}'")));
                }
                Some((key, value)) => {
                    map.insert(key.to_owned(), Value::String(value.to_owned()));
                }
                None => {
                    let (key, on) = match pair.strip_prefix("no") {
                        Some(rest) if !rest.is_empty() => (rest, "off"),
                        _ => (pair.as_str(), "on"),
                    };
                    map.insert(key.to_owned(), Value::String(on.to_owned()));
                }
            }
        }
        Ok(Self(expand(map)?))
    }

    /// JSON when it starts with `{`, dotted keys otherwise.
    pub fn from_text(text: &str) -> Result<Self> {
        if text.trim_start().starts_with('{') {
            Self::from_json(text)
        } else {
            Self::from_dotted(text)
        }
    }

    /// Sets a value.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.insert(key.to_owned(), value.into());
        self
    }

    /// Sets a value.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// Sets a value unless there is one.
    pub fn set_default(&mut self, key: &str, value: impl Into<Value>) {
        if !self.0.contains_key(key) {
            self.0.insert(key.to_owned(), value.into());
        }
    }

    /// A value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// A string value.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(Value::as_str)
    }

    /// Takes a value out.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.0.shift_remove(key)
    }

    /// Takes a string out.
    pub fn take_str(&mut self, key: &str) -> Result<Option<String>> {
        match self.take(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(Error::invalid(format!(
                "Invalid parameter type for '{key}', expected: string, found: {other}"
            ))),
        }
    }

    /// Takes a switch out.
    pub fn take_switch(&mut self, key: &str) -> Result<Option<bool>> {
        match self.take(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => Ok(Some(parse_switch(key, &value)?)),
        }
    }

    /// Takes the options that belong to a child out: an object, or a node name as a string. An empty one says that there is no
    /// backing file.
    pub fn take_child(&mut self, key: &str) -> Result<Option<ChildOptions>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(ChildOptions::None)),
            Some(Value::String(name)) if name.is_empty() && key == "backing" => {
                Ok(Some(ChildOptions::None))
            }
            Some(Value::String(name)) => Ok(Some(ChildOptions::Node(name))),
            Some(Value::Object(map)) => Ok(Some(ChildOptions::Inline(Self(map)))),
            Some(_) => Err(Error::invalid(format!(
                "Invalid parameter type for '{key}', expected: a node name or an object"
            ))),
        }
    }

    /// Fills the driver's structure from what is left.
    ///
    /// # Errors
    /// EINVAL, for the first option that is wrong: its name, its value and what is allowed are the error's
    /// [field](Error::field). The words are qemu's.
    pub fn parse<T: de::DeserializeOwned>(self) -> Result<T> {
        let text = |map: &Map<String, Value>| {
            serde_json::from_value::<T>(Value::Object(map.clone()))
                .err()
                .map(|error| error.to_string())
        };
        match text(&self.0) {
            None => serde_json::from_value(Value::Object(self.0))
                .map_err(|error| Error::invalid(format!("Invalid options: {error}"))),
            Some(said) => Err(explain(&said, culprit(&self.0, &said, &text))),
        }
    }

    /// As JSON text.
    pub fn to_json(&self) -> String {
        Value::Object(self.0.clone()).to_string()
    }
}

/// The option that `said` is about, as a dotted key, and its value. `serde` doesn't tell; but it looks at options in their
/// order and stops at the first one that is wrong, so that is the last one of the shortest beginning of `map` about which
/// it says the same.
fn culprit(
    map: &Map<String, Value>,
    said: &str,
    text: &dyn Fn(&Map<String, Value>) -> Option<String>,
) -> Option<(String, Value)> {
    let is_said = |map: &Map<String, Value>| text(map).is_some_and(|text| text == said);
    let mut beginning = Map::new();
    if is_said(&beginning) {
        return None;
    }
    for (key, value) in map {
        let before = beginning.clone();
        beginning.insert(key.clone(), value.clone());
        if !is_said(&beginning) {
            continue;
        }
        let inner = value.as_object().and_then(|inner| {
            culprit(inner, said, &|part| {
                let mut all = before.clone();
                all.insert(key.clone(), Value::Object(part.clone()));
                text(&all)
            })
        });
        return Some(match inner {
            Some((rest, value)) => (format!("{key}.{rest}"), value),
            None => (key.clone(), value.clone()),
        });
    }
    None
}

/// `serde`'s words about an option in qemu's.
fn explain(said: &str, culprit: Option<(String, Value)>) -> Error {
    if let Some((key, _)) = quoted(said, "missing field `") {
        return Error::invalid(format!("Parameter '{key}' is missing"));
    }
    let Some((key, value)) = culprit else {
        return Error::invalid(format!("Invalid options: {said}"));
    };
    let shown = shown(&value);
    if quoted(said, "unknown field `").is_some() {
        return Error::invalid(format!("Invalid parameter '{key}'"));
    }
    if let Some((bad, expected)) = quoted(said, "unknown variant `") {
        // ", expected one of `off`, `full`", or a single one.
        let mut allowed: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
        allowed.dedup();
        return Error::invalid(format!("invalid parameter value: {bad}")).with_field(
            &key,
            bad,
            allowed.join(", "),
        );
    }
    if let Some(allowed) = said.strip_prefix(EXPECTS) {
        return Error::invalid(format!("Parameter '{key}' {said}"))
            .with_field(&key, shown, allowed);
    }
    if let Some((_, allowed)) = said.split_once(", expected ") {
        return Error::invalid(format!(
            "Invalid parameter type for '{key}', expected: {allowed}"
        ))
        .with_field(&key, shown, allowed);
    }
    Error::invalid(format!("Parameter '{key}': {said}"))
}

/// A value as the user wrote it.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// What stands between `start` and the next backquote, and the rest.
fn quoted<'a>(text: &'a str, start: &str) -> Option<(&'a str, &'a str)> {
    text.strip_prefix(start)?.split_once('`')
}

/// What the loose values of this file say when they can't be read begins so: the option's name goes before it.
const EXPECTS: &str = "expects ";

/// What stands for a child in options.
#[derive(Debug, Clone, PartialEq)]
pub enum ChildOptions {
    /// `null`: no such child.
    None,
    /// The name of a node that exists.
    Node(String),
    /// A node to be opened for this parent.
    Inline(Options),
}

/// Splits at single commas; a doubled comma stands for itself.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' {
            if chars.peek() == Some(&',') {
                chars.next();
                parts.last_mut().expect("never empty").push(',');
            } else {
                parts.push(String::new());
            }
        } else {
            parts.last_mut().expect("never empty").push(c);
        }
    }
    parts
}

/// The option that may be given as a value and as an object at once; the value is put into the object under an empty name.
const MIXED: &str = "overlap-check";

/// Turns dotted keys into nested objects, and objects with the keys 0..n into lists.
fn expand(flat: Map<String, Value>) -> Result<Map<String, Value>> {
    let mut root = Map::new();
    for (key, value) in flat {
        let value = match value {
            Value::Object(map) => Value::Object(expand(map)?),
            other => other,
        };
        if !key.contains('.') {
            insert_merged(&mut root, &key, value)?;
            continue;
        }
        let mut parts: Vec<&str> = key.split('.').collect();
        let Some(last) = parts.pop() else { continue };
        if last.is_empty() || parts.iter().any(|part| part.is_empty()) {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
        if parts.len() > 32 {
            return Err(Error::invalid(format!(
                "Parameter '{key}' is nested too deeply"
            )));
        }
        let mut at = &mut root;
        for part in parts {
            let slot = at
                .entry(part.to_owned())
                .or_insert_with(|| Value::Object(Map::new()));
            if part == MIXED && !slot.is_object() {
                let plain = std::mem::take(slot);
                *slot = Value::Object(Map::from_iter([(String::new(), plain)]));
            }
            at = match slot {
                Value::Object(map) => map,
                _ => {
                    return Err(Error::invalid(format!(
                        "Cannot mix '{part}' as a value with '{key}'"
                    )));
                }
            };
        }
        insert_merged(at, last, value)?;
    }
    Ok(root
        .into_iter()
        .map(|(key, value)| (key, listify(value)))
        .collect())
}

fn insert_merged(map: &mut Map<String, Value>, key: &str, value: Value) -> Result<()> {
    match (map.get_mut(key), value) {
        (None, value) => {
            map.insert(key.to_owned(), value);
            Ok(())
        }
        (Some(Value::Object(old)), Value::Object(new)) => {
            for (k, v) in new {
                insert_merged(old, &k, v)?;
            }
            Ok(())
        }
        (Some(Value::Object(map)), value) if key == MIXED && !value.is_object() => {
            map.insert(String::new(), value);
            Ok(())
        }
        (Some(slot @ (Value::String(_) | Value::Bool(_) | Value::Number(_))), value)
            if !value.is_object() =>
        {
            *slot = value;
            Ok(())
        }
        _ => Err(Error::invalid(format!(
            "Cannot mix scalar and non-scalar keys at '{key}'"
        ))),
    }
}

fn listify(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let map: Map<String, Value> = map
                .into_iter()
                .map(|(key, value)| (key, listify(value)))
                .collect();
            let is_list =
                !map.is_empty() && (0..map.len()).all(|index| map.contains_key(&index.to_string()));
            if is_list {
                let mut map = map;
                let list = (0..map.len())
                    .filter_map(|index| map.shift_remove(&index.to_string()))
                    .collect();
                Value::Array(list)
            } else {
                Value::Object(map)
            }
        }
        other => other,
    }
}

fn parse_switch(key: &str, value: &Value) -> Result<bool> {
    match value {
        Value::Bool(on) => Ok(*on),
        Value::String(text) => match text.as_str() {
            "on" | "yes" | "true" | "y" => Ok(true),
            "off" | "no" | "false" | "n" => Ok(false),
            _ => Err(Error::invalid(format!(
                "Parameter '{key}' expects 'on' or 'off'"
            ))),
        },
        _ => Err(Error::invalid(format!(
            "Parameter '{key}' expects 'on' or 'off'"
        ))),
    }
}

/// A boolean that also reads `on`, `off`, `yes`, `no`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize)]
#[serde(transparent)]
pub struct Switch(pub bool);

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        parse_switch("", &value)
            .map(Self)
            .map_err(|_| de::Error::custom(format!("{EXPECTS}'on' or 'off'")))
    }
}

/// A number of bytes that also reads `64k`, `1.5G`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize)]
#[serde(transparent)]
pub struct Size(pub u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let bytes = match Value::deserialize(deserializer)? {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => parse_size(&text).ok(),
            _ => None,
        };
        bytes
            .map(Self)
            .ok_or_else(|| de::Error::custom(format!("{EXPECTS}a non-negative number below 2^64")))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An integer that also reads a string of digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize)]
#[serde(transparent)]
pub struct Number(pub u64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let number = match Value::deserialize(deserializer)? {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        number
            .map(Self)
            .ok_or_else(|| de::Error::custom(format!("{EXPECTS}a number")))
    }
}

/// Reads a size with a suffix (`b k M G T P E`, powers of 1024, any case) and an optional decimal fraction, or a
/// hexadecimal number without a suffix.
pub fn parse_size(text: &str) -> Result<u64> {
    let bad = || {
        Error::invalid(format!(
            "Invalid size '{text}': expected a number of bytes with an optional suffix k, M, G, T, P or E"
        ))
    };
    let too_big = || {
        Error::new(
            crate::ErrorKind::TooBig,
            format!("Size '{text}' is too large"),
        )
    };
    let trimmed = text.trim();
    if let Some(hex) = trimmed
        .strip_prefix("0x")
        .or_else(|| trimmed.strip_prefix("0X"))
    {
        return u64::from_str_radix(hex, 16).map_err(|_| bad());
    }
    let digits = trimmed
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(trimmed.len());
    let (whole, rest) = trimmed.split_at(digits);
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => {
            let end = rest
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(rest.len());
            rest.split_at(end)
        }
        None => ("", rest),
    };
    if whole.is_empty() {
        return Err(bad());
    }
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(bad()),
    };
    let whole: u64 = whole.parse().map_err(|_| too_big())?;
    let mut bytes = whole.checked_mul(1 << shift).ok_or_else(too_big)?;
    if fraction.chars().any(|c| c != '0') {
        if shift == 0 {
            return Err(bad());
        }
        let numerator: f64 = format!("0.{fraction}").parse().map_err(|_| bad())?;
        let extra = (numerator * (1u64 << shift) as f64).round() as u64;
        bytes = bytes.checked_add(extra).ok_or_else(too_big)?;
    }
    Ok(bytes)
}

/// How a node treats discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiscardMode {
    /// Discards succeed and do nothing; MAY_UNMAP is dropped.
    #[serde(alias = "off")]
    Ignore,
    /// Discards reach the driver.
    #[default]
    #[serde(alias = "on")]
    Unmap,
}

/// What happens to writes of nothing but zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// They become zero writes.
    On,
    /// They become zero writes that may unmap.
    Unmap,
}

impl DiscardMode {
    pub(crate) fn parse(value: Value) -> Result<Self> {
        serde_json::from_value(value.clone()).map_err(|_| {
            Error::invalid("Invalid discard option").with_field(
                "discard",
                shown(&value),
                "ignore, unmap",
            )
        })
    }
}

impl DetectZeroes {
    pub(crate) fn parse(value: Value) -> Result<Self> {
        serde_json::from_value(value.clone()).map_err(|_| {
            let value = shown(&value);
            Error::invalid(format!("invalid parameter value: {value}")).with_field(
                "detect-zeroes",
                value,
                "off, on, unmap",
            )
        })
    }

    /// Whether a node may have both.
    pub(crate) fn check_with(self, discard: DiscardMode) -> Result<()> {
        if self == Self::Unmap && discard == DiscardMode::Ignore {
            return Err(Error::invalid(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ));
        }
        Ok(())
    }
}

/// `cache.direct`, `cache.no-flush`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct CacheOptions {
    /// O_DIRECT on the storage.
    pub direct: Switch,
    /// Flushes don't reach the disk.
    pub no_flush: Switch,
}

/// The options that every node has (digest of conventions, section 6).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeOptions {
    /// The node's name; made up when absent.
    pub node_name: Option<String>,
    /// How it treats discards.
    pub discard: DiscardMode,
    /// What happens to zeroes in writes.
    pub detect_zeroes: DetectZeroes,
    /// Cache mode; children inherit it.
    pub cache: CacheOptions,
    /// Open read-only; backing files always are.
    pub read_only: bool,
    /// Fall back to read-only when the storage can't be written.
    pub auto_read_only: bool,
    /// Share the image with writers; read-only nodes only.
    pub force_share: bool,
}

impl NodeOptions {
    /// Takes the common keys out of `options`, with `inherited` as defaults for those that children inherit.
    pub fn take(options: &mut Options, inherited: &Self) -> Result<Self> {
        let node_name = options.take_str("node-name")?;
        if let Some(name) = &node_name {
            check_name("node-name", name, 31)?;
        }
        let discard = match options.take("discard") {
            None => DiscardMode::Unmap,
            Some(value) => DiscardMode::parse(value)?,
        };
        let detect_zeroes = match options.take("detect-zeroes") {
            None => DetectZeroes::Off,
            Some(value) => DetectZeroes::parse(value)?,
        };
        let mut cache = inherited.cache;
        match options.take("cache") {
            None => {}
            Some(Value::Object(mut map)) => {
                if let Some(value) = map.shift_remove("direct") {
                    cache.direct = Switch(parse_switch("cache.direct", &value)?);
                }
                if let Some(value) = map.shift_remove("no-flush") {
                    cache.no_flush = Switch(parse_switch("cache.no-flush", &value)?);
                }
                if let Some(key) = map.keys().next() {
                    return Err(Error::invalid(format!("Invalid parameter 'cache.{key}'")));
                }
            }
            Some(_) => return Err(Error::invalid("Invalid parameter type for 'cache'")),
        }
        let read_only = options
            .take_switch("read-only")?
            .unwrap_or(inherited.read_only);
        let auto_read_only = options
            .take_switch("auto-read-only")?
            .unwrap_or(inherited.auto_read_only);
        let force_share = options
            .take_switch("force-share")?
            .unwrap_or(inherited.force_share);
        if force_share && !read_only {
            return Err(Error::invalid(
                "force-share=on can only be used with read-only images",
            ));
        }
        detect_zeroes.check_with(discard)?;
        Ok(Self {
            node_name,
            discard,
            detect_zeroes,
            cache,
            read_only,
            auto_read_only,
            force_share,
        })
    }

    /// What a child gets unless its own options say otherwise.
    #[must_use]
    pub fn for_child(&self) -> Self {
        Self {
            node_name: None,
            discard: DiscardMode::Unmap,
            detect_zeroes: DetectZeroes::Off,
            ..self.clone()
        }
    }
}

/// A letter, then letters, digits, `-`, `.`, `_`; at most `max` bytes.
pub fn check_name(what: &str, name: &str, max: usize) -> Result<()> {
    let mut chars = name.chars();
    let starts_well = chars.next().is_some_and(|c| c.is_ascii_alphabetic());
    if !starts_well
        || name.len() > max
        || !chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
    {
        return Err(
            Error::invalid(format!("Invalid {what}: '{name}'")).with_field(
                what,
                name,
                format!("a letter, then letters, digits, '-', '.', '_', at most {max} bytes"),
            ),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dotted_keys_and_json_give_the_same_options() {
        let dotted = Options::from_dotted(
            "driver=qcow2,file.driver=file,file.filename=a,,b.qcow2,file.locking=off",
        )
        .unwrap();
        let json = Options::from_json(
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"a,b.qcow2","locking":"off"}}"#,
        )
        .unwrap();
        assert_eq!(dotted, json);
    }

    #[test]
    fn numbered_keys_make_lists() {
        let options = Options::from_dotted("x.0=a,x.1=b").unwrap();
        assert_eq!(options.get("x"), Some(&serde_json::json!(["a", "b"])));
    }

    #[test]
    fn a_key_cant_be_value_and_tree() {
        assert!(Options::from_dotted("file=a,file.driver=file").is_err());
        assert!(Options::from_dotted("a..b=1").is_err());
        assert!(Options::from_dotted("=1").is_err());
    }

    #[test]
    fn sizes_have_suffixes_and_fractions() {
        assert_eq!(parse_size("64k").unwrap(), 65536);
        assert_eq!(parse_size("1.5G").unwrap(), 3 << 29);
        assert_eq!(parse_size("0x10").unwrap(), 16);
        assert_eq!(parse_size("512").unwrap(), 512);
        for bad in ["", "k", "1.5", "12q", "-1", "1 k"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(
            parse_size("16E").unwrap_err().kind(),
            crate::ErrorKind::TooBig
        );
    }

    #[test]
    fn unknown_keys_are_named() {
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Some {
            #[allow(dead_code)]
            a: Option<Size>,
        }
        let error = Options::from_dotted("a=1k,bogus=2")
            .unwrap()
            .parse::<Some>()
            .unwrap_err();
        assert_eq!(error.reason(), "Invalid parameter 'bogus'");
    }

    #[test]
    fn a_value_that_isnt_allowed_is_named_with_its_option_and_what_is() {
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case")]
        #[allow(dead_code)]
        struct Tree {
            first: Option<DiscardMode>,
            zeroes: Option<DetectZeroes>,
            size: Option<Size>,
            inner: Option<Inner>,
            count: Option<Number>,
        }
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case")]
        #[allow(dead_code)]
        struct Inner {
            fast: Switch,
            name: String,
        }
        let error = |text: &str| {
            let options = Options::from_text(text).unwrap();
            options.parse::<Tree>().unwrap_err()
        };
        for (text, reason, field) in [
            (
                "first=unmap,size=1k,zeroes=bogus",
                "invalid parameter value: bogus",
                Some(("zeroes", "bogus", "off, on, unmap")),
            ),
            (
                // The same bad value twice: the first one is named.
                "zeroes=bogus,first=bogus",
                "invalid parameter value: bogus",
                Some(("zeroes", "bogus", "off, on, unmap")),
            ),
            (
                "count=1,size=big",
                "Parameter 'size' expects a non-negative number below 2^64",
                Some(("size", "big", "a non-negative number below 2^64")),
            ),
            (
                "size=1,count=1k",
                "Parameter 'count' expects a number",
                Some(("count", "1k", "a number")),
            ),
            (
                "inner.name=x,inner.fast=maybe",
                "Parameter 'inner.fast' expects 'on' or 'off'",
                Some(("inner.fast", "maybe", "'on' or 'off'")),
            ),
            (
                r#"{"inner": {"fast": true, "name": 5}}"#,
                "Invalid parameter type for 'inner.name', expected: a string",
                Some(("inner.name", "5", "a string")),
            ),
            (
                "inner.fast=on,inner.name=x,inner.bogus=1",
                "Invalid parameter 'inner.bogus'",
                None,
            ),
            ("inner.fast=on", "Parameter 'name' is missing", None),
        ] {
            let error = error(text);
            assert_eq!(error.reason(), reason, "{text}");
            let found = error
                .field()
                .map(|field| (&*field.name, &*field.value, &*field.allowed));
            assert_eq!(found, field, "{text}");
        }
    }

    #[test]
    fn common_options_are_inherited_by_children() {
        let mut options =
            Options::from_dotted("node-name=n0,cache.direct=on,read-only=on,rest=1").unwrap();
        let node = NodeOptions::take(&mut options, &NodeOptions::default()).unwrap();
        assert_eq!(node.node_name.as_deref(), Some("n0"));
        let child = node.for_child();
        assert!(child.cache.direct.0 && child.read_only && child.node_name.is_none());
        assert_eq!(options.0.len(), 1);
    }
}
