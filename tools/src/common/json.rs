//! JSON as qemu's tools lay it out: four spaces, and empty lists and objects over two lines.

use serde_json::Value;

/// The text, without a line end.
pub fn pretty(value: &Value) -> String {
    let mut text = String::new();
    write(&mut text, value, 0);
    text
}

fn indent(text: &mut String, depth: usize) {
    text.push('\n');
    for _ in 0..depth {
        text.push_str("    ");
    }
}

fn write(text: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Array(list) => {
            text.push('[');
            for (index, item) in list.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                indent(text, depth + 1);
                write(text, item, depth + 1);
            }
            indent(text, depth);
            text.push(']');
        }
        Value::Object(map) => {
            text.push('{');
            for (index, (key, item)) in map.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                indent(text, depth + 1);
                text.push_str(&Value::String(key.clone()).to_string());
                text.push_str(": ");
                write(text, item, depth + 1);
            }
            indent(text, depth);
            text.push('}');
        }
        other => text.push_str(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn empty_lists_take_two_lines() {
        let text = pretty(&json!({"a": [], "b": {"c": [1, "x"]}, "d": {}}));
        assert_eq!(
            text,
            "{\n    \"a\": [\n    ],\n    \"b\": {\n        \"c\": [\n            1,\n            \"x\"\n        ]\n    },\n    \"d\": {\n    }\n}"
        );
    }
}
