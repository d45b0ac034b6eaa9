//! `dd` beside the installed qemu-img: same words, same exit status, same image afterwards.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = "
qemu-img create -q -f raw a.raw 10000
qemu-io -f raw -c 'write -P 7 0 4000' -c 'write -P 9 6000 4000' a.raw > /dev/null
qemu-img create -q -f qcow2 base.qcow2 3M
qemu-io -c 'write -P 1 0 3M' base.qcow2 > /dev/null
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 5M
qemu-io -c 'write -P 2 1M 100k' -c 'write -z 2M 300k' -c 'write -P 3 4M 512' top.qcow2 > /dev/null
";

#[test]
fn dd_copies_what_qemu_img_copies() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    for blocks in [
        "",
        "bs=1M",
        "bs=1000 count=3",
        "bs=1000 skip=3",
        "bs=1000 skip=3 count=2",
        "bs=1k skip=9",
        "bs=1k skip=10",
        "bs=1000 skip=10",
        "bs=1000 skip=11",
        "bs=512 count=0",
        "bs=2147483647 count=9223372036854775807",
        "bs=1.5k count=0x2",
        "bs=700 bs=800 count=1 count=5",
    ] {
        for (format, input) in [("raw", "a.raw"), ("qcow2", "top.qcow2")] {
            for output in ["raw", "qcow2", "vmdk"] {
                both.compare(&format!(
                    "dd -f {format} -O {output} {blocks} if={input} of=o.{output}"
                ));
                // An empty VMDK image can't be opened.
                if output != "vmdk"
                    || !["skip=", "count=0"]
                        .iter()
                        .any(|word| blocks.contains(word))
                {
                    both.same_content(output, &format!("o.{output}"));
                }
            }
        }
    }
    both.compare_all(
        "dd if=top.qcow2 of=o.raw bs=64k skip=15 count=3
        dd of=o.raw -f raw if=a.raw
        dd -U -f raw if=a.raw of=o.raw
        dd --image-opts if=driver=raw,file.filename=a.raw of=o.raw bs=2M
        dd -O qcow2 if=top.qcow2 of=o.raw bs=2M",
    );
    both.finish();
}

#[test]
fn dd_refuses_what_qemu_img_refuses_in_its_words() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "dd
        dd if=a.raw
        dd of=o
        dd foo
        dd foo=1 if=a.raw of=o
        dd -f raw seek=1 if=a.raw of=o
        dd -f raw if=a.raw of=o bs=0
        dd -f raw if=a.raw of=o bs=x
        dd -f raw if=a.raw of=o bs=
        dd -f raw if=a.raw of=o bs=-1
        dd -f raw if=a.raw of=o bs=1w
        dd -f raw if=a.raw of=o bs=2147483648
        dd -f raw if=a.raw of=o count=x
        dd -f raw if=a.raw of=o count=1k
        dd -f raw if=a.raw of=o count=-2
        dd -f raw if=a.raw of=o count=99999999999999999999
        dd -f raw if=a.raw of=o skip=1E
        dd if=nope of=o
        dd -f bogus if=a.raw of=o
        dd -f raw if=a.raw of=nowhere/o
        dd --image-opts -f raw if=a.raw of=o
        dd -x",
    );
    both.finish();
}

/// qemu-img empties it, says nothing, and exits with 0.
#[test]
fn dd_does_not_overwrite_its_own_input() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare("dd -f raw if=a.raw of=o.raw");
    let refused = both.ours_alone("dd -f raw if=a.raw of=a.raw");
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("a.raw") && said.contains("lock"), "{said}");
    both.finish();
}
