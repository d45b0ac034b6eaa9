//! The commands of `qemu-img` that copy content (convert, commit, rebase), beside the installed `qemu-img`: same
//! messages, same exit status, same content, clean images.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
qemu-img create -q -f qcow2 a.qcow2 16M
qemu-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 4M 128k' -c 'write -z 8M 1M' a.qcow2
qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2
qemu-io -f qcow2 -c 'write -P 3 512k 64k' -c 'write -z -u 4M 64k' o.qcow2
qemu-img create -q -f qcow2 -b o.qcow2 -F qcow2 o2.qcow2 20M
qemu-io -f qcow2 -c 'write -P 4 18M 64k' o2.qcow2
qemu-img convert -f qcow2 -O raw a.qcow2 r.raw
cp --sparse=always r.raw r3.raw; printf x | dd of=r3.raw bs=1 seek=5000000 conv=notrunc
: > e.raw; truncate -s 1000 f.raw
qemu-img create -q -f qcow2 small.qcow2 1M
qemu-img convert -f qcow2 -O qcow2 o2.qcow2 full.qcow2
truncate -s 20M full.raw
";

#[test]
fn convert_copies_what_qemu_img_copies() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "convert a.qcow2 t1.raw
        convert -O qcow2 a.qcow2 t1.qcow2
        convert -O qcow2 o2.qcow2 t2.qcow2
        convert -c -O qcow2 o2.qcow2 t3.qcow2
        convert -c -O qcow2 -o cluster_size=4k r3.raw t4.qcow2
        convert -O qcow2 -o cluster_size=512,compat=0.10 a.qcow2 t5.qcow2
        convert -O qcow2 -o cluster_size=2M,preallocation=metadata a.qcow2 t6.qcow2
        convert -O qcow2 -o size=80M a.qcow2 larger.qcow2
        info --output=json larger.qcow2
        convert -O qcow2 -o size=1M a.qcow2 smaller.qcow2
        info --output=json smaller.qcow2
        convert -O raw -S 0 a.qcow2 t2.raw
        convert -O qcow2 -S 0 a.qcow2 t7.qcow2
        convert -O raw a.qcow2 r3.raw t3.raw
        convert -O qcow2 -c a.qcow2 r3.raw t8.qcow2
        convert -O raw -C a.qcow2 t4.raw
        convert -O qcow2 -B a.qcow2 -F qcow2 o.qcow2 t9.qcow2
        convert -n -O qcow2 o2.qcow2 full.qcow2
        convert -n -O raw o2.qcow2 full.raw
        convert -n --target-image-opts a.qcow2 driver=qcow2,file.filename=t1.qcow2
        convert --salvage -O qcow2 a.qcow2 t10.qcow2
        convert --image-opts driver=qcow2,file.filename=a.qcow2 t5.raw
        convert -O qcow2 -W -m 16 -r 100M -q -U a.qcow2 t11.qcow2
        convert -O qcow2 -t none -T none a.qcow2 t12.qcow2
        convert -f raw -O qcow2 a.qcow2 t13.qcow2
        convert -qp -Oqcow2 a.qcow2 t14.qcow2
        convert -O qcow2 f.raw t15.qcow2
        convert -O qcow2 e.raw t16.qcow2
        convert -O vmdk a.qcow2 t1.vmdk
        convert -O raw t1.vmdk t6.raw",
    );
    for at in 1..=16 {
        both.same_content("qcow2", &format!("t{at}.qcow2"));
    }
    for at in 1..=6 {
        both.same_content("raw", &format!("t{at}.raw"));
    }
    both.same_content("qcow2", "full.qcow2");
    both.same_content("raw", "full.raw");
    both.same_content("vmdk", "t1.vmdk");
    for at in [1, 2, 3, 5, 8, 9, 15] {
        both.compare(&format!("map --output=json t{at}.qcow2"));
    }
    both.finish();
}

