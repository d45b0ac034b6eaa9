//! Create options that are the storage's (`nocow`, `extent_size_hint`), sizes out of range, and LUKS containers as the target of `measure`,
//! beside the installed qemu-img: same words, same exit status, same images.

mod support;

use support::{SideBySide, qemu_is_installed};

#[test]
fn options_of_the_storage_are_taken_for_every_format() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new("qemu-img create -q -f raw old.raw 1M");
    for format in ["raw", "qcow2", "vmdk"] {
        for options in [
            "nocow=on",
            "nocow=off,extent_size_hint=0",
            "extent_size_hint=1M,nocow=on",
            "extent_size_hint=4294967295",
            "extent_size_hint=100,preallocation=off",
            "extent_size_hint=4G",
            "extent_size_hint=-1",
            "extent_size_hint=16E",
            "extent_size_hint=abc",
            "nocow=maybe",
        ] {
            both.compare(&format!("create -f {format} -o {options} a.{format} 1M"));
            both.compare(&format!(
                "convert -O {format} -o {options} old.raw c.{format}"
            ));
            both.compare(&format!("measure -O {format} -o {options} --size 1M"));
        }
        both.compare(&format!("create -f {format} -o help a.{format}"));
        both.same_content(format, &format!("a.{format}"));
        both.same_content(format, &format!("c.{format}"));
    }
    both.compare_all(
        "create -f vmdk -o subformat=monolithicFlat,nocow=on,extent_size_hint=2M flat.vmdk 1M
        create -f vmdk -o subformat=monolithicFlat,extent_size_hint=9G flat.vmdk 1M
        create -f qcow2 -o data_file=d.data,nocow=on,extent_size_hint=2M d.qcow2 1M
        create -f qcow2 -o data_file=d.data,extent_size_hint=9G d.qcow2 1M
        create -f raw -o extent_size_hint=5G nowhere/x 1M
        amend -o nocow=on a.qcow2
        amend -o extent_size_hint=1M a.qcow2",
    );
    both.same_content("qcow2", "d.qcow2");
    both.finish();
}

#[test]
fn sizes_out_of_range_are_told_apart_from_what_is_no_size() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new("true");
    for text in [
        "-1",
        "-1k",
        "-x",
        "1e30",
        "18446744073709551616",
        "17E",
        "16E",
        "abc",
        "1.5k",
        "0x10",
        "''",
    ] {
        both.compare(&format!("create -f raw -o size={text} a.raw"));
        both.compare(&format!(
            "create -f qcow2 -o cluster_size={text} a.qcow2 1M"
        ));
    }
    both.finish();
}

#[test]
fn a_luks_container_is_measured_as_qemu_img_measures_it() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(
        "qemu-img create -q -f qcow2 b.qcow2 7M; qemu-io -c 'write 1M 100k' b.qcow2 > /dev/null",
    );
    for options in [
        "key-secret=s,iter-time=10",
        "key-secret=s,iter-time=10,cipher-alg=aes-128",
        "key-secret=s,iter-time=10,cipher-alg=twofish-128,cipher-mode=cbc,ivgen-alg=essiv",
        "key-secret=s,iter-time=10,cipher-alg=cast5-128,cipher-mode=cbc",
        "key-secret=s,iter-time=10,cipher-alg=cast5-128",
        "key-secret=s,iter-time=10,cipher-alg=des",
        "key-secret=s,iter-time=10,cipher-alg=rot13",
        "key-secret=s,iter-time=10,hash-alg=sha512,preallocation=full,size=12,nocow=on",
        "key-secret=s,iter-time=10,hash-alg=foo",
        "key-secret=s,iter-time=10,ivgen-hash-alg=foo",
        "key-secret=s,iter-time=x",
        "key-secret=s,iter-time=10,bogus=1",
        "key-secret=x",
        "iter-time=10",
    ] {
        both.compare(&format!(
            "measure --object secret,id=s,data=abc -O luks -o {options} --size 1000000001"
        ));
    }
    both.compare_all(
        "measure -O luks --size 1M
        measure --object secret,id=s,data=abc -O luks -o key-secret=s,iter-time=10 --size 9223372036854775807
        measure --object secret,id=s,data=abc -O luks -o key-secret=s,iter-time=10 --output json b.qcow2
        measure -O bogus --size 1M",
    );
    both.finish();
}
