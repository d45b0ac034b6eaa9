//! The ways to name an image (file names, `json:`, `--image-opts`, formats beside them), beside the installed `qemu-img`.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
qemu-img create -q -f qcow2 a.qcow2 64M
qemu-io -f qcow2 -c 'write -P 1 0 1M' a.qcow2
qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2
qemu-img create -q r.raw 1M
qemu-img create -q -f qcow2 -u -b nope -F qcow2 nb.qcow2 1M
mkdir sub; cp a.qcow2 sub/a.qcow2; (cd sub; qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2)
";

#[test]
fn an_images_file_is_below_it_and_a_file_name_belongs_to_storage() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::made_twice(IMAGES);
    for command in ["info", "map", "check"] {
        for options in [
            "filename=a.qcow2",
            "driver=qcow2,filename=a.qcow2",
            "driver=raw,filename=a.qcow2",
            "driver=qcow2,file.filename=a.qcow2,filename=r.raw",
            "driver=qcow2,file.driver=qcow2,file.filename=a.qcow2",
            "file.filename=a.qcow2",
            "file.driver=file,file.filename=a.qcow2",
            "driver=qcow2",
            "driver=qcow2,file=",
            "driver=qcow2,file=nope",
            "driver=",
            "driver=qcow2,file.filename=a.qcow2,driver=raw",
            "a.qcow2",
            "''",
        ] {
            both.compare(&format!("{command} --image-opts {options}"));
        }
        for json in [
            r#"{"filename":"a.qcow2"}"#,
            r#"{"driver":"qcow2","filename":"a.qcow2"}"#,
            r#"{"file.filename":"a.qcow2"}"#,
            r#"{"file":{"filename":"a.qcow2"}}"#,
            r#"{"driver":"qcow2","file.filename":"a.qcow2"}"#,
            "{}",
        ] {
            both.compare(&format!("{command} json:{json}"));
        }
    }
    both.finish();
}

#[test]
fn a_format_beside_json_options_wins_over_theirs() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::made_twice(IMAGES);
    for format in ["qcow2", "raw"] {
        for (number, json) in [
            r#"{"driver":"file","filename":"a.qcow2"}"#,
            r#"{"file.filename":"a.qcow2"}"#,
            r#"{"file":{"driver":"file","filename":"a.qcow2"}}"#,
            r#"{"driver":"qcow2","file.filename":"a.qcow2"}"#,
            r#"{"driver":"raw","file.filename":"a.qcow2"}"#,
            r#"{"driver":"raw","file.filename":"r.raw"}"#,
            r#"{"filename":"a.qcow2"}"#,
            "{}",
        ]
        .into_iter()
        .enumerate()
        {
            both.compare(&format!("info -f {format} json:{json}"));
            both.compare(&format!("compare -f {format} -F raw json:{json} r.raw"));
            let overlay = format!("overlay-{format}-{number}");
            both.compare(&format!(
                "create -f qcow2 -b json:{json} -F {format} {overlay}"
            ));
            both.compare(&format!("create -f qcow2 -b json:{json} {overlay}-unnamed"));
            both.compare(&format!("info {overlay}"));
            both.compare(&format!("info --backing-chain {overlay}"));
        }
    }
    both.finish();
}