#[test]
fn convert_refuses_what_qemu_img_refuses() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "convert a.qcow2
        convert
        convert -O bogus a.qcow2 x
        convert -f bogus a.qcow2 x
        convert -O qcow2 nope x
        convert -O qcow2 a.qcow2 /nonexistent/x
        convert -O qcow2 -o bogus=1 a.qcow2 x
        convert -O qcow2 -o cluster_size=3 a.qcow2 x
        convert -O raw -c a.qcow2 x
        convert -O qcow2 -S foo a.qcow2 x
        convert -O qcow2 -S 1 a.qcow2 x
        convert -O qcow2 -S 513 a.qcow2 x
        convert -O qcow2 -m 0 a.qcow2 x
        convert -O qcow2 -m 17 a.qcow2 x
        convert -O qcow2 -m foo a.qcow2 x
        convert -O qcow2 -r foo a.qcow2 x
        convert -O qcow2 -t foo a.qcow2 x
        convert -O qcow2 -T foo a.qcow2 x
        convert -O qcow2 -n a.qcow2 y
        convert -O qcow2 -n -o cluster_size=4k a.qcow2 x
        convert -O qcow2 --target-is-zero a.qcow2 x
        convert -O qcow2 -B a.qcow2 a.qcow2 x
        convert -O qcow2 -B nope -F qcow2 a.qcow2 x
        convert -O qcow2 -F qcow2 a.qcow2 x
        convert -O qcow2 -B a.qcow2 -F qcow2 a.qcow2 a.qcow2 x
        convert -O raw -B a.qcow2 -F qcow2 a.qcow2 x
        convert -O qcow2 -C -S 4k a.qcow2 x
        convert -O qcow2 -c -C a.qcow2 x
        convert -n -O qcow2 a.qcow2 small.qcow2
        convert --target-image-opts a.qcow2 driver=qcow2,file.filename=x
        convert --skip-broken-bitmaps -O qcow2 a.qcow2 x
        convert --image-opts -f qcow2 driver=qcow2,file.filename=a.qcow2 x
        convert --s=raw a.qcow2 x
        convert -O qcow2 a.qcow2 a.qcow2
        info a.qcow2",
    );
    both.finish();
}

const CHAINS: &str = r"
chain() {
qemu-img create -q -f qcow2 $1base.qcow2 32M
qemu-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 4M 128k' -c 'write -z 8M 1M' -c 'write -P 7 20M 3M' $1base.qcow2
qemu-img create -q -f qcow2 -b $1base.qcow2 -F qcow2 $1mid.qcow2 $2
qemu-io -f qcow2 -c 'write -P 3 512k 64k' -c 'write -z -u 4M 64k' -c 'write -P 8 20M 10k' $1mid.qcow2
qemu-img create -q -f qcow2 -b $1mid.qcow2 -F qcow2 $1top.qcow2 $3
qemu-io -f qcow2 -c 'write -P 4 1M 64k' -c 'write -P 9 21M 700k' -c 'write -z 22M 100k' $1top.qcow2
}
for i in a b c d e f g h i j k; do chain $i; done
chain L 40M 50M
chain S 30M 28M
for i in 1 2 3; do cp Stop.qcow2 Stop$i.qcow2;cp Ltop.qcow2 Ltop$i.qcow2; done
qemu-img create -q r.raw 1M
qemu-img create -q -f qcow2 other.qcow2 32M
qemu-io -f qcow2 -c 'write -P 1 0 2M' -c 'write -P 7 20M 3M' -c 'write -P 33 25M 3M' other.qcow2
";

#[test]
fn commit_does_what_qemu_img_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(CHAINS);
    both.compare_all(
        "commit atop.qcow2
        map --output=json atop.qcow2
        map --output=json amid.qcow2
        commit -d btop.qcow2
        commit -b cbase.qcow2 ctop.qcow2
        commit -b nope dtop.qcow2
        commit -b dtop.qcow2 dtop.qcow2
        commit dbase.qcow2
        commit -q dtop.qcow2
        commit nope
        commit
        commit -r foo dtop.qcow2
        commit -t foo dtop.qcow2
        commit Ltop.qcow2
        info Lmid.qcow2
        commit Stop.qcow2
        info Smid.qcow2",
    );
    for chain in ["a", "b", "c", "d", "L", "S"] {
        for layer in ["base", "mid", "top"] {
            both.same_content("qcow2", &format!("{chain}{layer}.qcow2"));
        }
    }
    both.finish();
}

