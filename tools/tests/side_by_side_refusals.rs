//! Wrong options, names and states: what commands that change or look at images say then, beside the installed `qemu-img`.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
qemu-img create -q -f qcow2 a.qcow2 64M
qemu-io -f qcow2 -c 'write -P 1 0 1M' a.qcow2
qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2
qemu-img create -q -f qcow2 -b o.qcow2 -F qcow2 o2.qcow2
qemu-img create -q -f qcow2 s.qcow2 64M
qemu-img snapshot -c first s.qcow2
qemu-img create -q -f qcow2 b.qcow2 64M
qemu-img bitmap --add b.qcow2 b0
qemu-img create -q -f qcow2 -o compat=v2 v2.qcow2 64M
qemu-img create -q r.raw 1M
qemu-img create -q -f vmdk v.vmdk 1M
truncate -s 1000 odd.raw
";

fn both_say_the_same_of(lines: &str) {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::made_twice(IMAGES);
    both.compare_all(lines);
    both.finish();
}

#[test]
fn bitmap_refuses_what_qemu_img_refuses() {
    both_say_the_same_of(
        r"
        bitmap
        bitmap b.qcow2
        bitmap b.qcow2 b0
        bitmap --add
        bitmap --add b.qcow2
        bitmap --add b.qcow2 b0
        bitmap --add b.qcow2 b1 extra
        bitmap --add b.qcow2 ''
        bitmap --add -g 3 b.qcow2 b1
        bitmap --add -g 0 b.qcow2 b1
        bitmap --add -g 256 b.qcow2 b1
        bitmap --add -g 4G b.qcow2 b1
        bitmap --add -g foo b.qcow2 b1
        bitmap --clear -g 64k b.qcow2 b0
        bitmap --add -g 64k -g 128k b.qcow2 b9
        bitmap --remove b.qcow2 nope
        bitmap --clear b.qcow2 nope
        bitmap --enable b.qcow2 nope
        bitmap --disable b.qcow2 nope
        bitmap --merge nope b.qcow2 b0
        bitmap --merge b0 b.qcow2 nope
        bitmap --merge b0 b.qcow2 b0
        bitmap --merge b0 -b nope b.qcow2 b0
        bitmap --merge b0 -b nope -F qcow2 b.qcow2 b0
        bitmap --merge b0 -b r.raw -F raw b.qcow2 b0
        bitmap --merge b0 -F qcow2 b.qcow2 b0
        bitmap --add -b b.qcow2 b.qcow2 b2
        bitmap --add -b b.qcow2 -F qcow2 b.qcow2 b2
        bitmap --add --remove b.qcow2 b3
        bitmap --remove --add b.qcow2 b3
        bitmap --add --add b.qcow2 b4
        bitmap --enable --disable b.qcow2 b0
        bitmap --add -f raw r.raw b0
        bitmap --add -f vmdk v.vmdk b0
        bitmap --add v2.qcow2 b0
        bitmap --add nope b0
        bitmap --add -f bogus b.qcow2 b0
        bitmap --add --image-opts driver=qcow2,file.filename=b.qcow2 b5
        bitmap --add --image-opts -f qcow2 b.qcow2 b5
        bitmap --bogus b.qcow2 b5
        bitmap --merge
        bitmap -g
        bitmap --clear -g 64k
        bitmap --clear -b x
        bitmap --add -F raw
        bitmap --clear -g 64k -F raw b.qcow2 x
        bitmap --add -b x -F raw b.qcow2 x
        bitmap -g 64k
        bitmap --add -g 0x b.qcow2 x
        bitmap --add -g 9E b.qcow2 x
        ",
    );
}

#[test]
fn snapshot_refuses_what_qemu_img_refuses() {
    both_say_the_same_of(
        r"
        snapshot
        snapshot s.qcow2
        snapshot -l
        snapshot -l nope
        snapshot -l r.raw
        snapshot -l -f raw r.raw
        snapshot -c x -f raw r.raw
        snapshot -c x -f vmdk v.vmdk
        snapshot -a nope s.qcow2
        snapshot -d nope s.qcow2
        snapshot -a 1 s.qcow2
        snapshot -d 99 s.qcow2
        snapshot -c first s.qcow2
        snapshot -l -c x s.qcow2
        snapshot -a x -d y s.qcow2
        snapshot -l -l s.qcow2
        snapshot -c x -c y s.qcow2
        snapshot -l s.qcow2 extra
        snapshot -c
        snapshot -c '' s.qcow2
        snapshot -z s.qcow2
        snapshot -U -l s.qcow2
        snapshot -U -c x s.qcow2
        snapshot -a -f raw r.raw
        snapshot -a x -f raw r.raw
        snapshot -d x -f raw r.raw
        snapshot --image-opts -l driver=qcow2,file.filename=a.qcow2
        snapshot --image-opts -f qcow2 -l a.qcow2
        snapshot -q -l s.qcow2
        snapshot -q -d nope s.qcow2
        ",
    );
}

