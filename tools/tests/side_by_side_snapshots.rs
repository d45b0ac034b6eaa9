//! Internal snapshots in the commands of `qemu-img`, beside the installed `qemu-img`.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
qemu-img create -q -f qcow2 a.qcow2 8M
qemu-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 4M 128k' -c 'write -z 6M 1M' a.qcow2
qemu-img snapshot -c one a.qcow2
qemu-io -f qcow2 -c 'write -P 3 512k 1M' a.qcow2
qemu-img snapshot -c 'a rather long name of a snapshot' a.qcow2
qemu-io -f qcow2 -c 'write -P 4 0 8M' a.qcow2
qemu-img snapshot -c 1 a.qcow2
qemu-img create -q -f qcow2 -F qcow2 -b a.qcow2 o.qcow2
qemu-img snapshot -c over o.qcow2
qemu-img create -q -f qcow2 n.qcow2 1M
qemu-img create -q r.raw 1M
cp a.qcow2 i.qcow2
printf '\377\377\377\377\377\377\377\377' | dd of=i.qcow2 bs=1 seek=$(($(od -A n -t u8 --endian=big -j 64 -N 8 i.qcow2) + 56)) conv=notrunc status=none
printf '\000\000\001\005\022\064\126\170' | dd of=i.qcow2 bs=1 seek=$(($(od -A n -t u8 --endian=big -j 64 -N 8 i.qcow2) + 24)) conv=notrunc status=none
printf '\000\000\000\005\022\064\126\170' | dd of=i.qcow2 bs=1 seek=$(($(od -A n -t u8 --endian=big -j 64 -N 8 i.qcow2) + 40)) conv=notrunc status=none
";

#[test]
fn snapshots_are_listed_as_qemu_img_lists_them() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "snapshot -l a.qcow2
        snapshot a.qcow2
        snapshot -q -l a.qcow2
        snapshot -U -l a.qcow2
        snapshot -l i.qcow2
        snapshot -l o.qcow2
        snapshot -l n.qcow2
        snapshot -f qcow2 -l a.qcow2
        snapshot -f raw -l r.raw
        snapshot --image-opts -l driver=qcow2,file.filename=a.qcow2
        snapshot -l missing.qcow2
        snapshot
        snapshot -l a.qcow2 b
        snapshot -c x -d y a.qcow2
        snapshot -l -l a.qcow2
        snapshot -c x -l a.qcow2
        info a.qcow2
        info --output=json a.qcow2
        info i.qcow2
        info --output=json i.qcow2
        info o.qcow2
        info --output=json o.qcow2
        info --backing-chain o.qcow2
        ",
    );
    both.finish();
}

#[test]
fn a_snapshot_is_converted_and_measured_as_by_qemu_img() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    for (number, name) in ["one", "1", "2", "3", "snapshot.name=1", "snapshot.id=1"]
        .iter()
        .enumerate()
    {
        let target = format!("c{number}.qcow2");
        both.compare(&format!("convert -l {name} -O qcow2 a.qcow2 {target}"));
        both.same_content("qcow2", &target);
        both.compare(&format!("measure -l {name} -O qcow2 a.qcow2"));
    }
    both.compare("convert -l snapshot.id=3,snapshot.name=1 -O raw a.qcow2 c.raw");
    both.same_content("raw", "c.raw");
    both.compare("convert -l over -O raw o.qcow2 o.raw");
    both.same_content("raw", "o.raw");
    both.compare_all(
        "convert -l snapshot.id=1,snapshot.name=1 -O raw a.qcow2 x.raw
        convert -l nope -O raw a.qcow2 x.raw
        convert -l snapshot.foo=1 -O raw a.qcow2 x.raw
        convert -l 1 -O raw a.qcow2 a.qcow2 x.raw
        convert -l 1 -f raw -O raw r.raw x.raw
        convert -l 1 -O raw n.qcow2 x.raw
        measure -l nope -O raw a.qcow2
        measure -l 1 --size 1M -O raw
        ",
    );
    both.finish();
}

#[test]
fn snapshots_are_taken_applied_and_deleted_as_by_qemu_img() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(&format!(
        "{IMAGES}
qemu-img create -q -f qcow2 -o refcount_bits=1 narrow.qcow2 1M
qemu-io -f qcow2 -c 'write 0 64k' narrow.qcow2
qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=4k v2.qcow2 2M
qemu-io -f qcow2 -c 'write -P 5 0 1M' v2.qcow2
qemu-img create -q -f vmdk v.vmdk 1M
"
    ));
    both.compare_all(
        "snapshot -a 1 a.qcow2
        snapshot -d 1 a.qcow2
        snapshot -a nope a.qcow2
        snapshot -d nope a.qcow2
        snapshot -c x narrow.qcow2
        snapshot -f raw -c x r.raw
        snapshot -f raw -a x r.raw
        snapshot -f raw -d x r.raw
        snapshot -c x v.vmdk
        snapshot -a x v.vmdk
        snapshot -d x v.vmdk
        snapshot -U -c x a.qcow2
        snapshot -q -c new a.qcow2
        snapshot -f qcow2 -c newer a.qcow2
        snapshot -c '' a.qcow2
        snapshot -c v2 v2.qcow2
        snapshot -d v2 v2.qcow2
        snapshot -c v2 v2.qcow2
        snapshot -a v2 v2.qcow2
        snapshot -a 3 a.qcow2
        snapshot -d one a.qcow2
        ",
    );
    for name in ["a.qcow2", "v2.qcow2", "narrow.qcow2"] {
        both.same_content("qcow2", name);
    }
    // The dates differ: other than that, the lists are the same.
    both.silently("snapshot -l a.qcow2");
    both.compare("convert -l new -O raw a.qcow2 new.raw");
    both.same_content("raw", "new.raw");
    both.compare("convert -l v2 -O raw v2.qcow2 v2.raw");
    both.same_content("raw", "v2.raw");
    both.finish();
}
