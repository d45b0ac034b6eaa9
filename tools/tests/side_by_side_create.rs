//! What `create` echoes, in which order it finds fault, and what `-o help` lists, beside the installed `qemu-img`.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
qemu-img create -q -f qcow2 a.qcow2 64M
qemu-img create -q -f vmdk v.vmdk 1M
qemu-img create -q r.raw 1M
truncate -s 1000 odd.raw
printf 'some data' >> odd.raw
head -c 30 a.qcow2 > trunc.qcow2
";

#[test]
fn switches_are_echoed_as_they_were_spelled_and_numbers_as_they_were_read() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    for spelling in [
        "yes", "no", "true", "false", "y", "n", "on", "off", "ON", "1", "",
    ] {
        both.compare(&format!(
            "create -f qcow2 -o lazy_refcounts={spelling} x 1M"
        ));
        both.compare(&format!("create -f qcow2 -o extended_l2={spelling} x 1M"));
        both.compare(&format!("create -f qcow2 -o encryption={spelling} x 1M"));
        both.compare(&format!("create -f vmdk -o compat6={spelling} x 1M"));
    }
    both.compare_all(
        "create -f qcow2 -o lazy_refcounts=on,lazy_refcounts=no x 1M
        create -f qcow2 -o lazy_refcounts x 1M
        create -f qcow2 -o data_file=d,data_file_raw=y x 1M
        create -f qcow2 -o refcount_bits=16 x 1M
        create -f qcow2 -o refcount_bits=010 x 1M
        create -f qcow2 -o refcount_bits=016 x 1M
        create -f qcow2 -o refcount_bits=0x10 x 1M
        create -f qcow2 -o refcount_bits=+16 x 1M
        create -f qcow2 -o refcount_bits=-16 x 1M
        create -f qcow2 -o refcount_bits=16k x 1M
        create -f qcow2 -o refcount_bits=0x x 1M
        create -f qcow2 -o refcount_bits=18446744073709551616 x 1M
        create -f qcow2 -o cluster_size=0x10000 x 1M",
    );
    both.finish();
}

#[test]
fn a_backing_file_without_a_format_is_refused_before_all_else_is_looked_at() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    for backing in ["nope", "a.qcow2", "r.raw", "odd.raw", "trunc.qcow2"] {
        for size in ["", " 1M"] {
            both.compare(&format!("create -f qcow2 -u -b {backing} x{size}"));
            both.compare(&format!("create -f qcow2 -b {backing} x{size}"));
            both.compare(&format!(
                "create -f qcow2 -o backing_file={backing} x{size}"
            ));
            both.compare(&format!("create -f vmdk -u -b {backing} x{size}"));
            both.compare(&format!("create -f vmdk -b {backing} x{size}"));
            for format in ["raw", "bogus", "file", "vdi", "''"] {
                let line = format!("create -f qcow2 -b {backing} -F {format} y{size}");
                // A format that is known by name is one that we may not be able to open.
                if format != "vdi" {
                    both.compare(&line);
                }
                both.compare(&format!("{line} -u"));
            }
        }
    }
    both.compare_all(
        "create -f qcow2 -u -b '' x
        create -f qcow2 -b '' x 1M
        create -f qcow2 -u -F qcow2 x 1M
        create -f qcow2 -u -F bogus x 1M
        create -f qcow2 -u x
        create -f raw -F qcow2 x 1M
        create -f raw -u -b a.qcow2 x 1M
        create -f vmdk -b a.qcow2 -F qcow2 x
        create -f vmdk -b v.vmdk -F vmdk x
        create -f vmdk -b v.vmdk -F raw x
        create -f vmdk -u -b r.raw -F vmdk x 1M
        create -f vmdk -u -F raw x 1M
        convert -f raw -O qcow2 -o encryption=yes r.raw x
        convert -f raw -O qcow2 -o backing_file=r.raw,backing_fmt=bogus r.raw x",
    );
    both.finish();
}

#[test]
fn an_overlay_is_as_long_as_the_whole_sectors_of_its_backing_file() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "create -f qcow2 -b odd.raw -F raw odd1
        info odd1
        create -f qcow2 -b odd.raw -F raw odd2 999
        info odd2
        create -f qcow2 -b odd.raw -F raw odd3 2000
        info odd3
        create -f qcow2 -o backing_file=odd.raw,backing_fmt=raw odd4
        compare -f qcow2 -F raw odd4 odd.raw",
    );
    for image in ["odd1", "odd2", "odd3", "odd4"] {
        both.same_content("qcow2", image);
    }
    both.finish();
}

#[test]
fn help_for_options_lists_what_qemu_img_lists() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    for format in ["qcow2", "raw", "vmdk", "bogus", "blkdebug", "null-co"] {
        both.compare(&format!("create -f {format} -o help"));
        both.compare(&format!("convert -O {format} -o help"));
        both.compare(&format!("convert -O {format} -o help a.qcow2"));
        both.compare(&format!("measure -O {format} -o help"));
        both.compare(&format!("measure -O {format} -o help --size 1M"));
        both.compare(&format!("measure -O {format} -o help a.qcow2"));
        both.compare(&format!("amend -f {format} -o help"));
        both.compare(&format!("amend -f {format} -o help a.qcow2"));
    }
    both.compare_all(
        "create -o help
        create -f qcow2 -o help x
        create -f raw -o help x
        create -f vmdk -o help file:x
        create -f file -o help
        convert -O qcow2 -o cluster_size=4k,help a.qcow2 b
        convert -o ? a.qcow2 b
        create -f qcow2 -o help nope:x
        create -f qcow2 -o help host_device:/dev/null
        convert -o help
        convert -n -O qcow2 -o help a.qcow2 b
        measure -o help
        amend -o help
        amend -o help a.qcow2
        amend -o help nope
        amend -o help r.raw
        amend -o help v.vmdk
        rebase -o help",
    );
    both.finish();
}
