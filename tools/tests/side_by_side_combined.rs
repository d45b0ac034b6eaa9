//! What meets in one image: snapshots and bitmaps where it is resized and amended, data files where they are amended, compressed
//! writes where data is copied within the storage. Beside the installed `qemu-img`: same words, same exit status, same images.

mod support;

use support::{SideBySide, qemu_is_installed};

/// Images with two snapshots each, of different sizes where the format allows it, and data that both share.
const SNAPSHOTS: &str = r"
io() { image=$1; shift; qemu-io -f qcow2 -d unmap $image; }
n=0
for o in refcount_bits=8 cluster_size=4k extended_l2=on compat=0.10 \
    cluster_size=512,refcount_bits=64,lazy_refcounts=on,compression_type=zstd; do
  n=$((n+1)); qemu-img create -q -f qcow2 -o $o s$n.qcow2 2M
  printf 'write -q -c -P 1 0 512k\nwrite -q -P 2 1M 300k\n' | io s$n.qcow2
  qemu-img snapshot -c one s$n.qcow2
  printf 'write -q -P 3 700k 600k\nwrite -q -z -u 64k 128k\n' | io s$n.qcow2
  case $o in *0.10*) ;; *) qemu-img resize -q s$n.qcow2 3M; printf 'write -q -P 4 2M 1M\n' | io s$n.qcow2;; esac
done
";

/// All there is to see of an image with snapshots.
fn compare_snapshots(both: &mut SideBySide, image: &str, names: &[&str]) {
    both.compare(&format!("info --output=json {image}"));
    both.same_content("qcow2", image);
    for name in names {
        let target = format!("{name}-{image}.raw");
        both.silently(&format!("convert -l {name} -O raw {image} {target}"));
        // qemu-img shows a snapshot with the size of today.
        both.silently(&format!("resize -q -f raw --shrink {target} 2M"));
        both.same_content("raw", &target);
    }
}

#[test]
fn images_with_snapshots_are_resized_as_by_qemu_img_and_keep_them() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(SNAPSHOTS);
    for n in 1..=5 {
        let image = format!("s{n}.qcow2");
        // Cut between clusters: qemu-img shows what lies behind a cut within one when the disk grows again.
        for (size, is_cut) in [
            ("5M", false),
            ("1216k", true),
            ("2560k", false),
            ("64k", true),
            ("3M", false),
        ] {
            both.compare(&format!("resize --shrink {image} {size}"));
            both.compare(&format!("check {image}"));
            // As long as the disk is shorter than the snapshot, qemu-img doesn't show all of that.
            let shown: &[&str] = if is_cut { &[] } else { &["one"] };
            compare_snapshots(&mut both, &image, shown);
        }
        both.compare(&format!("resize --preallocation=metadata {image} 4M"));
        both.compare(&format!("snapshot -a one {image}"));
        compare_snapshots(&mut both, &image, &["one"]);
        both.compare(&format!("snapshot -d one {image}"));
        both.compare(&format!("check {image}"));
        compare_snapshots(&mut both, &image, &[]);
    }
    both.finish();
}

#[test]
fn images_with_snapshots_are_amended_as_by_qemu_img_and_keep_them() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(SNAPSHOTS);
    for n in 1..=5 {
        let image = format!("s{n}.qcow2");
        for options in [
            "refcount_bits=64",
            "refcount_bits=1",
            "refcount_bits=4",
            "compat=1.1",
            "lazy_refcounts=on",
            "refcount_bits=32,size=3M",
            "size=2560k",
            "refcount_bits=16",
        ] {
            // Pieces of compressed data that share a cluster are packed differently.
            let is_compressed_narrow = options == "refcount_bits=4";
            let command = format!("amend -o {options} {image}");
            if is_compressed_narrow {
                both.silently(&command);
            } else {
                both.compare(&command);
            }
            both.compare(&format!("check {image}"));
            compare_snapshots(&mut both, &image, &["one"]);
        }
        both.compare(&format!("snapshot -a one {image}"));
        both.compare(&format!("check {image}"));
        both.compare(&format!("snapshot -d one {image}"));
        compare_snapshots(&mut both, &image, &[]);
    }
    both.finish();
}

