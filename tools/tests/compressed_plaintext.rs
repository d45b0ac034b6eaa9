//! Compressed writes to encrypted images: refused, unless the user agrees (`encrypt.compressed-plaintext=on`) that compressed
//! clusters are stored as they are, as qemu-io stores them. Beside the installed qemu-io and qemu-img, which read them.

mod support;

use std::{fs, process::Command};

use support::{Alone, qemu_is_installed};

const SECRET: &str = "secret,id=s,data=letmein";
const KINDS: [&str; 5] = [
    "encrypt.format=luks,encrypt.iter-time=10",
    "encrypt.format=luks,encrypt.iter-time=10,compression_type=zstd",
    "encrypt.format=luks,encrypt.iter-time=10,extended_l2=on",
    "encrypt.format=luks,encrypt.iter-time=10,extended_l2=on,compression_type=zstd,cluster_size=16k",
    "encrypt.format=aes",
];

struct Lab(Alone);

impl Lab {
    fn new() -> Self {
        Self(Alone::new())
    }

    /// Runs an installed tool; its whole output.
    fn qemu(&self, tool: &str, args: &[&str]) -> (i32, String) {
        let output = Command::new(tool)
            .args(args)
            .current_dir(self.0.path("."))
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    /// Made by us: qemu-img takes two seconds of processor time to find out how slow the machine is.
    fn create(&self, name: &str, kind: &str) {
        let options = format!("{kind},encrypt.key-secret=s");
        let (status, _, said) = self.0.blk(&[
            "create", "-q", "--object", SECRET, "-f", "qcow2", "-o", &options, name, "1M",
        ]);
        assert_eq!(status, 0, "{said}");
    }

    fn target(name: &str, more: &str) -> String {
        format!("driver=qcow2,file.filename={name},encrypt.key-secret=s{more}")
    }

    /// Runs qemu-io's commands with ours, on the image opened with `more` options.
    fn io(&self, name: &str, more: &str, commands: &[&str]) -> (i32, String) {
        let target = Self::target(name, more);
        let mut args = vec!["io", "--object", SECRET, "--image-opts"];
        args.extend(commands.iter().flat_map(|command| ["-c", *command]));
        args.push(&target);
        let (status, out, said) = self.0.blk(&args);
        (status, out + &said)
    }

    /// The installed qemu-io finds the patterns, and qemu-img nothing to complain about.
    fn assert_read_by_qemu(&self, name: &str, what: &str, reads: &[&str]) {
        let target = Self::target(name, "");
        let mut args = vec!["--object", SECRET, "--image-opts"];
        args.extend(reads.iter().flat_map(|command| ["-c", *command]));
        args.push(&target);
        let (status, said) = self.qemu("qemu-io", &args);
        assert!(
            status == 0 && !said.contains("failed"),
            "{what}: {status}, {said}"
        );
        let args = ["check", "--object", SECRET, "--image-opts", &target];
        let (status, said) = self.qemu("qemu-img", &args);
        assert_eq!(status, 0, "{what}: {said}");
    }

    /// Whether 512 equal bytes in a row are in an image's file.
    fn has_row_of(&self, name: &str, byte: u8) -> bool {
        let row = [byte; 512];
        let file = fs::read(self.0.path(name)).unwrap();
        file.chunks(512).any(|sector| sector == row)
    }
}

#[test]
fn compressed_writes_to_an_encrypted_image_need_the_users_consent_and_are_read_by_qemu() {
    if !qemu_is_installed() {
        return;
    }
    for kind in KINDS {
        let lab = Lab::new();
        lab.create("a", kind);
        let before = fs::read(lab.0.path("a")).unwrap();
        let ways = match kind {
            "encrypt.format=aes" => &["", ",encrypt.compressed-plaintext=off"][..],
            _ => &[""],
        };
        for more in ways {
            let (status, said) = lab.io("a", more, &["write -c -P 7 0 64k"]);
            assert_eq!(status, 1, "{kind}: {said}");
            assert!(
                said.contains("encrypt.compressed-plaintext=on"),
                "{kind}: {said}"
            );
        }
        assert!(fs::read(lab.0.path("a")).unwrap() == before, "{kind}");

        let consent = ",encrypt.compressed-plaintext=on";
        let writes = [
            "write -c -P 7 0 64k",
            "write -c -P 8 64k 128k",
            "write -P 9 70k 3k",
            "write -P 10 300k 10k",
            "read -P 7 0 64k",
            "read -P 8 64k 6k",
            "read -P 9 70k 3k",
            "read -P 8 73k 119k",
        ];
        let (status, said) = lab.io("a", consent, &writes);
        assert!(
            status == 0 && !said.contains("failed"),
            "{kind}: {status}, {said}"
        );
        let reads = [
            "read -P 7 0 64k",
            "read -P 8 64k 6k",
            "read -P 9 70k 3k",
            "read -P 8 73k 119k",
            "read -P 0 192k 108k",
            "read -P 10 300k 10k",
        ];
        lab.assert_read_by_qemu("a", kind, &reads);
        // What was written in part since then, with what was copied for it, is encrypted like everything else.
        for byte in [8, 9, 10] {
            assert!(!lab.has_row_of("a", byte), "{kind}: rows of {byte}");
        }
        // It needs no consent to read them, and goes on to be refused.
        let (status, said) = lab.io("a", "", &[&reads[..], &["write -c -P 1 512k 64k"]].concat());
        assert_eq!(status, 1, "{kind}: {said}");
        assert_eq!(said.matches("failed").count(), 1, "{kind}: {said}");
    }
}

/// The same bytes as in a plain image: compressed data isn't encrypted.
#[test]
fn with_consent_the_compressed_bytes_are_those_that_qemu_io_writes_into_an_encrypted_image() {
    if !qemu_is_installed() {
        return;
    }
    let lab = Lab::new();
    let line: Vec<u8> = (0..65536u32)
        .flat_map(|n| {
            n.wrapping_mul(2_654_435_761)
                .to_be_bytes()
                .into_iter()
                .take(1)
        })
        .map(|byte| b'a' + byte % 8)
        .collect();
    lab.0.write("text", &line);
    let by_qemu = ["write -c -s text 0 64k"];
    lab.create("theirs", KINDS[0]);
    let target = Lab::target("theirs", "");
    let args = [
        "--object",
        SECRET,
        "--image-opts",
        "-c",
        by_qemu[0],
        &target,
    ];
    let (status, said) = lab.qemu("qemu-io", &args);
    assert_eq!(status, 0, "{said}");
    lab.create("ours", KINDS[0]);
    let (status, said) = lab.io("ours", ",encrypt.compressed-plaintext=on", &by_qemu);
    assert_eq!(status, 0, "{said}");
    for name in ["ours", "theirs"] {
        // Each is read with the other's program.
        let target = Lab::target(name, "");
        let out = format!("{name}.raw");
        let args = [
            "--object",
            SECRET,
            "--image-opts",
            &target,
            "-O",
            "raw",
            &out,
        ];
        if name == "ours" {
            let (status, said) = lab.qemu("qemu-img", &[&["convert"][..], &args].concat());
            assert_eq!(status, 0, "{said}");
        } else {
            let (status, _, said) = lab.0.blk(&[&["convert"][..], &args].concat());
            assert_eq!(status, 0, "{said}");
        }
        let read = fs::read(lab.0.path(&out)).unwrap();
        assert!(read[..65536] == line, "{name}");
        let args = [
            "check",
            "--object",
            SECRET,
            "--output=json",
            "--image-opts",
            &target,
        ];
        let (_, said) = lab.qemu("qemu-img", &args);
        assert!(said.contains("\"compressed-clusters\": 1"), "{said}");
    }
}

#[test]
fn convert_compresses_into_an_encrypted_image_whose_user_has_agreed() {
    if !qemu_is_installed() {
        return;
    }
    for kind in [KINDS[0], KINDS[3], KINDS[4]] {
        let lab = Lab::new();
        lab.create("a", kind);
        let mut source = vec![0; 1 << 20];
        source[..300_000].fill(5);
        source[600_000..700_000].fill(6);
        lab.0.write("source", &source);
        let target = Lab::target("a", ",encrypt.compressed-plaintext=on");
        let args = [
            "convert",
            "-c",
            "-n",
            "--object",
            SECRET,
            "-f",
            "raw",
            "--target-image-opts",
            "source",
            &target,
        ];
        let (status, _, said) = lab.0.blk(&args);
        assert_eq!(status, 0, "{kind}: {said}");
        let plain = Lab::target("a", "");
        let args = ["--object", SECRET, "--image-opts", &plain];
        let convert = [&["convert"][..], &args, &["-O", "raw", "back"]].concat();
        let (status, said) = lab.qemu("qemu-img", &convert);
        assert_eq!(status, 0, "{kind}: {said}");
        assert!(fs::read(lab.0.path("back")).unwrap() == source, "{kind}");
        let check = [&["check", "--output=json"][..], &args].concat();
        let (status, said) = lab.qemu("qemu-img", &check);
        assert!(
            status == 0 && said.contains("\"compressed-clusters\""),
            "{kind}: {said}"
        );
    }
}

#[test]
fn the_option_is_a_switch_of_encrypted_images_and_is_fixed_when_they_are_opened() {
    if !qemu_is_installed() {
        return;
    }
    let lab = Lab::new();
    lab.create("a", KINDS[0]);
    let (status, said) = lab.io("a", ",encrypt.compressed-plaintext=maybe", &["read 0 512"]);
    assert_eq!(status, 1, "{said}");
    assert!(
        said.contains("Parameter 'compressed-plaintext' expects 'on' or 'off'"),
        "{said}"
    );
    let reopen = "reopen -o encrypt.compressed-plaintext=on";
    let (status, said) = lab.io("a", "", &[reopen, "write -c 0 64k"]);
    assert_eq!(status, 1, "{said}");
    assert!(said.contains("Cannot change the option"), "{said}");
}
