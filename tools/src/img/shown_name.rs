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
    let driver = node.driver().name();
    let plain = node.filename().unwrap_or_default();
    let edges = node.edges();
    let child = edges.child(ChildRole::File).or_else(|| edges.primary());
    let child = child.map(|child| child.node().clone());
    let (Some(child), true) = (child, node.driver().kind() == DriverKind::Format) else {
        // Storage, and filters, which have the name of what is below.
        let mut full = Map::new();
        full.insert("driver".into(), driver.into());
        full.insert("filename".into(), plain.clone().into());
        return Shown {
            full: Value::Object(full),
            name: Some(plain),
        };
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
