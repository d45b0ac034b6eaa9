//! Encrypted images: what the installed qemu makes and writes is read, and what is written here it reads, for LUKS and for
//! legacy AES; keys; and that nothing but ciphertext gets into the file.

mod common;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use block_core::{
    BlockHandle, Options, RequestFlags, Result,
    driver::{Preallocation, Truncate},
    registry::{ImplicitOpens, OpenOptions},
    secret::Secret,
    status::StatusFlags,
};
use common::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tempfile::TempDir;

const KEY: &str = "encrypt.key-secret=s";
const SECRET: &str = "secret,id=s,data=open sesame";

struct Lab {
    rig: Rig,
    dir: TempDir,
}

fn has_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: qemu-img isn't installed");
    }
    found
}

impl Lab {
    fn new() -> Self {
        let rig = Rig::new();
        let secrets = rig.graph.secrets();
        secrets.add("s", Secret::new("open sesame")).unwrap();
        secrets.add("wrong", Secret::new("open barley")).unwrap();
        Self {
            rig,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn create(&self, name: &str, options: &str) -> Result<PathBuf> {
        let path = self.path(name);
        let options = Options::from_dotted(&format!("encrypt.iter-time=1,{KEY},{options}"))?;
        let options = strip_iter_time(options);
        let (registry, graph) = (&self.rig.registry, &self.rig.graph);
        let create = registry.create(graph, "qcow2", path.to_str().unwrap(), options);
        self.rig.block_on(create)?;
        Ok(path)
    }

    fn create_by_qemu(&self, name: &str, options: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        let options = format!("{KEY},{options}");
        let (text, size) = (path.to_str().unwrap(), size.to_string());
        qemu_img(&[
            "create", "-q", "--object", SECRET, "-f", "qcow2", "-o", &options, text, &size,
        ]);
        path
    }

    async fn open(&self, path: &Path, options: &str) -> Result<BlockHandle> {
        self.rig.open(path, &format!("{KEY},{options}")).await
    }

    fn read(&self, path: &Path) -> Vec<u8> {
        self.rig.block_on(async {
            let handle = self.open(path, "read-only=on").await.unwrap();
            let data = handle.read(0, handle.length() as usize).await.unwrap();
            self.rig.close(handle).await.unwrap();
            data.to_vec()
        })
    }

    /// What qemu reads.
    fn read_by_qemu(&self, path: &Path) -> Vec<u8> {
        let raw = self.path("read-by-qemu.raw");
        qemu_img(&[
            "convert",
            "--object",
            SECRET,
            "--image-opts",
            &image_opts(path),
            "-O",
            "raw",
            raw.to_str().unwrap(),
        ]);
        std::fs::read(raw).unwrap()
    }

    fn assert_reads(&self, path: &Path, expected: &[u8], what: &str) {
        assert_same(&self.read(path), expected, what);
        if has_qemu() {
            assert_same(&self.read_by_qemu(path), expected, what);
            assert_clean_with_key(path);
        }
    }

    /// Writes at random, here, and returns what the disk holds then.
    fn scribble(&self, path: &Path, expected: &mut [u8], seed: u64) {
        let mut rng = SmallRng::seed_from_u64(seed);
        self.rig.block_on(async {
            let handle = self.open(path, "discard=unmap").await.unwrap();
            for _ in 0..40 {
                let len = *[1, 300, 512, 4096, 70_000, 200_000]
                    .get(rng.random_range(0..6))
                    .unwrap();
                let at = rng.random_range(0..expected.len() - len);
                let (from, to) = (at as u64, len as u64);
                match rng.random_range(0..6) {
                    0 => {
                        handle
                            .write_zeroes(from, to, RequestFlags::MAY_UNMAP)
                            .await
                            .unwrap();
                        expected[at..at + len].fill(0);
                    }
                    1 => {
                        let read = handle.read(from, len).await.unwrap();
                        assert_same(&read, &expected[at..at + len], "in between");
                    }
                    _ => {
                        let mut data = vec![0; len];
                        rng.fill(&mut data[..]);
                        handle
                            .write(from, data.clone(), RequestFlags::empty())
                            .await
                            .unwrap();
                        expected[at..at + len].copy_from_slice(&data);
                    }
                }
            }
            self.rig.close(handle).await.unwrap();
        });
    }
}

/// Legacy AES has no iterations.
fn strip_iter_time(mut options: Options) -> Options {
    if let Some(encrypt) = options
        .0
        .get_mut("encrypt")
        .and_then(|value| value.as_object_mut())
        && encrypt.get("format").and_then(|format| format.as_str()) == Some("aes")
    {
        encrypt.shift_remove("iter-time");
    }
    options
}

fn image_opts(path: &Path) -> String {
    format!("driver=qcow2,{KEY},file.filename={}", path.display())
}

fn assert_clean_with_key(path: &Path) {
    let text = qemu_img(&[
        "check",
        "--object",
        SECRET,
        "--image-opts",
        &image_opts(path),
    ]);
    assert!(text.contains("No errors were found"), "{text}");
}

fn qemu_io(path: &Path, commands: &[String]) {
    let opts = image_opts(path);
    let mut args = vec!["--object", SECRET, "--image-opts", &opts];
    for command in commands {
        args.extend(["-c", command.as_str()]);
    }
    let text = tool("qemu-io", &args);
    assert!(!text.contains("failed"), "{text}");
}

/// Writes at random by qemu.
fn scribble_by_qemu(path: &Path, expected: &mut [u8], seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut commands = Vec::new();
    for _ in 0..20 {
        let len = *[512usize, 4096, 70_144, 200_192]
            .get(rng.random_range(0..4))
            .unwrap();
        let at = rng.random_range(0..(expected.len() - len) / 512) * 512;
        let value: u8 = rng.random_range(0..=255);
        if value < 40 {
            commands.push(format!("write -z -u {at} {len}"));
            expected[at..at + len].fill(0);
        } else {
            commands.push(format!("write -P {value} {at} {len}"));
            expected[at..at + len].fill(value);
        }
    }
    qemu_io(path, &commands);
}

const SIZE: u64 = 2 << 20;

#[test]
fn images_that_qemu_encrypted_are_read_and_written_on_by_both() {
    if !has_qemu() {
        return;
    }
    let lab = Lab::new();
    let luks = "encrypt.format=luks,encrypt.iter-time=1";
    for (n, options) in [
        luks.to_owned(),
        format!("{luks},compat=0.10"),
        format!("{luks},cluster_size=512"),
        format!("{luks},extended_l2=on,cluster_size=16k"),
        format!("{luks},encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv"),
        format!(
            "{luks},encrypt.cipher-alg=serpent-192,encrypt.ivgen-alg=plain,encrypt.hash-alg=ripemd160"
        ),
        format!(
            "{luks},encrypt.cipher-alg=twofish-256,encrypt.cipher-mode=ctr,encrypt.hash-alg=sha512"
        ),
        format!(
            "{luks},encrypt.cipher-alg=cast5-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,\
             encrypt.ivgen-hash-alg=md5,encrypt.hash-alg=sm3"
        ),
        format!("{luks},encrypt.cipher-mode=ecb,encrypt.hash-alg=sha1"),
        "encrypt.format=aes".to_owned(),
        "encrypt.format=aes,compat=0.10,cluster_size=4k".to_owned(),
    ]
    .iter()
    .enumerate()
    {
        let path = lab.create_by_qemu(&format!("{n}.qcow2"), options, SIZE);
        let mut expected = vec![0; SIZE as usize];
        scribble_by_qemu(&path, &mut expected, n as u64);
        assert_same(&lab.read(&path), &expected, options);
        lab.scribble(&path, &mut expected, n as u64);
        lab.assert_reads(&path, &expected, options);
        scribble_by_qemu(&path, &mut expected, 100 + n as u64);
        lab.assert_reads(&path, &expected, options);
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn images_that_are_encrypted_here_are_read_and_written_by_qemu() {
    let lab = Lab::new();
    for (n, options) in [
        "encrypt.format=luks",
        "encrypt.format=luks,compat=0.10",
        "encrypt.format=luks,cluster_size=512",
        "encrypt.format=luks,cluster_size=2M",
        "encrypt.format=luks,extended_l2=on",
        "encrypt.format=luks,preallocation=metadata",
        "encrypt.format=luks,preallocation=full",
        "encrypt.format=luks,encrypt.cipher-alg=serpent-256,encrypt.hash-alg=sha512",
        "encrypt.format=luks,encrypt.cipher-alg=twofish-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
        "encrypt.format=luks,refcount_bits=1",
        "encrypt.format=luks,data_file=DIR/data",
        "encrypt.format=luks,data_file=DIR/raw,data_file_raw=on",
        "encrypt.format=luks,data_file=DIR/full,data_file_raw=on,extended_l2=on,preallocation=full",
        "encrypt.format=aes,data_file=DIR/aes",
        "encrypt.format=aes",
        "encryption=on,compat=0.10,cluster_size=1k",
    ]
    .into_iter()
    .enumerate()
    {
        let options = format!("{options},size={SIZE}");
        let options = options.replace("DIR", lab.dir.path().to_str().unwrap());
        let options = if options.starts_with("encryption") {
            format!("encrypt.format=aes,{}", &options["encryption=on,".len()..])
        } else {
            options
        };
        let path = lab.create(&format!("{n}.qcow2"), &options).unwrap();
        let mut expected = vec![0; SIZE as usize];
        lab.assert_reads(&path, &expected, &options);
        lab.scribble(&path, &mut expected, n as u64);
        lab.assert_reads(&path, &expected, &options);
        if has_qemu() {
            scribble_by_qemu(&path, &mut expected, 100 + n as u64);
            lab.assert_reads(&path, &expected, &options);
        }
        std::fs::remove_file(path).unwrap();
    }
}

fn reason(result: Result<impl Sized>) -> String {
    match result {
        Ok(_) => panic!("it should have failed"),
        Err(error) => {
            let shown = format!("{error} {error:?}");
            assert!(
                !shown.contains("sesame") && !shown.contains("barley"),
                "{shown}"
            );
            error.reason()
        }
    }
}

#[test]
fn an_image_opens_with_its_key_and_with_nothing_else() {
    let lab = Lab::new();
    let open = |path: &Path, options: &str| lab.rig.block_on(lab.rig.open(path, options));
    for (format, wrong_opens) in [("luks", false), ("aes", true)] {
        let path = lab
            .create(format, &format!("encrypt.format={format},size=1M"))
            .unwrap();
        let other = if format == "luks" { "aes" } else { "luks" };
        for (options, message) in [
            (
                String::new(),
                "Parameter 'encrypt.key-secret' is required for cipher".to_owned(),
            ),
            (
                "encrypt.key-secret=x".to_owned(),
                "No secret with id 'x'".to_owned(),
            ),
            (
                format!("{KEY},encrypt.format={other}"),
                format!(
                    "Header reported '{format}' encryption format but options specify '{other}'"
                ),
            ),
            (
                format!("{KEY},encrypt.foo=1"),
                "Parameter 'foo' is unexpected".to_owned(),
            ),
        ] {
            assert_eq!(reason(open(&path, &options)), message);
        }
        let handle = open(&path, &format!("{KEY},encrypt.format={format}")).unwrap();
        lab.rig.block_on(lab.rig.close(handle)).unwrap();
        match open(&path, "encrypt.key-secret=wrong") {
            // There is nothing that a wrong password could be told by.
            Ok(handle) if wrong_opens => lab.rig.block_on(lab.rig.close(handle)).unwrap(),
            other => assert_eq!(reason(other), "Invalid password, cannot unlock any keyslot"),
        }
    }
    let plain = lab.path("plain");
    let options = Options::from_dotted("size=1M").unwrap();
    let (registry, graph) = (&lab.rig.registry, &lab.rig.graph);
    lab.rig
        .block_on(registry.create(graph, "qcow2", plain.to_str().unwrap(), options))
        .unwrap();
    assert_eq!(
        reason(open(&plain, "encrypt.format=luks")),
        "No encryption in image header, but options specified format 'luks'"
    );
    // As in qemu, a key that nobody needs does no harm.
    let handle = open(&plain, KEY).unwrap();
    lab.rig.block_on(lab.rig.close(handle)).unwrap();
}

#[test]
fn an_image_tells_of_itself_and_is_checked_without_its_key_but_gives_no_data() {
    let lab = Lab::new();
    let path = lab.create("a", "encrypt.format=luks,size=1M").unwrap();
    let mut expected = vec![0; 1 << 20];
    lab.scribble(&path, &mut expected, 5);
    lab.rig.block_on(async {
        for (for_check, metadata_only) in [(true, false), (false, true)] {
            let how = OpenOptions {
                implicit: ImplicitOpens::Permit,
                for_check,
                metadata_only,
                ..OpenOptions::default()
            };
            let options = Options::from_dotted("read-only=on").unwrap();
            let node = lab
                .rig
                .registry
                .open_file(
                    &lab.rig.graph,
                    path.to_str().unwrap(),
                    Some("qcow2"),
                    options,
                    how,
                )
                .await
                .unwrap();
            let permissions = block_core::PermissionSet::new(
                block_core::Permissions::CONSISTENT_READ,
                block_core::Permissions::all(),
            );
            let handle = lab.rig.graph.attach(&node, permissions, "test").unwrap();
            let report = checked(&handle).await;
            assert!(report.is_clean());
            let info = handle.info().await.unwrap();
            assert!(info.encrypted);
            let (_, data) = info.format_specific.unwrap();
            let encrypt = &data["encrypt"];
            assert_eq!(encrypt["cipher-alg"], "aes-256");
            assert_eq!(encrypt["slots"].as_array().unwrap().len(), 8);
            assert_eq!(
                reason(handle.read(0, 1 << 20).await),
                "Parameter 'encrypt.key-secret' is required for cipher"
            );
            lab.rig.close(handle).await.unwrap();
        }
    });
}

#[test]
fn neither_plain_data_nor_places_in_the_file_come_out() {
    let lab = Lab::new();
    for format in ["luks", "aes"] {
        let path = lab
            .create(
                format,
                &format!("encrypt.format={format},cluster_size=4k,size=1M"),
            )
            .unwrap();
        lab.rig.block_on(async {
            let handle = lab.open(&path, "").await.unwrap();
            let secret = b"the quick brown fox ".repeat(1000);
            // Unaligned, over several clusters, twice: allocating and in place.
            for _ in 0..2 {
                handle
                    .write(1000, secret.clone(), RequestFlags::empty())
                    .await
                    .unwrap();
            }
            assert_same(
                &handle.read(1000, secret.len()).await.unwrap(),
                &secret,
                format,
            );
            let status = handle.block_status(4096, 4096).await.unwrap();
            assert!(status.is_data() && !status.flags.contains(StatusFlags::OFFSET_VALID));
            assert!(status.mapped.is_none());
            let compressed = handle
                .write(65536, vec![1; 4096], RequestFlags::WRITE_COMPRESSED)
                .await;
            let why = reason(compressed);
            assert!(
                why.starts_with("Compression and encryption not supported at the same time")
                    && why.contains("encrypt.compressed-plaintext=on"),
                "{why}"
            );
            lab.rig.close(handle).await.unwrap();
        });
        let file = std::fs::read(&path).unwrap();
        assert!(!file.windows(9).any(|bytes| bytes == b"brown fox"));
        assert!(!file.windows(11).any(|bytes| bytes == b"open sesame"));
    }
}

#[test]
fn an_encrypted_overlay_copies_on_write_from_an_encrypted_backing_file() {
    let lab = Lab::new();
    for (base, top) in [("luks", "aes"), ("aes", "luks"), ("luks", "luks")] {
        let lower = lab
            .create("base", &format!("encrypt.format={base},size=1M"))
            .unwrap();
        let mut expected = vec![0; 1 << 20];
        lab.scribble(&lower, &mut expected, 11);
        let options = format!(
            "encrypt.format={top},size=1M,backing_file={},backing_fmt=qcow2",
            lower.display()
        );
        let upper = lab.create("top", &options).unwrap();
        lab.rig.block_on(async {
            let key = format!("backing.{KEY},backing.driver=qcow2,backing.file.driver=file");
            let options = format!("{key},backing.file.filename={}", lower.display());
            let handle = lab.open(&upper, &options).await.unwrap();
            for at in [700usize, 65536 - 10, 300_000] {
                handle
                    .write(at as u64, vec![7; 5000], RequestFlags::empty())
                    .await
                    .unwrap();
                expected[at..at + 5000].fill(7);
            }
            assert_same(&handle.read(0, 1 << 20).await.unwrap(), &expected, base);
            lab.rig.close(handle).await.unwrap();
            // The key alone is for the file that the image names.
            let handle = lab.open(&upper, &format!("backing.{KEY}")).await.unwrap();
            assert_same(&handle.read(0, 1 << 20).await.unwrap(), &expected, "named");
            lab.rig.close(handle).await.unwrap();
            let error = lab.open(&lower, &format!("backing.{KEY}")).await.err();
            assert!(
                error.is_some(),
                "options of a backing file that isn't there"
            );
        });
        for backing in ["", "backing.driver=qcow2,backing.file.filename="] {
            if !has_qemu() {
                break;
            }
            let mut opts = format!("{},backing.{KEY}", image_opts(&upper));
            if !backing.is_empty() {
                opts.push_str(&format!(",{backing}{}", lower.display()));
            }
            let raw = lab.path("flat.raw");
            let args = [
                "convert",
                "--object",
                SECRET,
                "--image-opts",
                &opts,
                "-O",
                "raw",
                raw.to_str().unwrap(),
            ];
            qemu_img(&args);
            assert_same(&std::fs::read(raw).unwrap(), &expected, "qemu");
        }
    }
}

#[test]
fn space_that_was_preallocated_reads_as_zeroes_also_after_growing() {
    let lab = Lab::new();
    for how in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        let path = lab.create("a", "encrypt.format=luks,size=1M").unwrap();
        let mut expected = vec![0; 1 << 20];
        lab.scribble(&path, &mut expected, 3);
        lab.rig.block_on(async {
            let handle = lab.open(&path, "").await.unwrap();
            let grow = Truncate {
                exact: true,
                preallocation: how,
                zero: false,
            };
            handle.truncate(3 << 20, grow).await.unwrap();
            lab.rig.close(handle).await.unwrap();
        });
        expected.resize(3 << 20, 0);
        lab.assert_reads(&path, &expected, "grown");
        lab.scribble(&path, &mut expected, 4);
        lab.assert_reads(&path, &expected, "written after growing");
    }
    let refused = lab.create(
        "b",
        "encrypt.format=luks,size=1M,compat=0.10,preallocation=metadata",
    );
    assert!(reason(refused).contains("compatibility level 1.1"));
}

#[test]
fn an_encrypted_data_file_reads_as_zeroes_where_the_disk_has_grown() {
    let lab = Lab::new();
    for format in ["luks", "aes"] {
        let data = lab.path("data.raw");
        let options = format!(
            "encrypt.format={format},size=100k,data_file={}",
            data.display()
        );
        let path = lab.create("a", &options).unwrap();
        let mut expected = vec![9; 100 << 10];
        lab.rig.block_on(async {
            let handle = lab.open(&path, "").await.unwrap();
            write(&handle, 0, 100 << 10, 9).await.unwrap();
            lab.rig.close(handle).await.unwrap();
        });
        // Within the last cluster, beyond it, cut within a cluster, and both again, with all kinds of preallocation.
        let steps = [
            (110, Preallocation::Off),
            (200, Preallocation::Off),
            (70, Preallocation::Off),
            (120, Preallocation::Off),
            (400, Preallocation::Metadata),
            (600, Preallocation::Full),
            (590, Preallocation::Off),
            (700, Preallocation::Falloc),
        ];
        for (kib, preallocation) in steps {
            let size = kib << 10;
            lab.rig.block_on(async {
                let handle = lab.open(&path, "").await.unwrap();
                let how = Truncate {
                    preallocation,
                    ..Truncate::default()
                };
                handle.truncate(size as u64, how).await.unwrap();
                lab.rig.close(handle).await.unwrap();
            });
            expected.resize(size, 0);
            lab.assert_reads(&path, &expected, &format!("{format}: {kib} KiB"));
            lab.rig.block_on(async {
                let handle = lab.open(&path, "").await.unwrap();
                write(&handle, size as u64 - 512, 512, 8).await.unwrap();
                lab.rig.close(handle).await.unwrap();
            });
            expected[size - 512..].fill(8);
            lab.assert_reads(&path, &expected, &format!("{format}: written at {kib} KiB"));
        }
        std::fs::remove_file(data).unwrap();
    }
}

#[test]
fn a_damaged_luks_header_is_refused_with_its_field() {
    let lab = Lab::new();
    let path = lab.create("a", "encrypt.format=luks,size=1M").unwrap();
    let good = std::fs::read(&path).unwrap();
    // The area follows the L1 table.
    let area = 4 << 16;
    assert_eq!(&good[area..area + 4], b"LUKS");
    for (at, bytes, message) in [
        (0, &b"SKUL"[..], "Volume is not in LUKS format"),
        (6, &[0, 2], "LUKS version 2 is not supported"),
        (
            104,
            &[0, 0, 0, 1],
            "LUKS payload is overlapping with the header",
        ),
        (
            108,
            &[0xff, 0xff, 0xff, 0xff],
            "Keyslot 0 is overlapping with the encrypted payload",
        ),
        (164, &[0, 0, 0, 0], "LUKS key iteration count is zero"),
        (
            208,
            &[1, 2, 3, 4],
            "Keyslot 0 state (active/disable) is corrupted",
        ),
        (
            252,
            &[0, 0, 0, 1],
            "Keyslot 0 is corrupted (stripes 1 != 4000)",
        ),
        (
            208,
            &[0, 0, 0xde, 0xad],
            "Invalid password, cannot unlock any keyslot",
        ),
        (112, &[0; 20], "Invalid password, cannot unlock any keyslot"),
    ] {
        let mut bad = good.clone();
        bad[area + at..area + at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, &bad).unwrap();
        assert_eq!(
            reason(lab.rig.block_on(lab.open(&path, "read-only=on"))),
            message
        );
        if has_qemu() {
            let opts = image_opts(&path);
            let theirs = run(
                "qemu-io",
                &[
                    "--object",
                    SECRET,
                    "--image-opts",
                    &opts,
                    "-c",
                    "read 0 512",
                ],
            );
            let said = String::from_utf8_lossy(&theirs.stderr).into_owned();
            assert!(said.contains(message), "qemu says: {said}");
        }
    }
    // A header extension whose length can't be true: the header promises more than there is.
    let at = good
        .windows(4)
        .position(|word| word == [0x05, 0x37, 0xbe, 0x77])
        .unwrap();
    for len in [0u64, 100, 4096, 300_000] {
        let mut bad = good.clone();
        bad[at + 16..at + 24].copy_from_slice(&len.to_be_bytes());
        std::fs::write(&path, &bad).unwrap();
        let message = reason(lab.rig.block_on(lab.open(&path, "read-only=on")));
        assert!(
            message.contains("LUKS header area is too small"),
            "{message}"
        );
    }
}

#[test]
fn what_is_discarded_in_place_stays_ciphertext_so_that_an_old_link_never_shows_noise() {
    let lab = Lab::new();
    let data = lab.path("data");
    let with_data_file = format!("encrypt.format=luks,data_file={},size=1M", data.display());
    for (name, options, open, file) in [
        (
            "a",
            "encrypt.format=luks,size=1M",
            "discard-no-unref=on",
            None,
        ),
        (
            "b",
            &with_data_file,
            "cache.no-flush=off",
            Some(data.clone()),
        ),
    ] {
        let path = lab.create(name, options).unwrap();
        let file = file.unwrap_or_else(|| path.clone());
        let stored = || std::fs::read(&file).unwrap();
        lab.rig.block_on(async {
            let options = format!("discard=unmap,{open}");
            let handle = lab.open(&path, &options).await.unwrap();
            write(&handle, 0, 256 << 10, 7).await.unwrap();
            handle.flush().await.unwrap();
            let before = stored();
            handle.discard(0, 128 << 10).await.unwrap();
            // The link may still be on disk, and be what a cut of the power leaves.
            assert!(stored() == before, "{name}");
            handle.flush().await.unwrap();
            let seen = handle.read(0, 256 << 10).await.unwrap();
            assert!(seen[..128 << 10].iter().all(|byte| *byte == 0), "{name}");
            assert!(seen[128 << 10..].iter().all(|byte| *byte == 7), "{name}");
            lab.rig.close(handle).await.unwrap();
        });
    }
}
