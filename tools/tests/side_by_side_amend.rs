//! `amend`, and `info` and `map` of many kinds of images, beside the installed qemu-img: same words, same JSON values, same exit
//! status, same image afterwards.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = "
qemu-img create -q -f raw base.raw 1M
qemu-io -f raw -c 'write -P 9 0 1M' base.raw
for n in 1 2 3 4 5 6 7 8 9; do
    qemu-img create -q -f qcow2 n$n.qcow2 1M
    qemu-io -c 'write -P 3 0 100k' -c 'write -z 100k 600k' n$n.qcow2 > /dev/null
done
qemu-img create -q -f qcow2 -o compat=0.10 -b base.raw -F raw v2.qcow2
qemu-img create -q -f qcow2 -o refcount_bits=8 bits.qcow2 1M
qemu-img create -q -f qcow2 -o lazy_refcounts=on lazy.qcow2 1M
qemu-img create -q -f qcow2 -o lazy_refcounts=on lazy2.qcow2 1M
qemu-img create -q -f qcow2 -o lazy_refcounts=on lazy3.qcow2 1M
qemu-img create -q -f qcow2 -b base.raw -F raw over.qcow2
qemu-io -c 'write -z 0 200k' -c 'write -P 5 300k 10k' over.qcow2 > /dev/null
";

#[test]
fn amend_says_and_does_what_qemu_img_says_and_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "amend -o help
        amend
        amend n1.qcow2
        amend -o size=2M
        amend -f raw -o size=2M base.raw
        amend -f raw -o help
        amend -f bogus -o size=2M n1.qcow2
        amend -o size=2M nope.qcow2
        amend -o compat=0.10,bogus=1 n1.qcow2
        amend -o compat=foo n1.qcow2
        amend -o size=1000 n1.qcow2
        amend -o size=x n1.qcow2
        amend -o lazy_refcounts=foo n1.qcow2
        amend -o refcount_bits=3 n1.qcow2
        amend -o refcount_bits=128 n1.qcow2
        amend -o refcount_bits=x n1.qcow2
        amend -o cluster_size=4096 n1.qcow2
        amend -o preallocation=full n1.qcow2
        amend -o extended_l2=on n1.qcow2
        amend -o compression_type=zstd n1.qcow2
        amend -o encryption=on n1.qcow2
        amend -o data_file=foo n1.qcow2
        amend -o data_file_raw=on n1.qcow2
        amend -o data_file_raw=off n1.qcow2
        amend -o backing_file=base.raw,backing_fmt=raw n1.qcow2
        amend -o backing_file= n1.qcow2
        amend -o keep_data_file=on n1.qcow2
        info n1.qcow2
        amend -q -o size=2M n1.qcow2
        amend -o size=512k n2.qcow2
        amend -o lazy_refcounts=on n3.qcow2
        amend -o refcount_bits=1 n4.qcow2
        amend -o refcount_bits=64,lazy_refcounts=on,size=7M n5.qcow2
        amend -o compat=v2 n6.qcow2
        amend -o compat=v3 n6.qcow2
        amend -o compat=0.10,lazy_refcounts=on n7.qcow2
        amend -o compat=0.10,refcount_bits=8 n7.qcow2
        amend -o compat=0.10 n8.qcow2
        amend -f qcow2 -t none --force -o refcount_bits=32 n9.qcow2
        amend -o lazy_refcounts=on v2.qcow2
        amend -o refcount_bits=8 v2.qcow2
        amend -o backing_file=base.raw,backing_fmt=raw v2.qcow2
        amend -o compat=1.1,refcount_bits=8,lazy_refcounts=on,size=2M v2.qcow2
        amend -o compat=0.10 bits.qcow2
        amend -o compat=0.10,refcount_bits=16 bits.qcow2
        amend -o compat=0.10 lazy.qcow2
        amend -o compat=0.10,lazy_refcounts=off lazy.qcow2
        amend -o compat=0.10,lazy_refcounts=on lazy.qcow2
        amend -o compat=0.10,lazy_refcounts=on lazy2.qcow2
        amend -o lazy_refcounts=on,compat=v2,size=2M lazy3.qcow2
        amend -o compat=1.1,lazy_refcounts=on lazy2.qcow2
        amend -o compat=0.10 over.qcow2",
    );
    for name in [
        "n1", "n2", "n3", "n4", "n5", "n6", "n7", "n8", "n9", "v2", "bits", "lazy", "lazy2",
        "lazy3", "over",
    ] {
        let name = format!("{name}.qcow2");
        both.compare(&format!("info --output=json {name}"));
        both.same_content("qcow2", &name);
    }
    both.finish();
}

/// Whole clusters of data only: holes within them are found by us alone, and the copy for the other side may change them.
const KINDS: &str = "
fill() { qemu-io -f qcow2 -c 'write -P 3 0 4M' -c 'write -z 6M 2M' -c 'write -z -u 10M 2M' -c 'discard 2M 2M' $1 > /dev/null; }
n=0
for o in compat=0.10 compat=1.1 cluster_size=512 cluster_size=4k cluster_size=2M refcount_bits=1 \
    refcount_bits=64,lazy_refcounts=on compat=0.10,cluster_size=1k; do
  n=$((n+1)); qemu-img create -q -f qcow2 -o $o o$n.qcow2 16M; fill o$n.qcow2
done
qemu-img create -q -f qcow2 -o preallocation=metadata metadata.qcow2 2M
qemu-io -f qcow2 -c 'write -P 1 64k 64k' metadata.qcow2 > /dev/null
qemu-img create -q -f qcow2 base.qcow2 16M; fill base.qcow2
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2
qemu-io -f qcow2 -c 'write -P 7 5M 1M' -c 'write -z 2M 64k' mid.qcow2 > /dev/null
qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 20M
qemu-io -f qcow2 -c 'write -P 7 3M 64k' -c 'write -z 5M 64k' top.qcow2 > /dev/null
qemu-img create -q -f raw base.raw 1M; qemu-io -f raw -c 'write -P 9 0 1M' base.raw > /dev/null
qemu-img create -q -f qcow2 -b base.raw -F raw onraw.qcow2 2M
qemu-io -f qcow2 -c 'write -P 7 128k 64k' onraw.qcow2 > /dev/null
qemu-img convert -c -f qcow2 -O qcow2 base.qcow2 comp.qcow2
qemu-img create -q -f qcow2 odd.qcow2 1000500
qemu-img create -q -f qcow2 empty.qcow2 0
qemu-img create -q -f qcow2 big.qcow2 1T; qemu-io -f qcow2 -c 'write -P 1 512G 64k' big.qcow2 > /dev/null
n=0; for bits in 1 2 3; do
  n=$((n+1)); cp o2.qcow2 bits$n.qcow2
  printf \\\\$bits | dd of=bits$n.qcow2 bs=1 seek=79 conv=notrunc 2> /dev/null
done
";

#[test]
fn info_and_map_of_all_kinds_of_images_have_qemu_imgs_values() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(KINDS);
    for name in [
        "o1", "o2", "o3", "o4", "o5", "o6", "o7", "o8", "metadata", "base", "mid", "top", "onraw",
        "comp", "odd", "empty", "big", "bits1", "bits2", "bits3",
    ] {
        for command in [
            "info --output=json",
            "info",
            "info --backing-chain --output=json",
            "info --backing-chain",
            "info -f raw --output=json",
            "map --output=json",
            "map -s 3M -l 5M --output=json",
        ] {
            both.compare(&format!("{command} {name}.qcow2"));
        }
    }
    both.finish();
}
