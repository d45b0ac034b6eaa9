//! The commands of `qemu-img`, beside the installed `qemu-img`: same output, same messages, same exit status.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
qemu-img create -q -f qcow2 a.qcow2 64M
qemu-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 4M 128k' -c 'write -z 8M 1M' a.qcow2
qemu-img create -q -f qcow2 -o compat=v2,cluster_size=4k a2.qcow2 64M
qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2
qemu-io -f qcow2 -c 'write -P 3 512k 64k' -c 'write -z -u 4M 64k' o.qcow2
qemu-img create -q -f qcow2 -b o.qcow2 -F qcow2 o2.qcow2 128M
qemu-io -f qcow2 -c 'write -P 4 100M 64k' o2.qcow2
qemu-img create -q -f qcow2 -u -b nope -F qcow2 o3.qcow2 10M
qemu-img create -q -f vmdk v.vmdk 10M
qemu-io -f vmdk -c 'write -P 4 1M 64k' v.vmdk
qemu-img create -q -f vmdk -o subformat=monolithicFlat vf.vmdk 10M
qemu-img convert -c -f qcow2 -O qcow2 a.qcow2 c.qcow2
qemu-img convert -f qcow2 -O raw a.qcow2 r.raw
cp --sparse=always r.raw r2.raw; truncate -s 65M r2.raw
cp --sparse=always r.raw r3.raw; printf x | dd of=r3.raw bs=1 seek=5000000 conv=notrunc
cp --sparse=always r.raw r4.raw; truncate -s 65M r4.raw
printf x | dd of=r4.raw bs=1 seek=68000000 conv=notrunc
: > e.raw; truncate -s 1000 f.raw
mkdir sub; (cd sub; qemu-img create -q -f qcow2 -u -b ../a.qcow2 -F qcow2 s.qcow2 1M)
head -c 30 a.qcow2 > trunc.qcow2
qemu-img create -q -f qcow2 -u -b l1b.qcow2 -F qcow2 l1a.qcow2 1M
qemu-img create -q -f qcow2 -u -b l1a.qcow2 -F qcow2 l1b.qcow2 1M
qemu-img create -q -f qcow2 -o preallocation=metadata pm.qcow2 1M
qemu-img create -q -f qcow2 n1.qcow2 64M
qemu-img create -q n.raw 10M
";

