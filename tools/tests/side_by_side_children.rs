//! What `info` shows of images within images and of filters, beside the installed `qemu-img`.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
qemu-img create -q -f qcow2 a.qcow2 64M
qemu-io -f qcow2 -c 'write -P 1 0 1M' a.qcow2
qemu-img create -q -f qcow2 nest.qcow2 1M
qemu-io -f qcow2 -c 'write 0 1M' nest.qcow2
qemu-img create -q -f raw nest 4M
qemu-img create -q r.raw 1M
qemu-img create -q -f qcow2 s.qcow2 1M
qemu-img snapshot -c first s.qcow2
: > rules; truncate -s 1M log
";

fn each(both: &mut SideBySide, options: &[&str]) {
    for options in options {
        both.compare(&format!("info --image-opts {options}"));
        both.compare(&format!("info --output=json --image-opts {options}"));
    }
}

#[test]
fn an_image_in_an_image_is_shown_with_all_that_it_says_of_itself() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    each(
        &mut both,
        &[
            "driver=raw,file.driver=qcow2,file.file.filename=a.qcow2",
            "driver=raw,file.driver=qcow2,file.file.filename=s.qcow2",
            "driver=raw,offset=64k,file.driver=qcow2,file.file.filename=a.qcow2",
            "driver=raw,file.driver=raw,file.file.filename=r.raw",
            "driver=raw,file.driver=raw,file.offset=64k,file.file.filename=r.raw",
            "driver=raw,offset=64k,file.driver=raw,file.offset=64k,file.file.filename=r.raw",
            "driver=raw,offset=64k,size=1M,file.filename=nest",
            "driver=raw,size=1M,file.filename=nest",
            "driver=raw,size=10M,file.filename=nest",
            "driver=qcow2,file.driver=raw,file.file.filename=a.qcow2",
            "driver=qcow2,file.driver=raw,file.size=1M,file.file.filename=a.qcow2",
            "driver=qcow2,file.driver=qcow2,file.file.filename=nest.qcow2",
            "driver=raw,file.driver=null-co,file.size=1M",
            "driver=null-co",
            "driver=null-co,size=1M,read-zeroes=on",
            "driver=null-aio,size=1M,read-zeroes=on",
        ],
    );
    for json in [
        r#"{"driver":"raw","file":{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}}"#,
        r#"{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}"#,
    ] {
        both.compare(&format!("info json:{json}"));
    }
    both.compare_all(
        "info null-aio://
        info null-co://
        info -f raw null-co://
        info -f raw --output=json null-co://",
    );
    both.finish();
}

#[test]
fn filters_are_called_by_the_names_that_open_them() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    each(
        &mut both,
        &[
            "driver=blkdebug,image.filename=a.qcow2",
            "driver=blkdebug,image.driver=qcow2,image.file.filename=a.qcow2",
            "driver=blkdebug,image.driver=raw,image.offset=512,image.file.filename=r.raw",
            "driver=blkdebug,image.filename=r.raw,config=rules",
            "driver=blkdebug,image.filename=r.raw,align=512",
            "driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2",
            "driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2,file.align=4096",
            "driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2,file.inject-error.0.event=l2_load",
            "driver=raw,file.driver=blkdebug,file.image.filename=r.raw",
            "driver=raw,file.driver=blkdebug,file.config=rules,file.image.filename=r.raw",
            "driver=raw,offset=64k,file.driver=blkdebug,file.image.filename=r.raw",
            "driver=blkverify,raw.filename=r.raw,test.driver=raw,test.file.filename=r.raw",
            "driver=blkverify,raw.filename=r.raw,test.driver=raw,test.offset=0,test.file.filename=r.raw",
            "driver=blklogwrites,file.filename=r.raw,log.filename=log",
            "driver=copy-on-read,file.driver=qcow2,file.file.filename=a.qcow2",
            "driver=copy-on-read,file.filename=a.qcow2",
            "driver=blkdebug",
            "driver=blkdebug,image=nope",
            "driver=copy-on-read",
            "driver=blkverify",
            "driver=blkdebug,image.filename=a.qcow2,backing.driver=raw",
            "driver=blkdebug,image.filename=a.qcow2,backing=",
        ],
    );
    for name in [
        "blkdebug::a.qcow2",
        "-f qcow2 blkdebug::a.qcow2",
        "-f raw blkdebug::a.qcow2",
        "-f blkdebug blkdebug::a.qcow2",
        "blkdebug:rules:a.qcow2",
        "-f raw blkverify:r.raw:r.raw",
        "-f blkverify blkverify:r.raw:r.raw",
    ] {
        both.compare(&format!("info {name}"));
        both.compare(&format!("info --output=json {name}"));
    }
    both.compare_all(
        "map --output=json blkdebug::a.qcow2
        map --image-opts driver=copy-on-read,file.driver=qcow2,file.file.filename=a.qcow2
        check -f qcow2 blkdebug::a.qcow2
        check --image-opts driver=copy-on-read,file.driver=qcow2,file.file.filename=a.qcow2
        check --output=json --image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2",
    );
    both.finish();
}

/// Images c000 to c513, each but the first over the one before it.
const CHAIN: &str = r"
qemu-img create -q -f qcow2 c000.qcow2 1M
qemu-io -f qcow2 -c 'write -P 1 0 256k' c000.qcow2
qemu-img create -q -f qcow2 -b c000.qcow2 -F qcow2 t.qcow2
at=$(grep -abo c000.qcow2 t.qcow2 | cut -d: -f1)
for n in $(seq 1 513); do
    name=c$(printf %03d $n).qcow2; cp t.qcow2 $name
    printf c%03d $((n - 1)) | dd status=none of=$name bs=1 seek=$at conv=notrunc
done
qemu-io -f qcow2 -c 'write -P 2 128k 64k' c100.qcow2
qemu-io -f qcow2 -c 'write -P 3 512k 64k' c299.qcow2
";

#[test]
fn a_chain_of_three_hundred_images_is_used_as_by_qemu_img_and_one_that_is_too_long_is_called_so() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(CHAIN);
    both.compare_all(
        "info --backing-chain c299.qcow2
        map --output=json c299.qcow2
        convert -O raw c299.qcow2 whole.raw
        commit -b c260.qcow2 c299.qcow2
        info --backing-chain --output=json c260.qcow2",
    );
    both.same_content("raw", "whole.raw");
    both.same_content("qcow2", "c260.qcow2");
    let all = both.ours_alone("info --backing-chain c512.qcow2");
    assert!(all.status.success(), "{all:?}");
    for line in ["info --backing-chain c513.qcow2", "map c513.qcow2"] {
        let refused = both.ours_alone(line);
        assert_eq!(refused.status.code(), Some(1), "{line}");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(
            said.contains("The backing chain is deeper than 512 images"),
            "{line}: {said}"
        );
    }
    both.finish();
}
