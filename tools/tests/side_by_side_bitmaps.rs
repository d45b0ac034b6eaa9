//! `blk bitmap`, `convert --bitmaps` and what `info` says of bitmaps, beside the installed `qemu-img`: same output, same
//! messages, same exit status, same images.

mod support;

use support::{Alone, SideBySide, qemu_is_installed};

const IMAGES: &str = r"
qemu-img create -q -f qcow2 a.qcow2 10M
qemu-img create -q -f qcow2 b.qcow2 20M
qemu-img create -q -f qcow2 c.qcow2 10M
qemu-img bitmap --add -g 512 c.qcow2 fine
qemu-img bitmap --add --disable c.qcow2 off
qemu-io -f qcow2 -c 'write -P 1 1M 64k' -c 'write -z 3M 1k' -c 'discard 5M 1M' c.qcow2
qemu-img create -q -f qcow2 -o compat=0.10 v2.qcow2 1M
qemu-img create -q -f raw r.raw 1M
qemu-img create -q -f raw ten.raw 10M
cp c.qcow2 used.qcow2
printf '\003' | dd of=used.qcow2 bs=1 conv=notrunc seek=$(($(qemu-img info --output=json used.qcow2 >/dev/null; \
    od -An -tu8 --endian=big -j528 -N8 used.qcow2)+15))
cp c.qcow2 stale.qcow2
printf '\000' | dd of=stale.qcow2 bs=1 conv=notrunc seek=95
qemu-img create -q -f qcow2 -b c.qcow2 -F qcow2 over.qcow2
";

#[test]
fn bitmap_says_and_does_what_qemu_img_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    let long = "x".repeat(1023);
    both.compare_all(&format!(
        "bitmap --add a.qcow2 b0
        bitmap --add a.qcow2 b0
        bitmap --add -g 1000 a.qcow2 b1
        bitmap --add -g 256 a.qcow2 b1
        bitmap --add -g 512 a.qcow2 b1
        bitmap --add -g 4G a.qcow2 b2
        bitmap --add -g 2G a.qcow2 b2
        bitmap --add a.qcow2 ''
        bitmap --add a.qcow2 {long}
        bitmap --remove a.qcow2 {long}
        bitmap --remove a.qcow2 nope
        bitmap --clear a.qcow2 nope
        bitmap --enable a.qcow2 nope
        bitmap --disable a.qcow2 nope
        bitmap --merge nope a.qcow2 b0
        bitmap --merge b0 a.qcow2 nope
        bitmap --merge b0 -b nofile a.qcow2 b0
        bitmap --add b.qcow2 c0
        bitmap --merge c0 -b b.qcow2 -F qcow2 a.qcow2 b0
        bitmap --merge fine -b c.qcow2 -F qcow2 a.qcow2 b0
        bitmap --merge fine -b c.qcow2 a.qcow2 b1
        bitmap --merge b1 a.qcow2 b0
        bitmap --merge b0 a.qcow2 b0
        bitmap a.qcow2 b0
        bitmap --add a.qcow2
        bitmap --add
        bitmap --add -F qcow2 a.qcow2 zz
        bitmap --add -b b.qcow2 a.qcow2 zz
        bitmap --clear -g 512 a.qcow2 zz
        bitmap --add --disable a.qcow2 dd
        bitmap --disable --disable --enable --enable a.qcow2 dd
        bitmap --add --add a.qcow2 ee
        bitmap --add a.qcow2 ff gg
        bitmap --image-opts --add driver=qcow2,file.filename=a.qcow2 io
        bitmap --image-opts -f qcow2 --add driver=qcow2,file.filename=a.qcow2 io
        bitmap --merge io --add a.qcow2 newone
        bitmap --add --merge io --merge b0 a.qcow2 newone
        bitmap -g 1M --add a.qcow2 one
        bitmap -g x --add a.qcow2 two
        bitmap -f raw --add nofile x
        bitmap --bogus a.qcow2 x
        bitmap --add --merge
        bitmap --add over.qcow2 over
        info --output=json a.qcow2
        info a.qcow2
        info over.qcow2
        bitmap --add --remove --add --clear a.qcow2 last
        bitmap --remove a.qcow2 b1
        info --output=json a.qcow2
        bitmap --clear used.qcow2 fine
        bitmap --enable used.qcow2 fine
        bitmap --disable used.qcow2 fine
        bitmap --merge off used.qcow2 fine
        bitmap --merge fine used.qcow2 off
        resize used.qcow2 20M
        info --output=json used.qcow2
        bitmap --remove used.qcow2 fine
        info --output=json used.qcow2
        bitmap --remove used.qcow2 off
        info --output=json used.qcow2
        resize c.qcow2 20M
        info --output=json c.qcow2
        resize --shrink c.qcow2 5M
        info --output=json c.qcow2
        "
    ));
    // Their messages have made-up node names.
    both.silently("bitmap --add v2.qcow2 x");
    both.silently("bitmap --add -f raw r.raw x");
    // Ours logs what theirs prints.
    both.silently("info stale.qcow2");
    both.silently("bitmap --add stale.qcow2 x");
    both.compare("info --output=json stale.qcow2");
    for name in ["a.qcow2", "b.qcow2", "c.qcow2", "used.qcow2", "over.qcow2"] {
        both.same_content("qcow2", name);
        both.same_bitmaps(name);
    }
    both.finish();
}