#[test]
fn create_says_and_makes_what_qemu_img_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "create -f qcow2 m1.qcow2 64M
        create -f qcow2 -o compat=v2,cluster_size=4k,lazy_refcounts=off m2.qcow2 64M
        create -f raw m.raw 10M
        create m2.raw 1000
        create -q m2.raw 1000
        create -f qcow2 -b a.qcow2 m3.qcow2
        create -f qcow2 -b a.qcow2 -F qcow2 m3.qcow2
        create -f qcow2 -b a.qcow2 -F qcow2 m4.qcow2 128M
        create -f qcow2 -b nope -F qcow2 m5.qcow2
        create -f qcow2 -b nope -F qcow2 m5.qcow2 10M
        create -f qcow2 -u -b nope -F qcow2 m5.qcow2 10M
        create -f qcow2 -u -b nope -F qcow2 m6.qcow2
        create -f qcow2 x.qcow2
        create -f bogus x.qcow2 1M
        create -f qcow2 x.qcow2 1Q
        create -f qcow2 x.qcow2 -- -1
        create -f qcow2 x.qcow2 100000000000000000000
        create -f qcow2 -o bogus=1 x.qcow2 1M
        create -f qcow2 -o cluster_size=3 x.qcow2 1M
        create -f qcow2 -o size=2M x.qcow2
        create -f qcow2 -o size=2M x.qcow2 1M
        create -f raw -b a.qcow2 -F qcow2 x.raw
        create -f qcow2 /nonexistent/x.qcow2 1M
        create -f qcow2
        create -f qcow2 aa b c
        create -f vmdk m.vmdk 10M
        create -f vmdk -o subformat=monolithicFlat mf.vmdk 10M
        create -f qcow2 -o preallocation=metadata p.qcow2 10M
        create -f qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2 o5.qcow2
        create -f qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2 -b a.qcow2 o5.qcow2
        create -f qcow2 -b a.qcow2 -F bogus o5.qcow2
        create -f qcow2 -F qcow2 o5.qcow2 1M
        create -f raw -o preallocation=full rr.raw 1M
        create -z
        create --bogus
        create -f
        create -f qcow2 -o compat=bogus x 1M
        create -f qcow2 -o lazy_refcounts=maybe x 1M
        create -f qcow2 -o cluster_size=foo x 1M
        create -f qcow2 -o refcount_bits=foo x 1M
        create -f qcow2 -o preallocation=foo x 1M
        create -f qcow2 -o backing_fmt=qcow2 x 1M
        create -f qcow2 -o nolazy_refcounts x 1M
        create -f qcow2 -o lazy_refcounts x 1M
        create -f qcow2 -o '' x 1M
        create -f qcow2 -o foo x 1M
        create -f qcow2 -o ,, x 1M
        create -f qcow2 -b a.qcow2 -F qcow2 a.qcow2
        create -f qcow2 -b '' x 1M
        create -f qcow2 -b a.qcow2 -F raw x
        create -f file x 1M
        create -f raw . 1M
        create -f qcow2 x 0
        create -f qcow2 x 1000
        create -f qcow2 bogus:x 1M
        create -f qcow2 file:x 1M
        create -f qcow2 x 9E
        create -f qcow2 x 7E
        create -f qcow2 x 1.5G
        create -f qcow2 x 0x100000
        create -f qcow2 x 1e3
        create -f qcow2 x 64GB
        create -f qcow2 -o size=foo x
        create -f qcow2 -b a,b -u -F qcow2 z.qcow2 1M
        create -f qcow2 z.qcow2 1M extra
        create -o help -f bogus
        create -f qcow2 -o encryption=off e1.qcow2 1M
        create -f qcow2 -o encryption=maybe x 1M
        create -f raw -o preallocation=bogus x 1M
        create -f vmdk -o subformat=bogus x 1M
        info --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=bogus
        info --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap
        info --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap,discard=unmap
        info --image-opts driver=qcow2,file.filename=a.qcow2,file.detect-zeroes=unmap
        check --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap
        map --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap,discard=ignore
        resize --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap 64M
        snapshot -l --image-opts driver=qcow2,file.filename=a.qcow2,detect-zeroes=unmap
        create -f qcow2 unmapped.qcow2 64M
        convert --image-opts --target-image-opts -n driver=qcow2,file.filename=a.qcow2 driver=qcow2,file.filename=unmapped.qcow2,detect-zeroes=unmap
        info --image-opts driver=qcow2,file.filename=a.qcow2,discard=bogus
        info --image-opts driver=qcow2,file.filename=a.qcow2,file.aio=bogus
        info --image-opts driver=qcow2,file.filename=a.qcow2,file.locking=bogus
        bogus
        ",
    );
    for more in ["", r#""discard":"unmap","#] {
        both.compare(&format!(
            r#"map json:{{"driver":"qcow2","detect-zeroes":"unmap",{more}"file":{{"driver":"file","filename":"a.qcow2"}}}}"#
        ));
    }
    for (format, name) in [
        ("qcow2", "m1.qcow2"),
        ("qcow2", "m2.qcow2"),
        ("qcow2", "m3.qcow2"),
        ("raw", "m.raw"),
    ] {
        both.same_content(format, name);
    }
    both.finish();
}

#[test]
fn info_shows_what_qemu_img_shows() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    for image in [
        "a.qcow2",
        "a2.qcow2",
        "c.qcow2",
        "v.vmdk",
        "vf.vmdk",
        "r.raw",
        "e.raw",
        "f.raw",
        "o.qcow2",
        "o2.qcow2",
        "o3.qcow2",
        "sub/s.qcow2",
        "nope",
        "trunc.qcow2",
        "pm.qcow2",
    ] {
        both.compare(&format!("info {image}"));
        both.compare(&format!("info --output=json {image}"));
        both.compare(&format!("info --backing-chain {image}"));
        both.compare(&format!("info --backing-chain --output json -U {image}"));
    }
    both.compare_all(
        r#"info --backing-chain l1a.qcow2
        info
        info a b
        info -f qcow2 r.raw
        info -f bogus r.raw
        info --output=xml r.raw
        info -f raw a.qcow2
        info -f file a.qcow2
        info --image-opts driver=qcow2,file.filename=a.qcow2
        info --image-opts driver=qcow2,file.filename=a.qcow2,lazy-refcounts=on
        info --image-opts -f raw driver=qcow2,file.filename=a.qcow2
        info json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}
        info --image a.qcow2
        info file:a.qcow2
        info bogus:a
        info .
        info ''
        info /dev/null
        info -p a.qcow2
        info --out=xml a.qcow2
        info --backing-chain=yes a.qcow2"#,
    );
    both.finish();
}

#[test]
fn check_finds_what_qemu_img_finds() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "check a.qcow2
        check -q a.qcow2
        check a2.qcow2
        check c.qcow2
        check --output=json a.qcow2
        check --output=json c.qcow2
        check --output=json r.raw
        check r.raw
        check nope
        check v.vmdk
        check --output=json v.vmdk
        check -r bogus a.qcow2
        check -r leaks -U a.qcow2
        check -r all a.qcow2
        check
        check -T bogus a.qcow2
        check -T none a.qcow2
        check o3.qcow2",
    );
    both.finish();
}

