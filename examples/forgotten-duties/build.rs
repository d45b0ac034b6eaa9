//! Makes the copies: the sources of `format-ledger`, each time with the edits of one entry of `copies.rs`, as one module
//! per copy.

use std::{env, error::Error, fmt::Write, fs, path::Path};

#[allow(dead_code)]
mod list {
    include!("copies.rs");
}

fn main() -> Result<(), Box<dyn Error>> {
    let sources = Path::new("../format-ledger/src");
    println!("cargo::rerun-if-changed={}", sources.display());
    println!("cargo::rerun-if-changed=copies.rs");
    println!("cargo::rerun-if-changed=build.rs");
    let mut out = String::new();
    for copy in list::COPIES {
        let root = fs::read_to_string(sources.join("lib.rs"))?;
        let mut used = 0;
        writeln!(
            out,
            "/// The example, but: {}.\npub mod {} {{",
            copy.module, copy.module
        )?;
        for line in root.lines() {
            let Some(name) = module(line) else {
                // Attributes of the crate aren't attributes of a module.
                if !line.starts_with("//!") && !line.starts_with("#![") {
                    writeln!(out, "{line}")?;
                }
                continue;
            };
            let file = format!("{name}.rs");
            let mut text = fs::read_to_string(sources.join(&file))?;
            for (of, from, to) in copy.edits {
                if *of == file {
                    if !text.contains(from) {
                        return Err(
                            format!("copy '{}': {file} has no '{from}'", copy.module).into()
                        );
                    }
                    text = text.replace(from, to);
                    used += 1;
                }
            }
            // Each file is a child of the copy's module, as it was of the crate. Its own tests stay behind.
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            let text = text.replace("crate::", "super::");
            writeln!(out, "{} {{\n{text}}}", line.trim_end_matches(';'))?;
        }
        if used != copy.edits.len() {
            return Err(format!("copy '{}': an edit names no file", copy.module).into());
        }
        writeln!(out, "}}")?;
    }
    let path = Path::new(&env::var("OUT_DIR")?).join("copies.rs");
    fs::write(path, out)?;
    Ok(())
}

/// The module that a line declares.
fn module(line: &str) -> Option<&str> {
    let line = line.strip_prefix("pub ").unwrap_or(line);
    line.strip_prefix("mod ")?.strip_suffix(';')
}
