//! Images with an external data file, zstd, and `measure` over options, beside the installed `qemu-img`: same messages, same
//! exit status, same numbers, same content.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
qemu-img create -q -f qcow2 -o data_file=d1.raw d1.qcow2 4M
qemu-io -f qcow2 -c 'write -P 1 0 1M' -c 'write -P 2 2M 100k' -c 'write -z 256k 128k' -c 'discard 512k 64k' d1.qcow2
qemu-img create -q -f qcow2 -o data_file=d2.raw,data_file_raw=on d2.qcow2 4M
qemu-io -f qcow2 -c 'write -P 3 0 4M' d2.qcow2
qemu-img create -q -f qcow2 -o extended_l2=on,data_file=d3.raw d3.qcow2 4M
qemu-io -f qcow2 -c 'write -P 4 1M 300k' -c 'write -z 1064960 6k' d3.qcow2
qemu-img create -q -f qcow2 a.qcow2 4M
qemu-io -f qcow2 -c 'write -P 5 0 1M' -c 'write -P 6 3M 64k' a.qcow2
qemu-img create -q -f qcow2 -o compression_type=zstd z.qcow2 4M
qemu-io -f qcow2 -c 'write -c -P 7 0 1M' z.qcow2
qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2 6M
qemu-io -f qcow2 -c 'write -P 8 5M 64k' o.qcow2
truncate -s 3M r.raw; printf x | dd status=none of=r.raw bs=1 seek=1000000 conv=notrunc
patch() { printf $2 | dd status=none of=$1 bs=1 seek=$3 conv=notrunc; }
qemu-img create -q -f qcow2 -o data_file=e.raw left1.qcow2 1M; patch left1.qcow2 '\0' 79
qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 left2.qcow2 1M; patch left2.qcow2 '\0\0\0\0\0\0\0\0\0\0\0\0' 8
for size in '\0\001' '\001\377' '\002\0'; do
    name=tiny$((tiny++)).qcow2; qemu-img create -q -f qcow2 -o cluster_size=512 $name 512; patch $name $size 30
done
";

#[test]
fn images_with_a_data_file_or_zstd_are_handled_as_qemu_img_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    // (Maps of images whose data file has holes differ: qemu-img takes what is mapped for data without a look at the file.)
    both.compare_all(
        "info d1.qcow2
        info --output=json d1.qcow2
        info d2.qcow2
        info --output=json d2.qcow2
        info --output=json d3.qcow2
        info z.qcow2
        info --output=json z.qcow2
        info left1.qcow2
        info --output=json left1.qcow2
        info left2.qcow2
        info --output=json left2.qcow2
        info --backing-chain left2.qcow2
        info --image-opts driver=qcow2,file.filename=a.qcow2,data-file.filename=e.raw
        info --image-opts driver=qcow2,file.filename=a.qcow2,data-file.filename=nope
        map --image-opts driver=qcow2,file.filename=a.qcow2,data-file.filename=e.raw
        check --image-opts driver=qcow2,file.filename=a.qcow2,data-file.filename=e.raw
        check --output=json tiny0.qcow2
        check --output=json tiny1.qcow2
        check --output=json tiny2.qcow2
        check d1.qcow2
        check --output=json d2.qcow2
        check d3.qcow2
        check z.qcow2
        map --output=json d2.qcow2
        map d2.qcow2
        map --output=json z.qcow2
        compare d1.qcow2 d1.qcow2
        create -f qcow2 -o data_file=n1.raw n1.qcow2 8M
        create -f qcow2 -o data_file=n2.raw,data_file_raw=on n2.qcow2 200k
        create -f qcow2 -o data_file=n3.raw,preallocation=metadata n3.qcow2 1M
        create -f qcow2 -o data_file=n4.raw,preallocation=full,extended_l2=on n4.qcow2 1M
        create -f qcow2 -o compression_type=zstd n5.qcow2 1M
        create -f qcow2 -o compression_type=lzma n6.qcow2 1M
        create -f qcow2 -o compression_type=zstd,compat=0.10 n6.qcow2 1M
        create -f qcow2 -o data_file=n6.raw,compat=0.10 n6.qcow2 1M
        create -f qcow2 -o data_file_raw=on n6.qcow2 1M
        create -f qcow2 -o data_file=n6.raw,data_file_raw=on -b a.qcow2 -F qcow2 n6.qcow2 1M
        create -f qcow2 -o data_file=n7.raw -b a.qcow2 -F qcow2 n7.qcow2
        info --output=json n1.qcow2
        info n2.qcow2
        check n2.qcow2
        check n3.qcow2
        check n4.qcow2
        map --output=json n1.qcow2
        map --output=json n7.qcow2
        resize d1.qcow2 6M
        resize d2.qcow2 5M
        resize --shrink d3.qcow2 1100k
        resize --preallocation=full n1.qcow2 9M
        check d1.qcow2
        check d2.qcow2
        check d3.qcow2
        convert -O qcow2 -o data_file=t1.raw a.qcow2 t1.qcow2
        convert -O qcow2 -o data_file=t2.raw,data_file_raw=on a.qcow2 t2.qcow2
        amend -o data_file_raw=on t2.qcow2
        info --output=json t2.qcow2
        convert -O qcow2 -o data_file=t3.raw,extended_l2=on d1.qcow2 t3.qcow2
        convert -O qcow2 -c -o data_file=t4.raw a.qcow2 t4.qcow2
        convert -O qcow2 -c -o compression_type=zstd a.qcow2 t5.qcow2
        convert -O qcow2 -c -o compression_type=zstd,extended_l2=on d1.qcow2 t6.qcow2
        convert -O qcow2 -C -o data_file=t7.raw r.raw t7.qcow2
        convert -O raw d2.qcow2 t1.out
        convert -O qcow2 -o preallocation=metadata,data_file=t8.raw a.qcow2 t8.qcow2
        check t1.qcow2
        check t2.qcow2
        check t8.qcow2",
    );
    for name in [
        "d1", "d2", "d3", "n1", "n2", "n3", "n4", "n7", "t1", "t2", "t3", "t5", "t6", "t7", "t8",
    ] {
        both.same_content("qcow2", &format!("{name}.qcow2"));
    }
    for name in ["d2.raw", "t2.raw", "t1.out"] {
        both.same_content("raw", name);
    }
    both.finish();
}