/// Images with one kind of damage each, six of every kind: clusters that leak, a refcount that is too high, the same
/// cluster used twice, an entry that points between clusters, a COPIED flag that is missing; and refcounts of 0 for clusters
/// in use, alone and beside a leak, and a lost refcount block.
const DAMAGED: &str = r#"
qemu-img create -q -f qcow2 b 4M
qemu-io -f qcow2 -c 'write -P 5 0 1M' -c 'write -P 7 2M 128k' b
damage() { cp b $1; truncate -s 3M $1; poke "$@"; }
poke() {
    local name=$1; shift
    while [ $# -gt 0 ]; do
        printf "$2" | dd of=$name bs=1 seek=$(($1)) conv=notrunc status=none; shift 2
    done
}
damage leak 0x20000+2*30 '\0\1' 0x20000+2*31 '\0\2'
damage high 0x20000+2*8 '\0\3'
damage twice 0x40008 '\x80\0\0\0\0\x05\0\0'
damage between 0x40008 '\x80\0\0\0\0\x05\x02\0'
damage copied 0x40000 '\0\0'
damage none 0x20000+2*8 '\0\0' 0x20000+2*9 '\0\0'
damage both 0x20000+2*8 '\0\0' 0x20000+2*30 '\0\1'
damage lost 0x10000 '\0\0\0\0\0\0\0\0'
for name in leak high twice between copied none both lost; do
    for copy in 1 2 3 4 5 6; do cp $name $name$copy; done
done
"#;

#[test]
fn repairs_say_and_do_what_qemu_img_says_and_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(DAMAGED);
    let mut check = |image: &str, how: &str| {
        both.compare(&format!("check -f qcow2 {how} {image}"));
        // What the repair left.
        both.compare(&format!("check -f qcow2 {image}"));
    };
    for name in ["leak", "high", "between", "copied"] {
        check(&format!("{name}1"), "-r leaks");
        check(&format!("{name}2"), "-r all");
        check(&format!("{name}3"), "-r leaks --output=json");
        check(&format!("{name}4"), "-r all --output=json");
        check(&format!("{name}5"), "-q -r leaks");
        check(&format!("{name}6"), "-q -r all");
    }
    // These want new refcount structures, which a repair of leaks doesn't make. (Where a rebuild puts them, and so what
    // it says of the old ones, is each program's own business.)
    for name in ["none", "both", "lost"] {
        check(&format!("{name}1"), "-r leaks");
        check(&format!("{name}2"), "-r leaks --output=json");
        check(&format!("{name}3"), "-q -r leaks");
    }
    both.finish();
}

/// Where qemu-img lets both go on with one place, each gets its own; the exit statuses are the same.
#[test]
fn ranges_that_shared_their_place_are_told_and_separated() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(DAMAGED);
    let expected = serde_json::json!([
        {"start": 0, "length": 65536, "snapshot": null, "with": "data", "with-start": 65536,
         "with-snapshot": null, "separated": true},
        {"start": 65536, "length": 65536, "snapshot": null, "with": "data", "with-start": 0,
         "with-snapshot": null, "separated": true},
    ]);
    let output = both.ours_alone("check -f qcow2 twice1");
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = "Affected: guest range offset=0x0 length=0x10000 shares its place in the file with data at guest \
                offset=0x10000";
    assert!(text.contains(line), "{text}");
    let output = both.ours_alone("check -f qcow2 -r all --output=json twice2");
    assert_eq!(output.status.code(), Some(0));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["affected"], expected);
    assert_eq!(json["corruptions-fixed"], 1);
    for image in ["twice1", "twice2"] {
        both.silently(&format!("check -f qcow2 -r all {image}"));
        both.compare(&format!("check -q -f qcow2 {image}"));
        both.same_content("qcow2", image);
    }
    both.finish();
}

#[test]
fn a_rebuild_leaves_an_image_that_qemu_img_finds_clean() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(DAMAGED);
    for name in ["none", "both", "lost"] {
        both.silently(&format!("check -f qcow2 -r all {name}"));
        both.compare(&format!("check -f qcow2 {name}"));
        both.same_content("qcow2", name);
    }
    both.finish();
}

#[test]
fn map_shows_what_qemu_img_shows() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    for image in [
        "a.qcow2", "a2.qcow2", "c.qcow2", "v.vmdk", "r.raw", "o.qcow2", "o2.qcow2", "o3.qcow2",
        "e.raw", "pm.qcow2",
    ] {
        both.compare(&format!("map {image}"));
        both.compare(&format!("map --output=json {image}"));
    }
    both.compare_all(
        "map --output=json -s 512k -l 1M o.qcow2
        map --output=json --start-offset=512k --max-length=600000 o.qcow2
        map --output=json --start-offset=70M o.qcow2
        map --start-offset=-1 o.qcow2
        map --start-offset=foo o.qcow2
        map --max-length=foo o.qcow2
        map",
    );
    both.finish();
}

