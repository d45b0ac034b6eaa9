//! The storm and the deterministic races against a program, as a black box: qemu-io, or whatever has its commands. What
//! counts is what is left: `qemu-img check`, and the victims' patterns. Nothing here knows how the program works.

use std::{io, path::PathBuf, time::Duration};

use serde::Serialize;

use super::{
    commands::{Layout, script},
    scenes::Scene,
};
use crate::{
    case::Verdict,
    external::{self, Said, TempDir},
};

/// A program that has qemu-io's commands.
#[derive(Debug, Clone)]
pub struct Program {
    /// What it is called in reports.
    pub name: String,
    /// Where it is.
    pub path: String,
    /// Arguments before its own (`io`, of `blk io`).
    pub before: Vec<String>,
    /// Its requests wait for what overlaps them: a scene in which a command waits for a later one can't be played.
    pub waits: bool,
}

impl Program {
    /// The installed QEMU's, or the one at `path`.
    pub fn qemu_io(path: Option<&str>) -> Self {
        Self {
            name: "qemu-io".into(),
            path: path.unwrap_or("qemu-io").into(),
            before: Vec::new(),
            waits: false,
        }
    }

    /// `blk io`.
    pub fn blk(path: &str) -> Self {
        Self {
            name: "blk io".into(),
            path: path.into(),
            before: vec!["io".into()],
            waits: true,
        }
    }

    /// What it says of its version, or why it can't be run.
    ///
    /// # Errors
    /// That it isn't there.
    pub fn version(&self) -> Result<String, String> {
        let said = external::run(&self.path, &["--version"], "")
            .map_err(|error| format!("{}: {error}", self.path))?
            .ok_or_else(|| format!("{}: not found", self.path))?;
        Ok(said.text.lines().next().unwrap_or_default().to_owned())
    }
}

/// What a program made of one command file.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Played {
    /// The storm's or the scene's name.
    pub name: String,
    /// The storm's seed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Corruptions that `qemu-img check` found.
    pub check_errors: u64,
    /// Leaked clusters that it found.
    pub leaks: u64,
    /// Ranges that nobody may change, or reads, with other bytes in them than were written there.
    pub changed: usize,
    /// The verdict.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// The storm that is played: the same for every program.
pub const STORM: Layout = Layout {
    cluster: 65536,
    region: 8,
    victims: 8,
    fresh: 64,
};

/// How long a program may take over one command file.
const PATIENCE: Duration = Duration::from_secs(300);

/// Plays one storm.
///
/// # Errors
/// What kept the programs from being run.
pub fn storm(program: &Program, seed: u64, commands: usize) -> Result<Played, String> {
    let script = script(seed, commands, STORM);
    let arguments = ["-f", "qcow2", "-d", "unmap"].map(str::to_owned);
    play(program, "storm", Some(seed), "", &script, |image| {
        let mut all = arguments.to_vec();
        all.push(image.to_owned());
        all
    })
}

/// Plays one deterministic race.
///
/// # Errors
/// What kept the programs from being run.
pub fn scene(program: &Program, scene: &Scene) -> Result<Played, String> {
    if scene.waits_for_later && program.waits {
        let why = format!(
            "in {} the discard waits for the stopped request, and the command that lets it go comes later",
            program.name
        );
        return Ok(Played {
            name: scene.name.into(),
            seed: None,
            check_errors: 0,
            leaks: 0,
            changed: 0,
            verdict: Verdict::NotCovered(why),
        });
    }
    play(
        program,
        scene.name,
        None,
        scene.create,
        &scene.script,
        |image| {
            let options = format!(
                "driver=qcow2,discard=unmap,file.driver=blkdebug,file.image.driver=file,file.image.filename={image}"
            );
            ["-d", "unmap", "--image-opts", &options]
                .map(str::to_owned)
                .to_vec()
        },
    )
}

fn play(
    program: &Program,
    name: &str,
    seed: Option<u64>,
    create: &str,
    script: &str,
    arguments: impl Fn(&str) -> Vec<String>,
) -> Result<Played, String> {
    let broken = |error: io::Error| error.to_string();
    let dir = TempDir::new().map_err(broken)?;
    let path: PathBuf = dir.path().join("disk.qcow2");
    let image = path.to_string_lossy().into_owned();
    let mut making = vec!["create", "-q", "-f", "qcow2"];
    if !create.is_empty() {
        making.extend(["-o", create]);
    }
    making.extend([image.as_str(), "64M"]);
    qemu_img(&making)?;
    let arguments: Vec<String> = program
        .before
        .iter()
        .cloned()
        .chain(arguments(&image))
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let said = external::run_for(&program.path, &arguments, script, PATIENCE)
        .map_err(|error| format!("{}: {error}", program.path))?
        .ok_or_else(|| format!("{}: not found", program.path))?;
    let check = qemu_img_any(&["check", "-f", "qcow2", "--output=json", &image])?;
    Ok(judge(name, seed, &said, &check))
}