#[test]
fn rebase_does_what_qemu_img_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(CHAINS);
    both.compare_all(
        "rebase -b ebase.qcow2 -F qcow2 etop.qcow2
        info etop.qcow2
        rebase -b other.qcow2 -F qcow2 ftop.qcow2
        rebase -u -b gbase.qcow2 -F qcow2 gtop.qcow2
        info gtop.qcow2
        rebase -b gbase.qcow2 gtop.qcow2
        rebase -u -b gbase.qcow2 gtop.qcow2
        rebase -b '' htop.qcow2
        info htop.qcow2
        rebase itop.qcow2
        rebase -b nope -F qcow2 itop.qcow2
        rebase -F qcow2 itop.qcow2
        rebase
        rebase -u itop.qcow2
        info itop.qcow2
        rebase -f raw -b ibase.qcow2 -F qcow2 r.raw
        rebase -u -f raw -b ibase.qcow2 -F qcow2 r.raw
        rebase -c -b '' ktop.qcow2
        rebase -b Sbase.qcow2 -F qcow2 Stop1.qcow2
        rebase -b other.qcow2 -F qcow2 Ltop2.qcow2
        rebase -b Lbase.qcow2 -F qcow2 Ltop3.qcow2
        rebase -b Ltop3.qcow2 -F qcow2 Ltop3.qcow2
        rebase -u -b nope -F bogus gtop.qcow2",
    );
    for name in [
        "etop", "ftop", "gtop", "htop", "itop", "ktop", "Stop1", "Ltop2", "Ltop3",
    ] {
        both.same_content("qcow2", &format!("{name}.qcow2"));
    }
    both.compare("rebase -u -b nope -F raw gtop.qcow2");
    both.compare("rebase -b '' gtop.qcow2");
    both.finish();
}

#[test]
fn images_with_extended_l2_entries_are_made_shown_and_copied_as_qemu_img_does() {
    if !qemu_is_installed() {
        return;
    }
    let setup = format!(
        "{IMAGES}
qemu-img create -q -f qcow2 -o extended_l2=on -b a.qcow2 -F qcow2 x.qcow2
qemu-io -f qcow2 -c 'write -P 5 514k 2k' -c 'write -P 6 4098k 1k' -c 'write -z 8196k 6k' -c 'write -z 300k 2k' x.qcow2
qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=2M -b a.qcow2 -F qcow2 y.qcow2
qemu-io -f qcow2 -c 'write -P 7 514k 2k' -c 'write -P 8 5M 130k' -c 'write -z 1M 70k' y.qcow2
cp x.qcow2 xc.qcow2; cp a.qcow2 ac.qcow2; qemu-img rebase -u -f qcow2 -b ac.qcow2 -F qcow2 xc.qcow2
cp x.qcow2 xr.qcow2; cp x.qcow2 xs.qcow2
"
    );
    let mut both = SideBySide::new(&setup);
    both.compare_all(
        "create -f qcow2 -o extended_l2=on n1.qcow2 10M
        create -f qcow2 -o extended_l2=on,cluster_size=16k,preallocation=metadata n2.qcow2 10M
        create -f qcow2 -o extended_l2=on,preallocation=falloc -b a.qcow2 -F qcow2 n3.qcow2
        create -f qcow2 -o preallocation=metadata -b a.qcow2 -F qcow2 n.qcow2
        create -f qcow2 -o extended_l2=on,cluster_size=8k n.qcow2 1M
        create -f qcow2 -o extended_l2=on,compat=0.10 n.qcow2 1M
        info n1.qcow2
        info --output=json n2.qcow2
        info x.qcow2
        check x.qcow2
        map --output=json x.qcow2
        map x.qcow2
        map --output=json y.qcow2
        map --output=json n3.qcow2
        measure -O qcow2 -o extended_l2=on --size 10G
        measure -O qcow2 -o extended_l2=on,cluster_size=16k x.qcow2
        convert -O qcow2 -o extended_l2=on a.qcow2 t1.qcow2
        convert -O qcow2 -o extended_l2=on,cluster_size=16k x.qcow2 t2.qcow2
        convert -O qcow2 x.qcow2 t3.qcow2
        convert -c -O qcow2 -o extended_l2=on x.qcow2 t4.qcow2
        convert -c -O qcow2 y.qcow2 t5.qcow2
        convert -O qcow2 -o extended_l2=on,preallocation=metadata x.qcow2 t6.qcow2
        convert -O qcow2 -o extended_l2=on -B a.qcow2 -F qcow2 x.qcow2 t7.qcow2
        convert -O raw y.qcow2 t1.raw
        map --output=json t1.qcow2
        map --output=json t3.qcow2
        map --output=json t5.qcow2
        map --output=json t7.qcow2
        compare x.qcow2 t4.qcow2
        compare y.qcow2 t1.raw
        commit -q xc.qcow2
        rebase -q -b o.qcow2 -F qcow2 xr.qcow2
        resize -q xs.qcow2 +3M
        resize -q --shrink xs.qcow2 5000K",
    );
    for at in 1..=3 {
        both.same_content("qcow2", &format!("n{at}.qcow2"));
    }
    for at in 1..=7 {
        both.same_content("qcow2", &format!("t{at}.qcow2"));
    }
    for name in ["ac", "xc", "xr", "xs"] {
        both.same_content("qcow2", &format!("{name}.qcow2"));
    }
    both.same_content("raw", "t1.raw");
    both.finish();
}
