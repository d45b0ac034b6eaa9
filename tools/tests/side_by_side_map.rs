//! `map` of preallocated images and of such as end within a sector, beside the installed `qemu-img`.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
for mode in off metadata falloc full; do for extended in off on; do
cluster=64k; if [ $extended = on ]; then cluster=128k; fi
qemu-img create -q -f qcow2 -o preallocation=$mode,extended_l2=$extended,cluster_size=$cluster p.$mode.$extended 3M
cp p.$mode.$extended w.$mode.$extended
qemu-io -f qcow2 -c 'write -P 1 0 4k' -c 'write -P 2 1M 200k' -c 'write -z 2M 100k' -c 'discard 2560k 128k' \
    -c 'discard 1056k 32k' w.$mode.$extended
done; done
for mode in off falloc full; do qemu-img create -q -f raw -o preallocation=$mode r.$mode 3M; done
qemu-img create -q -f qcow2 -b r.full -F raw -o preallocation=metadata,extended_l2=on over.on 3M
qemu-io -f qcow2 -c 'write -P 1 66k 4k' -c 'write -z 200k 64k' over.on
truncate -s 1000 hole.raw
(printf '%0700d' 0; head -c 300 /dev/zero) > data.raw
(printf '%0700d' 0; head -c 70000 /dev/zero) > more.raw
: > empty.raw
for image in hole data more; do qemu-img create -q -f qcow2 -b $image.raw -F raw over-$image.qcow2; done
qemu-img create -q -f qcow2 -b data.raw -F raw over-data-longer.qcow2 1M
";

#[test]
fn the_space_of_a_cluster_is_shown_for_its_subclusters_without_data_too() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::made_twice(IMAGES);
    for image in [
        "p.off.on",
        "p.metadata.off",
        "p.metadata.on",
        "p.falloc.on",
        "p.full.on",
        "w.off.on",
        "w.metadata.off",
        "w.metadata.on",
        "w.falloc.on",
        "w.full.on",
        "over.on",
    ] {
        both.places(&format!("map -f qcow2 --output=json {image}"));
        both.places(&format!("map -f qcow2 {image}"));
    }
    for image in ["r.off", "r.falloc", "r.full"] {
        both.places(&format!("map -f raw --output=json {image}"));
        both.places(&format!("map -f raw {image}"));
    }
    both.finish();
}

#[test]
fn what_the_last_sector_lacks_is_a_hole() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::made_twice(IMAGES);
    for image in ["hole.raw", "data.raw", "more.raw", "empty.raw"] {
        both.places(&format!("map -f raw --output=json {image}"));
        both.places(&format!("map -f raw {image}"));
        both.places(&format!("map -f file --output=json {image}"));
        both.places(&format!("map -f raw --output=json -s 600 {image}"));
        both.places(&format!("map -f raw --output=json -l 600 {image}"));
    }
    for image in ["hole", "data", "more", "data-longer"] {
        both.places(&format!("map -f qcow2 --output=json over-{image}.qcow2"));
        both.places(&format!("map -f qcow2 over-{image}.qcow2"));
    }
    both.finish();
}