fn qemu_img_any(arguments: &[&str]) -> Result<Said, String> {
    external::run("qemu-img", arguments, "")
        .map_err(|error| format!("qemu-img: {error}"))?
        .ok_or_else(|| "qemu-img isn't installed: nothing can be judged without it".into())
}

fn qemu_img(arguments: &[&str]) -> Result<Said, String> {
    let said = qemu_img_any(arguments)?;
    match said.status {
        Some(0) => Ok(said),
        _ => Err(format!("qemu-img {}: {}", arguments[0], said.text.trim())),
    }
}

fn judge(name: &str, seed: Option<u64>, program: &Said, check: &Said) -> Played {
    let report = check.text.find('{').map(|at| &check.text[at..]);
    let report: serde_json::Value = report
        .and_then(|text| {
            serde_json::Deserializer::from_str(text)
                .into_iter()
                .next()?
                .ok()
        })
        .unwrap_or_default();
    let number = |key: &str| {
        report
            .get(key)
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(0)
    };
    let check_errors = number("corruptions") + number("check-errors");
    let leaks = number("leaks");
    let changed = program.text.matches("Pattern verification failed").count();
    let mut wrong = Vec::new();
    if changed > 0 {
        let s = if changed == 1 { "" } else { "s" };
        wrong.push(format!("{changed} read{s} gave another owner's bytes"));
    }
    if check_errors > 0 {
        wrong.push(format!("qemu-img check: {check_errors} errors"));
    }
    if !matches!(check.status, Some(0 | 2 | 3)) {
        let said = check.text.lines().last().unwrap_or_default();
        wrong.push(format!("qemu-img check: {said}"));
    }
    let complaint = program
        .text
        .lines()
        .map(|line| {
            line.trim_start_matches("qemu-io> ")
                .trim_start_matches("blk> ")
        })
        .find(|line| {
            line.contains(" failed: ") || line.contains("No such") || line.contains("not found")
        });
    if let Some(line) = complaint {
        wrong.push(line.to_owned());
    }
    let verdict = if !wrong.is_empty() {
        Verdict::Failed(wrong.join("; "))
    } else if program.status != Some(0) {
        let last = program.text.lines().last().unwrap_or_default();
        let status = program
            .status
            .map_or("a signal".into(), |status| status.to_string());
        Verdict::Inconclusive(format!("the program ended with {status}: {last}"))
    } else if leaks > 0 {
        Verdict::Failed(format!("qemu-img check: {leaks} leaked clusters"))
    } else if seed.is_none() && !program.text.contains("Suspended request") {
        Verdict::Inconclusive("nothing was stopped at the breakpoint".into())
    } else {
        Verdict::Passed
    };
    Played {
        name: name.into(),
        seed,
        check_errors,
        leaks,
        changed,
        verdict,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(status: i32, text: &str) -> Said {
        Said {
            status: Some(status),
            text: text.into(),
        }
    }

    const CLEAN: &str = "{\"check-errors\": 0, \"filename\": \"x\"}";
    const STOPPED: &str = "blkdebug: Suspended request 'A'\n";

    #[test]
    fn a_changed_victim_an_error_of_check_and_a_failed_request_are_failures() {
        let changed =
            format!("{STOPPED}qemu-io> Pattern verification failed at offset 0, 1 bytes\n");
        let refused = format!("{STOPPED}blk> readv failed: Input/output error\n");
        for (program, check) in [
            (said(1, &changed), said(0, CLEAN)),
            (said(0, STOPPED), said(2, "{\"corruptions\": 3}")),
            (said(0, STOPPED), said(3, "{\"leaks\": 3}")),
            (said(1, &refused), said(0, CLEAN)),
        ] {
            assert!(
                judge("x", None, &program, &check).verdict.is_failed(),
                "{program:?}"
            );
        }
        let clean = judge("x", None, &said(0, STOPPED), &said(0, CLEAN));
        assert_eq!(clean.verdict, Verdict::Passed);
    }

    #[test]
    fn a_scene_in_which_nothing_was_stopped_proves_nothing() {
        let idle = judge("x", None, &said(0, ""), &said(0, CLEAN));
        assert!(matches!(idle.verdict, Verdict::Inconclusive(_)));
        let aborted = judge("x", Some(1), &said(9, "oops"), &said(0, CLEAN));
        assert!(matches!(aborted.verdict, Verdict::Inconclusive(_)));
    }
}