#[test]
fn resize_refuses_what_qemu_img_refuses() {
    both_say_the_same_of(
        r"
        resize
        resize a.qcow2
        resize a.qcow2 foo
        resize a.qcow2 +foo
        resize a.qcow2 -- -1G
        resize a.qcow2 -1G
        resize a.qcow2 0
        resize a.qcow2 +0
        resize a.qcow2 1M
        resize --shrink a.qcow2 1000
        resize a.qcow2 64M
        resize a.qcow2 +1
        resize a.qcow2 128M extra
        resize nope 1M
        resize r.raw 2M
        resize -f raw r.raw +1000
        resize -f raw r.raw 1000
        resize -f raw --shrink r.raw 1000
        resize -f raw --shrink r.raw -- -100
        resize -f vmdk v.vmdk 2M
        resize --preallocation=foo a.qcow2 200M
        resize --preallocation=full --shrink a.qcow2 1M
        resize --preallocation=metadata -f raw r.raw 4M
        resize --preallocation= a.qcow2 200M
        resize -f bogus a.qcow2 1M
        resize -q a.qcow2 65M
        resize --image-opts driver=qcow2,file.filename=a.qcow2 66M
        resize s.qcow2 128M
        resize --shrink s.qcow2 32M
        resize b.qcow2 128M
        resize --shrink b.qcow2 32M
        resize --shrink a.qcow2 -2T
        resize --shrink -f qcow2 a.qcow2 --object bogus
        resize -1G a.qcow2
        resize +1G
        resize v2.qcow2 128M
        ",
    );
}

#[test]
fn rebase_and_commit_refuse_what_qemu_img_refuses() {
    both_say_the_same_of(
        r"
        rebase
        rebase a.qcow2
        rebase -b
        rebase -b nope o.qcow2
        rebase -b nope -F qcow2 o.qcow2
        rebase -u -b nope o.qcow2
        rebase -u -b nope -F qcow2 nope
        rebase -u -b nope -F bogus o2.qcow2
        rebase -b a.qcow2 -F bogus o2.qcow2
        rebase -F qcow2 o.qcow2
        rebase -u -F qcow2 o.qcow2
        rebase -b a.qcow2 o.qcow2
        rebase -b a.qcow2 -F qcow2 o.qcow2
        rebase -b '' o2.qcow2
        rebase -b a.qcow2 -F qcow2 -f raw r.raw
        rebase -u -b a.qcow2 -F qcow2 -f raw r.raw
        rebase -b o.qcow2 -F qcow2 o.qcow2
        rebase -b o2.qcow2 -F qcow2 o.qcow2
        rebase -b r.raw -F raw a.qcow2
        rebase -t bogus -b a.qcow2 -F qcow2 o.qcow2
        rebase -T bogus -b a.qcow2 -F qcow2 o.qcow2
        rebase -b a.qcow2 -F qcow2 o.qcow2 extra
        rebase -c -b '' -F qcow2 v2.qcow2
        rebase -c -u -b a.qcow2 -F qcow2 o.qcow2
        rebase --image-opts -b a.qcow2 -F qcow2 driver=qcow2,file.filename=o.qcow2
        commit
        commit nope
        commit a.qcow2
        commit r.raw
        commit -f raw r.raw
        commit -b nope o.qcow2
        commit -b a.qcow2 o.qcow2
        commit -b o2.qcow2 o2.qcow2
        commit -b '' o2.qcow2
        commit -d o.qcow2
        commit -t bogus o.qcow2
        commit -r foo o.qcow2
        commit -r -1 o.qcow2
        commit -r 0 o.qcow2
        commit -r 1M o.qcow2
        commit o.qcow2 extra
        commit -q o.qcow2
        commit -z o.qcow2
        commit -f bogus o.qcow2
        commit --image-opts driver=qcow2,file.filename=o.qcow2
        ",
    );
}

#[test]
fn compare_check_info_and_map_refuse_what_qemu_img_refuses() {
    both_say_the_same_of(
        r"
        compare
        compare a.qcow2
        compare a.qcow2 nope
        compare nope a.qcow2
        compare a.qcow2 o.qcow2 extra
        compare -f bogus a.qcow2 o.qcow2
        compare -F bogus a.qcow2 o.qcow2
        compare -f raw a.qcow2 o.qcow2
        compare -s a.qcow2 o.qcow2
        compare -T bogus a.qcow2 o.qcow2
        compare -q a.qcow2 r.raw
        compare a.qcow2 r.raw
        compare -s a.qcow2 r.raw
        compare --image-opts driver=qcow2,file.filename=a.qcow2 driver=raw,file.filename=r.raw
        compare --image-opts -f qcow2 a.qcow2 r.raw
        compare odd.raw odd.raw
        compare -f raw -F raw odd.raw r.raw
        check
        check nope
        check --output=json nope
        check --output=json a.qcow2
        check --output=foo a.qcow2
        check --output=json r.raw
        check --output=json -f raw r.raw
        check -f raw r.raw
        check -r
        check -r foo a.qcow2
        check -r leaks --output=json a.qcow2
        check -r all -f raw r.raw
        check -T bogus a.qcow2
        check a.qcow2 extra
        check -f bogus a.qcow2
        check --output=json v.vmdk
        check -r leaks v.vmdk
        check -U -r leaks a.qcow2
        check -q a.qcow2
        check --output=json -q a.qcow2
        check --output=json o2.qcow2
        check --output=json s.qcow2
        check --output=json b.qcow2
        check --image-opts -f qcow2 a.qcow2
        info o.qcow2
        info
        info --output=foo a.qcow2
        info a.qcow2 extra
        info -f bogus a.qcow2
        map
        map --output=foo a.qcow2
        map -s foo a.qcow2
        map -s 100G a.qcow2
        map -l -1 a.qcow2
        map -s -1 a.qcow2
        map a.qcow2 extra
        map -s 1M -l 0 a.qcow2
        map --output=json -s 64M a.qcow2
        map --output=json -s 63M -l 4G a.qcow2
        ",
    );
}
