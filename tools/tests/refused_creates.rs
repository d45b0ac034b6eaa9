//! An image that can't be made leaves what was in its place before: a file with its bytes, or nothing.

mod support;

use std::fs;

use support::Alone;

/// Options that are refused, for each way to refuse them.
const REFUSED: &[&[&str]] = &[
    &["-f", "qcow2", "-o", "cluster_size=3", "a", "1M"],
    &["-f", "qcow2", "-o", "cluster_size=512", "a", "7E"],
    &["-f", "qcow2", "-o", "compat=0.10,extended_l2=on", "a", "1M"],
    &["-f", "qcow2", "-o", "data_file_raw=on", "a", "1M"],
    &["-f", "qcow2", "-o", "encrypt.format=luks", "a", "1M"],
    &[
        "-f",
        "qcow2",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=nobody",
        "a",
        "1M",
    ],
    &[
        "--object",
        "secret,id=s,data=x",
        "-f",
        "qcow2",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=serpent-192,encrypt.cipher-mode=cbc",
        "a",
        "1M",
    ],
    &["-f", "raw", "-o", "preallocation=metadata", "a", "1M"],
    &["-f", "vmdk", "-o", "subformat=bogus", "a", "1M"],
];

#[test]
fn options_that_are_refused_leave_the_file_that_is_there_as_it_is() {
    let alone = Alone::new();
    for args in REFUSED {
        let args = [&["create"][..], args].concat();
        let (status, _, said) = alone.blk(&args);
        assert_eq!(status, 1, "{args:?}: {said}");
        assert!(!alone.path("a").exists(), "{args:?}: left something behind");
        fs::write(alone.path("a"), "precious").unwrap();
        let (status, _, said) = alone.blk(&args);
        assert_eq!(status, 1, "{args:?}: {said}");
        assert_eq!(fs::read(alone.path("a")).unwrap(), b"precious", "{args:?}");
        fs::remove_file(alone.path("a")).unwrap();
    }
    // The same when the image is made by a conversion.
    fs::write(alone.path("a"), "precious").unwrap();
    fs::write(alone.path("source"), vec![1; 4096]).unwrap();
    let args = [
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "-o",
        "refcount_bits=3",
    ];
    let (status, _, said) = alone.blk(&[&args[..], &["source", "a"]].concat());
    assert_eq!(status, 1, "{said}");
    assert_eq!(fs::read(alone.path("a")).unwrap(), b"precious");
}

#[test]
fn an_image_that_comes_to_be_only_in_part_is_removed_unless_its_file_was_there() {
    let alone = Alone::new();
    let args = [
        "create",
        "-f",
        "qcow2",
        "-o",
        "data_file=missing/directory/d.raw",
        "a",
        "1M",
    ];
    let (status, _, said) = alone.blk(&args);
    assert_eq!(status, 1, "{said}");
    assert!(!alone.path("a").exists());
    fs::write(alone.path("a"), "there").unwrap();
    let (status, _, said) = alone.blk(&args);
    assert_eq!(status, 1, "{said}");
    assert!(alone.path("a").exists(), "a file that isn't ours to remove");
}

#[test]
fn a_compressed_conversion_into_an_encrypted_image_says_why_it_cant_be_and_changes_nothing() {
    let alone = Alone::new();
    fs::write(alone.path("source"), vec![1; 1 << 20]).unwrap();
    let secret = ["--object", "secret,id=s,data=letmein"];
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let made = [
        &["create"],
        &secret[..],
        &["-f", "qcow2", "-o", options, "a", "1M"],
    ]
    .concat();
    let (status, _, said) = alone.blk(&made);
    assert_eq!(status, 0, "{said}");
    let before = fs::read(alone.path("a")).unwrap();
    const REASON: &str = "Compression and encryption not supported at the same time";
    let target = "driver=qcow2,file.filename=a,encrypt.key-secret=s";
    for rest in [
        &["-n", "--target-image-opts", "source", target][..],
        &["-O", "qcow2", "-o", options, "source", "a"],
    ] {
        let args = [&["convert", "-c", "-f", "raw"], &secret[..], rest].concat();
        let (status, _, said) = alone.blk(&args);
        assert_eq!(status, 1, "{said}");
        assert!(said.contains(REASON), "{said}");
        assert!(fs::read(alone.path("a")).unwrap() == before, "{rest:?}");
    }
}
