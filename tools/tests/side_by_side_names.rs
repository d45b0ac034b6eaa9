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