#[test]
fn convert_copies_bitmaps_as_qemu_img_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "convert --bitmaps -O qcow2 c.qcow2 o.qcow2
        info --output=json o.qcow2
        convert --bitmaps -O qcow2 -o cluster_size=4k c.qcow2 small.qcow2
        info --output=json small.qcow2
        convert --bitmaps -O qcow2 used.qcow2 x.qcow2
        convert --bitmaps --skip-broken-bitmaps -O qcow2 used.qcow2 skipped.qcow2
        info --output=json skipped.qcow2
        convert --skip-broken-bitmaps -O qcow2 c.qcow2 x.qcow2
        convert --bitmaps -O qcow2 c.qcow2 c.qcow2 x.qcow2
        convert --bitmaps -O qcow2 -f raw r.raw x.qcow2
        convert --bitmaps -O raw c.qcow2 x.raw
        convert --bitmaps -n -O raw c.qcow2 ten.raw
        convert --bitmaps -O vmdk c.qcow2 x.vmdk
        convert --bitmaps -O qcow2 -o compat=0.10 c.qcow2 x.qcow2
        convert --bitmaps -n -O qcow2 c.qcow2 a.qcow2
        convert --bitmaps -n -O qcow2 c.qcow2 a.qcow2
        info --output=json a.qcow2
        convert --bitmaps -n -O qcow2 c.qcow2 b.qcow2
        convert --bitmaps -O qcow2 b.qcow2 none.qcow2
        info --output=json none.qcow2
        ",
    );
    for name in ["o.qcow2", "small.qcow2", "skipped.qcow2", "a.qcow2"] {
        both.same_content("qcow2", name);
        both.same_bitmaps(name);
    }
    both.finish();
}

#[test]
fn a_program_that_is_killed_leaves_bitmaps_in_use() {
    if !qemu_is_installed() {
        return;
    }
    let blk = Alone::new();
    blk.blk(&["create", "-q", "-f", "qcow2", "a.qcow2", "10M"]);
    let (code, _, err) = blk.blk(&["bitmap", "--add", "a.qcow2", "b"]);
    assert_eq!(code, 0, "{err}");
    let info = || {
        let output = std::process::Command::new("qemu-img")
            .args(["info", "-U", "--output=json"])
            .arg(blk.path("a.qcow2"))
            .output()
            .unwrap();
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let flags = || info()["format-specific"]["data"]["bitmaps"][0]["flags"].clone();
    assert_eq!(flags(), serde_json::json!(["auto"]));
    let mut program = blk
        .command(&[
            "io",
            "-f",
            "qcow2",
            "-c",
            "write 0 64k",
            "-c",
            "sleep 600000",
            "a.qcow2",
        ])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let in_use = serde_json::json!(["in-use", "auto"]);
    let since = std::time::Instant::now();
    while flags() != in_use && since.elapsed().as_secs() < 60 {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    program.kill().unwrap();
    program.wait().unwrap();
    assert_eq!(flags(), in_use);
    let (code, _, err) = blk.blk(&["bitmap", "--clear", "a.qcow2", "b"]);
    assert_eq!(code, 1);
    assert!(
        err.contains("Bitmap 'b' is inconsistent and cannot be used"),
        "{err}"
    );
    let (code, _, err) = blk.blk(&["bitmap", "--remove", "a.qcow2", "b"]);
    assert_eq!(code, 0, "{err}");
    assert!(info()["format-specific"]["data"]["bitmaps"].is_null());
}

#[test]
fn measure_counts_bitmaps_as_qemu_img_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(
        r"
qemu-img create -q -f qcow2 a.qcow2 100M
qemu-img bitmap --add a.qcow2 b0
qemu-img bitmap --add -g 512 a.qcow2 fine-and-with-a-longer-name
qemu-img snapshot -c snap a.qcow2
cp a.qcow2 mixed.qcow2
qemu-io -c 'write 0 64k' -c 'sigraise 9' mixed.qcow2 || true
qemu-img bitmap --add -g 1M mixed.qcow2 good
qemu-img create -q -f qcow2 -o compat=0.10 v2.qcow2 1M
",
    );
    both.compare_all(
        "measure -O qcow2 a.qcow2
        measure -O qcow2 --output=json a.qcow2
        measure -O qcow2 -o cluster_size=512 a.qcow2
        measure -O qcow2 -o cluster_size=2M --output=json a.qcow2
        measure -O qcow2 -o compat=0.10 a.qcow2
        measure -O qcow2 -l snap a.qcow2
        measure -O raw a.qcow2
        measure -O qcow2 mixed.qcow2
        measure -O qcow2 v2.qcow2
        measure -O qcow2 -o encrypt.format=aes --size 1M
        measure -O qcow2 -o encrypt.format=luks --size 1M",
    );
    both.finish();
}

#[test]
fn a_dirty_last_granule_that_reaches_beyond_the_disk_is_merged_and_copied() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(
        "for size in 1049088 8M 100M; do
            qemu-img create -q -f qcow2 s$size.qcow2 $size
            for g in 512 64k 16M 2G; do qemu-img bitmap --add -g $g s$size.qcow2 b$g; done
            end=$(qemu-img info --output=json s$size.qcow2 | sed -n 's/.*\"virtual-size\": \\([0-9]*\\).*/\\1/p' | head -1)
            qemu-io -c \"write -P 1 $((end - 512)) 512\" s$size.qcow2 > /dev/null
            for g in 512 64k 16M 2G; do qemu-img bitmap --add --disable -g $g s$size.qcow2 n$g; done
        done",
    );
    for size in ["1049088", "8M", "100M"] {
        let name = format!("s{size}.qcow2");
        both.compare(&format!("convert --bitmaps -O qcow2 {name} c{name}"));
        both.same_bitmaps(&format!("c{name}"));
        for (from, to) in [("512", "2G"), ("2G", "512"), ("64k", "16M"), ("16M", "64k")] {
            both.compare(&format!("bitmap --merge b{from} {name} n{to}"));
        }
        both.same_bitmaps(&name);
    }
    both.finish();
}
