//! `amend` beside the installed qemu-img: same words, same exit status, same image afterwards.

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
        amend -o compat=0.10 over.qcow2",
    );
    for name in [
        "n1", "n2", "n3", "n4", "n5", "n6", "n7", "n8", "n9", "v2", "bits", "lazy", "over",
    ] {
        let name = format!("{name}.qcow2");
        both.compare(&format!("info --output=json {name}"));
        both.same_content("qcow2", &name);
    }
    both.finish();
}