const BITMAPS: &str = r"
n=0
for o in compat=1.1 cluster_size=512,refcount_bits=8 extended_l2=on,cluster_size=16k,lazy_refcounts=on; do
  n=$((n+1)); qemu-img create -q -f qcow2 -o $o b$n.qcow2 2M
  qemu-img bitmap --add b$n.qcow2 all
  qemu-img bitmap --add -g 512 b$n.qcow2 fine
  qemu-img bitmap --add -g 2M b$n.qcow2 coarse
  qemu-img bitmap --add --disable b$n.qcow2 off
  printf 'write -q -P 1 0 300k\nwrite -q -z 1M 64k\ndiscard -q 1536k 512k\n' | qemu-io -f qcow2 -d unmap b$n.qcow2
  qemu-img bitmap --disable b$n.qcow2 fine
done
";

#[test]
fn images_with_bitmaps_are_resized_and_amended_as_by_qemu_img_and_keep_them() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(BITMAPS);
    for n in 1..=3 {
        let image = format!("b{n}.qcow2");
        for command in [
            "resize +3M",
            "resize --shrink 1100k",
            "resize 9M",
            "resize --shrink 513k",
            // (qemu-img's preallocation would show what was in space that is used again.)
            "resize 3M",
            "amend -o refcount_bits=64",
            "amend -o refcount_bits=1",
            "amend -o lazy_refcounts=on",
            "amend -o lazy_refcounts=off,refcount_bits=16",
            "amend -o size=4M",
            "amend -o size=1M",
            "bitmap --merge fine all",
            "bitmap --remove coarse",
            "amend -o refcount_bits=2,size=2560k",
            "snapshot -c one",
            "resize 7M",
            "bitmap --enable fine",
            "snapshot -a one",
            "amend -o refcount_bits=16",
            "snapshot -d one",
            "resize --shrink 600k",
        ] {
            let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
            let line = match (verb, rest.rsplit_once(' ')) {
                // The image comes before what is to become of it.
                ("resize", Some((options, size))) => format!("{verb} {options} {image} {size}"),
                ("resize", None) => format!("{verb} {image} {rest}"),
                ("bitmap", Some((options, name))) => format!("{verb} {options} {image} {name}"),
                _ => format!("{verb} {rest} {image}"),
            };
            both.compare(&line);
            both.compare(&format!("check {image}"));
            both.same_content("qcow2", &image);
            both.same_bitmaps(&image);
        }
        both.compare(&format!("bitmap --add {image} last"));
        both.compare(&format!("info {image}"));
    }
    both.finish();
}

#[test]
fn images_with_a_data_file_are_amended_as_by_qemu_img_and_so_is_what_they_cannot_become() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(
        r"
n=0
for o in cluster_size=64k cluster_size=4k,refcount_bits=8 extended_l2=on data_file_raw=on data_file_raw=on,cluster_size=512; do
  n=$((n+1)); qemu-img create -q -f qcow2 -o data_file=d$n.raw,$o d$n.qcow2 2M
  printf 'write -q -P 1 0 300k\nwrite -q -z 1M 64k\nwrite -q -P 2 1600k 100k\ndiscard -q 64k 64k\n' | qemu-io -f qcow2 -d unmap d$n.qcow2
done
",
    );
    for n in 1..=5 {
        let image = format!("d{n}.qcow2");
        for options in [
            "refcount_bits=64",
            "refcount_bits=1",
            "lazy_refcounts=on",
            "compat=0.10",
            "data_file_raw=off",
            "data_file_raw=on",
            "size=3M",
            "size=1M",
            "refcount_bits=16,size=2500k,lazy_refcounts=off",
            "compression_type=zstd",
            "backing_file=x,backing_fmt=raw",
        ] {
            both.compare(&format!("amend -o {options} {image}"));
            both.compare(&format!("check {image}"));
            both.compare(&format!("info --output=json {image}"));
            both.same_content("qcow2", &image);
        }
        // The name is changed, or taken away, and nothing else: that the file is there is the user's business.
        for options in ["data_file=copy.raw", "data_file="] {
            both.compare(&format!("amend -o {options} {image}"));
            both.compare(&format!("info --output=json {image}"));
            both.compare(&format!("check {image}"));
            let named = format!(
                "driver=qcow2,file.filename={image},data-file.driver=file,data-file.filename=d{n}.raw"
            );
            both.compare(&format!("amend --image-opts -o data_file=d{n}.raw {named}"));
        }
        for command in ["snapshot -c one", "snapshot -a one", "snapshot -d one"] {
            both.compare(&format!("{command} {image}"));
        }
        both.same_content("qcow2", &image);
    }
    for n in 4..=5 {
        both.same_content("raw", &format!("d{n}.raw"));
    }
    both.finish();
}