#[test]
fn compare_finds_what_qemu_img_finds() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "compare a.qcow2 r.raw
        compare -q a.qcow2 r.raw
        compare a.qcow2 r2.raw
        compare -s a.qcow2 r2.raw
        compare -q -s a.qcow2 r2.raw
        compare a.qcow2 r3.raw
        compare -q a.qcow2 r3.raw
        compare a.qcow2 r4.raw
        compare r4.raw a.qcow2
        compare -s r4.raw a.qcow2
        compare -s a.qcow2 r3.raw
        compare -s r3.raw r.raw
        compare -s r.raw r.raw
        compare o.qcow2 a.qcow2
        compare c.qcow2 a.qcow2
        compare -s c.qcow2 a.qcow2
        compare nope a.qcow2
        compare a.qcow2 nope
        compare a.qcow2
        compare -f qcow2 r.raw a.qcow2
        compare -T bogus r.raw a.qcow2
        compare e.raw f.raw
        compare --image-opts driver=raw,file.filename=r.raw driver=qcow2,file.filename=a.qcow2",
    );
    both.finish();
}

#[test]
fn resize_does_what_qemu_img_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "resize n1.qcow2 128M
        resize n1.qcow2 +1M
        resize n1.qcow2 -1M
        resize --shrink n1.qcow2 -1M
        resize -q n1.qcow2 +512
        resize n1.qcow2 +0
        info n1.qcow2
        resize n.raw 70M
        resize -f raw n.raw 71M
        resize -f raw n.raw 71M
        resize -f raw n.raw 71.5M
        resize -f raw n.raw 1000
        resize -f raw --shrink n.raw 1000
        resize -f raw --shrink n.raw -2000
        resize -f raw --preallocation=full n.raw 1M
        resize -f raw --preallocation=bogus n.raw 2M
        resize --preallocation=metadata n1.qcow2 +1M
        resize --shrink --preallocation=metadata n1.qcow2 1M
        resize n1.qcow2
        resize n1.qcow2 foo
        resize nope 1M
        resize
        resize n1.qcow2 1 2
        resize n1.qcow2 -- -1
        resize n1.qcow2 200M --shrink
        resize 128M n1.qcow2",
    );
    both.same_content("qcow2", "n1.qcow2");
    both.same_content("raw", "n.raw");
    both.finish();
}

#[test]
fn measure_gives_qemu_imgs_numbers() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "measure --size 1G
        measure --size 1G -O qcow2
        measure --size 1G -O qcow2 --output=json
        measure -O qcow2 a.qcow2
        measure -O raw a.qcow2
        measure -O qcow2 a2.qcow2
        measure -O qcow2 --output=json o2.qcow2
        measure -O qcow2 r3.raw
        measure -O vmdk a.qcow2
        measure -O bogus a.qcow2
        measure --size 1G -O qcow2 -o cluster_size=2M a.qcow2
        measure --size 1G -O qcow2 -o cluster_size=2M,preallocation=full
        measure --size 1G -O qcow2 -o bogus=1
        measure
        measure --size foo
        measure -O qcow2 nope
        measure a b
        measure --size 1G --image-opts
        measure --size 1G -f qcow2
        measure --output=xml a.qcow2
        measure -O qcow2 -o cluster_size=4k r4.raw",
    );
    both.finish();
}

#[test]
fn bench_takes_qemu_imgs_arguments() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "bench -c 100 -d 4 -s 4k a.qcow2
        bench -c 100 -d 4 -s 4k -w a.qcow2
        bench -c 100 -d 4 -s 4k -w --pattern=1 --flush-interval=10 a.qcow2
        bench -c 50 -d 4 -s 4k -w --pattern=1 --flush-interval=10 --no-drain -S 8k -o 1M a.qcow2
        bench -q -c 100 a.qcow2
        bench -c 0 a.qcow2
        bench -c foo a.qcow2
        bench -d foo a.qcow2
        bench -s foo a.qcow2
        bench -S foo a.qcow2
        bench -o foo a.qcow2
        bench --pattern=foo a.qcow2
        bench --flush-interval=foo a.qcow2
        bench --flush-interval=10 a.qcow2
        bench -w --flush-interval=1 -d 64 a.qcow2
        bench -w --no-drain -c 10 a.qcow2
        bench -i foo a.qcow2
        bench -i threads -c 10 a.qcow2
        bench -t foo a.qcow2
        bench -c 10 -n a.qcow2
        bench -c 10 -o 63M -s 1M a.qcow2
        bench -w n.raw -c 1
        bench
        check a.qcow2",
    );
    both.finish();
}