#[test]
fn options_of_a_backing_file_are_for_images_that_can_have_one_and_for_commands_that_open_it() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::made_twice(IMAGES);
    for image in [
        "driver=qcow2,file.filename=o.qcow2",
        "driver=qcow2,file.filename=a.qcow2",
        "driver=raw,file.filename=r.raw",
        "driver=file,filename=r.raw",
    ] {
        for backing in [
            "backing=",
            "backing=nope",
            "backing.driver=qcow2,backing.file.filename=a.qcow2",
            "backing.file.filename=a.qcow2",
            "backing.driver=raw",
            "backing.driver=qcow2",
            "backing.driver=qcow2,backing.filename=a.qcow2",
            "backing.filename=a.qcow2",
        ] {
            // The order in which qemu finds fault with several options isn't that of the command line.
            if backing.matches(',').count() == 0 || image.contains("qcow2") {
                both.compare(&format!("map --image-opts {image},{backing}"));
                both.compare(&format!("check --image-opts {image},{backing}"));
            }
            if backing.matches(',').count() == 0 {
                both.compare(&format!("info --image-opts {image},{backing}"));
            }
        }
    }
    for json in [
        r#"{"driver":"qcow2","file":{"driver":"file","filename":"o.qcow2"},"backing":null}"#,
        r#"{"driver":"qcow2","file":{"driver":"file","filename":"o.qcow2"},"backing":""}"#,
        r#"{"driver":"raw","file":{"driver":"file","filename":"r.raw"},"backing":null}"#,
        r#"{"driver":"qcow2","file":{"driver":"file","filename":"nb.qcow2"},"backing":null}"#,
    ] {
        both.compare(&format!("info json:{json}"));
        both.compare(&format!("map json:{json}"));
        both.compare(&format!("info --backing-chain json:{json}"));
    }
    both.compare_all(
        "compare --image-opts driver=qcow2,file.filename=o.qcow2,backing= driver=qcow2,file.filename=a.qcow2
        info --backing-chain --image-opts driver=qcow2,file.filename=o.qcow2,backing=
        info --backing-chain sub/o.qcow2
        info --backing-chain nb.qcow2
        map --image-opts driver=qcow2,file.filename=sub/o.qcow2,backing.driver=raw
        map --image-opts driver=qcow2,file.filename=nb.qcow2,backing.driver=raw
        map --image-opts driver=qcow2,file.filename=nb.qcow2,backing.file.filename=r.raw",
    );
    both.finish();
}

/// Images in a directory of their own that name others by more than a path relative to themselves.
const NAMING: &str = r#"
mkdir d
for file in b.raw d/b.raw; do qemu-img create -q $file 1M; done
qemu-io -f raw -c 'write -P 3 0 1M' -c 'write -P 4 64k 64k' b.raw
qemu-io -f raw -c 'write -P 5 0 1M' d/b.raw
qemu-img create -q -f qcow2 q.qcow2 1M; qemu-io -c 'write -P 6 128k 64k' q.qcow2
make() {
    qemu-img create -q -f qcow2 -u d/"$1" 512k; qemu-io -c "write -P 7 0 64k" d/"$1"
    qemu-img rebase -u -b "$2" -F "$3" d/"$1"
}
make part 'json:{"driver":"raw","offset":65536,"size":524288,"file":{"driver":"file","filename":"b.raw"}}' raw
make dotted 'json:{"driver":"qcow2","file.driver":"file","file.filename":"q.qcow2"}' qcow2
make above 'json:{"driver":"qcow2","file":{"driver":"file","filename":"d/part"}}' qcow2
make file file:b.raw raw
make debug blkdebug::b.raw raw
make nbd nbd:localhost:1 raw
make bad 'json:{"driver":"raw","file":' raw
make none 'json:{"driver":"raw","file":{"driver":"file","filename":"nowhere"}}' raw
"#;

#[test]
fn names_in_images_may_be_options_and_stand_as_they_are() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::made_twice(NAMING);
    for image in ["part", "dotted", "above", "file", "debug"] {
        both.compare_all(&format!(
            "info d/{image}
            info --output=json d/{image}
            info --backing-chain d/{image}
            map d/{image}
            map --output=json d/{image}
            check d/{image}
            convert -O raw d/{image} {image}.out
            compare d/{image} {image}.out
            compare d/{image} b.raw
            create -f qcow2 -b d/{image} -F qcow2 {image}.over
            convert -O raw {image}.over {image}.out
            rebase -b ../q.qcow2 -F qcow2 d/{image}
            info d/{image}
            convert -O raw d/{image} {image}.out"
        ));
        both.same_content("raw", &format!("{image}.out"));
    }
    for image in ["bad", "none"] {
        both.compare(&format!("info d/{image}"));
        both.silently(&format!("convert -O raw d/{image} x"));
        both.silently(&format!("info --backing-chain d/{image}"));
    }
    both.compare("info d/nbd");
    let json = r#"json:{"driver":"raw","offset":65536,"size":524288,"file.filename":"b.raw"}"#;
    both.compare_all(&format!(
        "create -f qcow2 -b {json} -F raw d/new
        create -f qcow2 -b file:b.raw -F raw d/new2
        create -f qcow2 -b blkdebug::b.raw -F raw d/new3
        info --backing-chain d/new
        info --backing-chain d/new2
        convert -O raw d/new new.out
        rebase -b {json} -F raw d/file
        info d/file
        convert -O raw d/file file.out
        commit d/new
        commit d/file"
    ));
    both.same_content("raw", "new.out");
    both.same_content("raw", "file.out");
    both.same_content("raw", "b.raw");
    both.finish();
}