#[test]
fn measure_gives_qemu_imgs_numbers_for_every_combination_of_options() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    let sizes = ["0", "1", "511k", "4M", "1G", "100G", "5T"];
    let mut options = vec![String::new()];
    for cluster in ["512", "4k", "16k", "64k", "2M"] {
        for refcount in [1, 16, 64] {
            options.push(format!("cluster_size={cluster},refcount_bits={refcount}"));
        }
        options.push(format!("cluster_size={cluster},compat=0.10"));
        options.push(format!("cluster_size={cluster},extended_l2=on"));
        options.push(format!(
            "cluster_size={cluster},data_file=x,data_file_raw=on"
        ));
    }
    for more in [
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "extended_l2=on,preallocation=metadata",
        "extended_l2=on,preallocation=full",
        "data_file=x",
        "data_file=x,preallocation=full",
        "data_file_raw=on",
        "compat=0.10,data_file=x",
        "compression_type=zstd",
        "compression_type=zstd,compat=0.10",
        "lazy_refcounts=on",
        "backing_file=x,backing_fmt=raw",
        "backing_file=a.qcow2",
        "cluster_size=3k",
        "refcount_bits=3",
    ] {
        options.push(more.to_owned());
    }
    for option in &options {
        for size in sizes {
            // Not every option with every size: programs take time to start.
            if option.contains("refcount_bits=64") && size != "100G"
                || option.contains("compat=0.10") && size == "0"
            {
                continue;
            }
            let list = if option.is_empty() {
                String::new()
            } else {
                format!(" -o {option}")
            };
            both.compare(&format!("measure --size {size} -O qcow2{list}"));
        }
    }
    for file in [
        "d1.qcow2", "d2.qcow2", "d3.qcow2", "a.qcow2", "z.qcow2", "o.qcow2", "r.raw",
    ] {
        for list in [
            "",
            " -o cluster_size=4k",
            " -o extended_l2=on",
            " -o data_file=x",
            " -o preallocation=full",
        ] {
            if (list, file) == (" -o cluster_size=4k", "d1.qcow2") {
                // Holes in the data file aren't counted here.
                continue;
            }
            both.compare(&format!("measure --output=json -O qcow2{list} {file}"));
        }
        for list in [
            "backing_file=a.qcow2",
            "backing_file=,compat=0.10",
            "backing_file=nope,cluster_size=512,compat=0.10",
            "backing_file=a.qcow2,extended_l2=on",
            "backing_file=a.qcow2,preallocation=full",
            "backing_fmt=qcow2,compat=0.10",
        ] {
            both.compare(&format!("measure --output=json -O qcow2 -o {list} {file}"));
        }
        both.compare(&format!("measure -O raw {file}"));
        both.compare(&format!("measure -O vmdk {file}"));
    }
    both.compare_all(
        "measure --size 1000 -O raw
        measure --size 1000 -O raw -o preallocation=full
        measure --size 5G -O raw --output=json
        measure --size 1G -O vmdk
        measure --size 1G -O qcow2 -o size=2G
        measure --size 9E -O qcow2
        measure -O qcow2 -o size=1G
        measure --size 1G -O qcow2 -o compression_type=lzma
        measure --size 1G -O qcow2 -o data_file_raw=maybe",
    );
    both.finish();
}

