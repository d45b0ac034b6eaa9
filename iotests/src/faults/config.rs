//! The rules file of `blkdebug`: sections `[inject-error]`, `[set-state]` and (ours) `[inject-fault]`, each with lines
//! `key = "value"`. Comments begin with `#`. It only reads text that it is given.

use block_core::{Error, Options, Result};
use serde_json::{Map, Value};

use super::rules::{InjectError, InjectFault, Rule, SetState};

/// One section: its name, the number of its line, its keys.
struct Section {
    name: String,
    line: usize,
    keys: Map<String, Value>,
}

/// The rules in `text`, which stands in `file`.
pub(super) fn parse(text: &str, file: &str) -> Result<Vec<Rule>> {
    sections(text, file)?
        .into_iter()
        .map(|section| {
            let line = section.line;
            rule(section).map_err(|error| {
                let allowed = match error.field() {
                    Some(field) => field.allowed.clone(),
                    None => "a rule of blkdebug's".to_owned(),
                };
                error
                    .with_field(format!("section in line {line}"), "", allowed)
                    .with_file(file)
            })
        })
        .collect()
}

fn rule(section: Section) -> Result<Rule> {
    let options = Options(section.keys);
    match section.name.as_str() {
        "inject-error" => options.parse::<InjectError>()?.rule(),
        "set-state" => options.parse::<SetState>()?.rule(),
        "inject-fault" => options.parse::<InjectFault>()?.rule(),
        other => Err(Error::invalid(format!(
            "There is no option group '{other}'"
        ))),
    }
}

fn sections(text: &str, file: &str) -> Result<Vec<Section>> {
    let mut sections: Vec<Section> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        let refuse = |why: &str| {
            Err(Error::invalid(why.to_owned())
                .with_field(
                    format!("line {}", index + 1),
                    line,
                    "[section] or key = \"value\"",
                )
                .with_file(file))
        };
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            // [inject-error "id"]: the id is for people.
            let name = name.split('"').next().unwrap_or_default().trim();
            sections.push(Section {
                name: name.to_owned(),
                line: index + 1,
                keys: Map::new(),
            });
            continue;
        }
        let Some(section) = sections.last_mut() else {
            return refuse("no group defined");
        };
        let pair = line.split_once('=').and_then(|(key, value)| {
            let value = value.trim().strip_prefix('"')?.strip_suffix('"')?;
            Some((key.trim(), value))
        });
        let Some((key, value)) = pair else {
            return refuse("parse error");
        };
        section.keys.insert(key.to_owned(), value.into());
    }
    Ok(sections)
}

#[cfg(test)]
mod tests {
    use block_core::DebugEvent;

    use super::{super::rules::Action, *};

    #[test]
    fn sections_become_rules_in_their_order() {
        let text = "# a comment\n[inject-error]\nevent = \"l2_update\"\nerrno = \"28\"\nonce = \"on\"\n\n\
                    [set-state \"x\"]\nevent = \"l2_load\"\nstate = \"1\"\nnew_state = \"2\"\n";
        let rules = parse(text, "rules").unwrap();
        assert_eq!(rules.len(), 2);
        assert_eq!(rules[0].event, DebugEvent::L2Update);
        assert_eq!((rules[1].event, rules[1].state), (DebugEvent::L2Load, 1));
        assert!(matches!(rules[1].action, Action::SetState(2)));
    }

    #[test]
    fn what_is_wrong_is_named_with_file_and_line() {
        for (text, reason, line) in [
            ("garbage\n", "no group defined", "line 1"),
            ("[inject-error]\nevent\n", "parse error", "line 2"),
            (
                "\n[bogus]\n",
                "There is no option group 'bogus'",
                "section in line 2",
            ),
            (
                "[inject-error]\nbogus = \"1\"\n",
                "Invalid parameter 'bogus'",
                "section in line 1",
            ),
            (
                "[inject-error]\nerrno = \"1\"\n",
                "Missing event name for rule",
                "section in line 1",
            ),
            (
                "[inject-error]\nevent = \"nope\"\n",
                "invalid parameter value: nope",
                "section in line 1",
            ),
        ] {
            let error = parse(text, "rules.conf").unwrap_err();
            assert_eq!(error.reason(), reason);
            assert_eq!(error.file(), Some("rules.conf"));
            assert_eq!(error.field().unwrap().name, line, "{text}");
        }
    }
}
