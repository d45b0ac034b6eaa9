//! The tutorial can't rot: what it quotes is in the sources, letter by letter, and what failures refer to is in the tutorial.

use std::{fs, path::PathBuf};

use iotests::{all_cases, duties::Duty};

fn read(path: &str) -> String {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = root.join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A code block: its language, the file named before it, its lines.
struct Block {
    line: usize,
    language: String,
    file: Option<String>,
    lines: Vec<String>,
}

fn blocks(text: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    let mut file = None;
    for (number, line) in text.lines().enumerate() {
        if let Some(language) = line.strip_prefix("```") {
            match open.take() {
                Some(block) => blocks.push(block),
                None => {
                    open = Some(Block {
                        line: number + 1,
                        language: language.to_owned(),
                        file: file.take(),
                        lines: Vec::new(),
                    });
                }
            }
        } else if let Some(block) = &mut open {
            block.lines.push(line.to_owned());
        } else {
            let name = line
                .strip_prefix("<!-- ")
                .and_then(|rest| rest.strip_suffix(" -->"));
            file = name.map(ToOwned::to_owned);
        }
    }
    assert!(open.is_none(), "a code block doesn't end");
    blocks
}

#[test]
fn every_code_block_stands_in_the_file_that_it_names() {
    let text = read(iotests::duties::TUTORIAL);
    let mut quoted = 0;
    for block in blocks(&text) {
        if block.language == "text" {
            continue;
        }
        let file = block.file.as_deref();
        let file = file.unwrap_or_else(|| panic!("line {}: quoted from where?", block.line));
        let source = read(file);
        let source: Vec<&str> = source.lines().collect();
        let found = source
            .windows(block.lines.len())
            .any(|lines| lines == block.lines);
        assert!(
            found,
            "line {}: {file} doesn't have this any more",
            block.line
        );
        quoted += 1;
    }
    assert!(quoted > 20, "only {quoted} blocks are quoted");
}

#[test]
fn every_step_is_quoted() {
    let text = read(iotests::duties::TUTORIAL);
    let blocks = blocks(&text);
    for step in 1..=5 {
        let file = format!("examples/writing-a-driver/src/step{step}.rs");
        assert!(
            blocks
                .iter()
                .any(|block| block.file.as_ref() == Some(&file)),
            "{file}"
        );
        assert!(text.contains(&format!("\n## Step {step}: ")), "step {step}");
    }
    assert!(text.contains("\n## Step 6: "));
}

#[test]
fn every_duty_that_a_failure_names_has_its_section() {
    let text = read(iotests::duties::TUTORIAL);
    for duty in Duty::ALL {
        let heading = format!("\n### Duty: {}\n", duty.sentence());
        assert_eq!(text.matches(&heading).count(), 1, "{heading}");
    }
    let headings = text.lines().filter(|line| line.starts_with("### Duty: "));
    assert_eq!(headings.count(), Duty::ALL.len());
}

#[test]
fn messages_that_are_shown_are_as_the_suite_writes_them() {
    let text = read(iotests::duties::TUTORIAL);
    let mut shown = 0;
    for line in text.lines().filter(|line| line.starts_with("    duty: ")) {
        let same = |duty: &Duty| duty.explain("").trim_start_matches('\n') == line;
        assert!(Duty::ALL.iter().any(same), "{line}");
        shown += 1;
    }
    assert!(shown >= 2, "only {shown} messages");
}

#[test]
fn every_case_that_is_named_exists() {
    let text = read(iotests::duties::TUTORIAL);
    let cases: Vec<String> = all_cases().into_iter().map(|case| case.name).collect();
    let groups = ["rw-", "race-", "backing-", "graph-", "crash-", "status-"];
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
    let named: Vec<&str> = words
        .filter(|word| groups.iter().any(|group| word.starts_with(group)))
        .collect();
    assert!(named.len() >= 9, "{named:?}");
    for name in named {
        assert!(
            cases.iter().any(|case| case == name),
            "there is no case '{name}'"
        );
    }
}