/// An image in `d` whose data file qemu has made where it ran; there is no data file beside the image.
const ELSEWHERE: &str = r"
mkdir d
qemu-img create -q -f qcow2 -o data_file=x.raw d/a.qcow2 1M
qemu-io -c 'write -P 1 64k 64k' d/a.qcow2
";

#[test]
fn a_relative_data_file_is_found_where_the_program_runs_and_beside_the_image() {
    if !qemu_is_installed() {
        return;
    }
    let commands = "info d/a.qcow2
        check d/a.qcow2
        map --output=json d/a.qcow2
        compare d/a.qcow2 r.raw
        resize d/a.qcow2 2M
        convert -O raw d/a.qcow2 out.raw";
    let like = "truncate -s 1M r.raw; qemu-io -f raw -c 'write -P 1 64k 64k' r.raw";
    let mut both = SideBySide::new(&format!("{ELSEWHERE}{like}"));
    both.compare_all(commands);
    both.same_content("raw", "out.raw");
    both.finish();

    let made = "create -f qcow2 -o data_file=x.raw d/a.qcow2 1M
        info d/a.qcow2
        create -f qcow2 -o data_file=file:d/y.raw d/b.qcow2 1M
        info d/b.qcow2
        convert -O qcow2 -o data_file=d/z.raw,data_file_raw=on r.raw d/c.qcow2
        info d/c.qcow2
        compare d/c.qcow2 r.raw
        create -f qcow2 -o data_file=nowhere/x.raw d/e.qcow2 1M";
    let mut both = SideBySide::new(&format!("mkdir d; {like}"));
    both.compare_all(made);
    for file in ["x.raw", "d/y.raw", "d/z.raw"] {
        both.same_content("raw", file);
    }
    both.finish();

    // Where it is a link to the same file there is no doubt.
    let both = SideBySide::new(&format!("{ELSEWHERE}{like}; ln -s ../x.raw d/x.raw"));
    for command in ["compare d/a.qcow2 r.raw", "check d/a.qcow2"] {
        assert!(both.ours_alone(command).status.success(), "{command}");
    }

    // Beside the image, as a backing file is, it is found from everywhere.
    let both = SideBySide::new(&format!("{ELSEWHERE}{like}; mv x.raw d"));
    let compared = both.ours_alone("compare d/a.qcow2 r.raw");
    assert!(compared.status.success(), "{compared:?}");

    // Two that may be meant, or none.
    for (change, words) in [
        (
            "cp x.raw d",
            "The data file may be 'd/x.raw', beside the image, or 'x.raw', where the program runs",
        ),
        (
            "rm x.raw",
            "Could not open 'd/x.raw': No such file or directory",
        ),
    ] {
        let both = SideBySide::new(&format!("{ELSEWHERE}{change}"));
        let refused = both.ours_alone("convert -O raw d/a.qcow2 out.raw");
        assert_eq!(refused.status.code(), Some(1));
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(said.contains(words), "{said}");
        let options =
            "driver=qcow2,file.filename=d/a.qcow2,data-file.driver=file,data-file.filename=x.raw";
        let given = both.ours_alone(&format!("convert --image-opts -O raw {options} out.raw"));
        assert_eq!(
            given.status.success(),
            change.starts_with("cp"),
            "{given:?}"
        );
    }
}
