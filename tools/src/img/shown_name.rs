//! The name by which `info` calls a node: a plain one where opening that gives the same node, and `json:{…}` where options say more than
//! a name can. Which options count is qemu's choice: those that decide what is read, not how.

use std::sync::Arc;

use block_core::{ChildRole, DriverKind, Node};
use serde_json::{Map, Value};

/// A node's options as a tree, and its name if it has one.
struct Shown {
    full: Value,
    name: Option<String>,
}

/// The name of a node that was opened with `options`.
pub fn shown_name(node: &Arc<Node>, options: &Map<String, Value>) -> String {
    let shown = look(node, options);
    shown
        .name
        .unwrap_or_else(|| format!("json:{}", text(&shown.full)))
}

/// The options under `key`, also when they are written `key.name`.
pub fn below(options: &Map<String, Value>, key: &str) -> Map<String, Value> {
    let mut found = match options.get(key) {
        Some(Value::Object(inner)) => inner.clone(),
        _ => Map::new(),
    };
    for (name, value) in options {
        if let Some(name) = name
            .strip_prefix(key)
            .and_then(|name| name.strip_prefix('.'))
        {
            found.insert(name.to_owned(), value.clone());
        }
    }
    found
}

fn look(node: &Arc<Node>, options: &Map<String, Value>) -> Shown {
    match node.driver().kind() {
        DriverKind::Protocol => storage(node, options),
        DriverKind::Filter => filter(node, options),
        DriverKind::Format => image(node, options),
    }
}

fn storage(node: &Arc<Node>, options: &Map<String, Value>) -> Shown {
    let driver = node.driver().name();
    let mut full = Map::new();
    if driver.starts_with("null-") {
        let given = ["read-zeroes", "driver", "size"];
        for key in given {
            match options.get(key) {
                _ if key == "driver" => full.insert(key.into(), driver.into()),
                Some(value) => full.insert(key.into(), value.clone()),
                None => None,
            };
        }
        let name = (full.len() == 1).then(|| format!("{driver}://"));
        return Shown {
            full: Value::Object(full),
            name,
        };
    }
    let plain = node.filename().unwrap_or_default();
    full.insert("driver".into(), driver.into());
    full.insert("filename".into(), plain.clone().into());
    Shown {
        full: Value::Object(full),
        name: Some(plain),
    }
}

fn filter(node: &Arc<Node>, options: &Map<String, Value>) -> Shown {
    let driver = node.driver().name();
    let edges = node.edges();
    // Children that have a file of their own stand before the driver, those that are the disk or its copy behind it.
    let mut children = Map::new();
    let mut names = Map::new();
    let mut full = Map::new();
    for edge in edges.iter() {
        let shown = look(edge.child.node(), &below(options, &edge.name));
        if let Some(name) = shown.name {
            names.insert(edge.name.clone(), name.into());
        }
        match edge.name.as_str() {
            "file" | "raw" => children.insert(edge.name.clone(), shown.full),
            _ => full.insert(edge.name.clone(), shown.full),
        };
    }
    let is_child = |key: &str| edges.iter().any(|edge| edge.name == key);
    let mut own = Map::new();
    for (key, value) in options {
        let name = key.split('.').next().unwrap_or_default();
        if !is_child(name) && !COMMON.contains(&name) {
            flatten(key, value, &mut own);
        }
    }
    let name = |key: &str| names.get(key).and_then(Value::as_str);
    let plain = match driver {
        "blkdebug" if own.keys().all(|key| key == "config") => name("image").map(|image| {
            let config = own.get("config").and_then(Value::as_str);
            format!("blkdebug:{}:{image}", config.unwrap_or_default())
        }),
        "blkverify" => match (name("raw"), name("test")) {
            (Some(raw), Some(test)) => Some(format!("blkverify:{raw}:{test}")),
            _ => None,
        },
        _ => None,
    };
    full.insert("driver".into(), driver.into());
    full.extend(own);
    full.extend(children);
    Shown {
        full: Value::Object(full),
        name: plain,
    }
}

/// Options that any node may have, which say nothing of what is read.
const COMMON: [&str; 9] = [
    "driver",
    "backing",
    "node-name",
    "discard",
    "detect-zeroes",
    "cache",
    "read-only",
    "auto-read-only",
    "force-share",
];

/// Nested options as dotted keys.
fn flatten(key: &str, value: &Value, flat: &mut Map<String, Value>) {
    let mut each = |name: &str, value: &Value| flatten(&format!("{key}.{name}"), value, flat);
    match value {
        Value::Object(inner) => inner.iter().for_each(|(name, value)| each(name, value)),
        Value::Array(list) => {
            for (index, value) in list.iter().enumerate() {
                each(&index.to_string(), value);
            }
        }
        other => {
            flat.insert(key.to_owned(), other.clone());
        }
    }
}

fn image(node: &Arc<Node>, options: &Map<String, Value>) -> Shown {
    let driver = node.driver().name();
    let edges = node.edges();
    let child = edges.child(ChildRole::File).or_else(|| edges.primary());
    let Some(child) = child.map(|child| child.node().clone()) else {
        return storage(node, options);
    };
    let below_it = look(&child, &below(options, "file"));
    // In the order in which qemu shows them.
    let mut full = Map::new();
    let given = |key: &str| options.get(key).filter(|_| driver == "raw").cloned();
    if let Some(offset) = given("offset") {
        full.insert("offset".into(), offset);
    }
    if driver == "qcow2"
        && let Some(secret) = below(options, "encrypt").get("key-secret")
    {
        full.insert("encrypt.key-secret".into(), secret.clone());
    }
    full.insert("driver".into(), driver.into());
    if let Some(size) = given("size") {
        full.insert("size".into(), size);
    }
    let is_plain = full.len() == 1 && child.driver().kind() != DriverKind::Format;
    full.insert("file".into(), below_it.full);
    Shown {
        full: Value::Object(full),
        name: below_it.name.filter(|_| is_plain),
    }
}

/// JSON on one line, with spaces as qemu has them.
fn text(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let entries: Vec<String> = map
                .iter()
                .map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), text(value)))
                .collect();
            format!("{{{}}}", entries.join(", "))
        }
        other => other.to_string(),
    }
}
