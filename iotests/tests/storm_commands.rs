//! The same command file on standard input of the installed qemu-io, which corrupts the image, and of `blk io`, which
//! leaves it clean. Set `IOTESTS_BLK` to the path of `blk`; what isn't there is skipped visibly.

use iotests::{
    external::{self, Said, TempFile},
    race::commands::{Layout, script},
};

const LAYOUT: Layout = Layout {
    cluster: 65536,
    region: 8,
    victims: 8,
    fresh: 64,
};

/// What became of an image: the program's exit status and output, and what `qemu-img check` said.
struct Outcome {
    program: Said,
    check: Said,
}

impl Outcome {
    fn changed_victims(&self) -> usize {
        self.program
            .text
            .matches("Pattern verification failed")
            .count()
    }

    fn is_corrupt(&self) -> bool {
        self.check.status != Some(0) || self.changed_victims() > 0
    }
}

/// `None` when one of the programs isn't there.
fn storm(program: &str, arguments: &[&str], seed: u64) -> Option<Outcome> {
    let image = TempFile::new("storm.qcow2", &[]).expect("a temporary file");
    let path = image.path().to_string_lossy().into_owned();
    let create = ["create", "-q", "-f", "qcow2", &path, "64M"];
    let created = external::run("qemu-img", &create, "").expect("qemu-img runs")?;
    assert_eq!(created.status, Some(0), "{}", created.text);
    let arguments: Vec<&str> = arguments.iter().copied().chain([path.as_str()]).collect();
    let script = script(seed, 5000, LAYOUT);
    let program = external::run(program, &arguments, &script).expect("the program runs")?;
    let check = external::check_file("qcow2", image.path()).expect("qemu-img runs")?;
    Some(Outcome { program, check })
}

#[test]
fn the_installed_qemu_io_corrupts_an_image_with_the_command_file() {
    let mut corrupt = 0;
    let mut victims = 0;
    for seed in 1..9 {
        let Some(outcome) = storm("qemu-io", &["-f", "qcow2", "-d", "unmap"], seed) else {
            println!("SKIPPED: qemu-io or qemu-img isn't installed");
            return;
        };
        corrupt += usize::from(outcome.is_corrupt());
        victims += outcome.changed_victims();
    }
    println!("qemu-io: {corrupt} of 8 images corrupt, {victims} victims changed");
    assert!(
        corrupt > 0,
        "the installed qemu-io left 8 of 8 images whole: the file shows nothing"
    );
}

#[test]
fn blk_io_leaves_a_clean_image_with_the_command_file() {
    let Ok(blk) = std::env::var("IOTESTS_BLK") else {
        println!("SKIPPED: IOTESTS_BLK isn't set to the path of blk");
        return;
    };
    for seed in 1..9 {
        let Some(outcome) = storm(&blk, &["io", "-f", "qcow2", "-d", "unmap"], seed) else {
            println!("SKIPPED: {blk} or qemu-img isn't there");
            return;
        };
        assert_eq!(
            outcome.program.status,
            Some(0),
            "seed {seed}: {}",
            tail(&outcome.program)
        );
        assert_eq!(
            outcome.changed_victims(),
            0,
            "seed {seed}: {}",
            tail(&outcome.program)
        );
        assert_eq!(
            outcome.check.status,
            Some(0),
            "seed {seed}: {}",
            outcome.check.text
        );
    }
}

/// The end of what a program printed.
fn tail(said: &Said) -> String {
    let lines: Vec<&str> = said.text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}
