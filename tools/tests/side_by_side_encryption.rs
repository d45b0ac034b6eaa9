//! Encrypted images and secrets on the command line, beside the installed `qemu-img`: same output, same messages, same exit
//! status, and images that the other side reads.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
printf 'open sesame' > key; printf 'open sesame\n' > line
S='--object secret,id=s,file=key'
qemu-img create -q $S -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 l.qcow2 4M
qemu-io $S --image-opts -c 'write -P 7 1M 100k' driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2
O=encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv
qemu-img create -q $S -f qcow2 -o $O e.qcow2 4M
qemu-img create -q $S -f qcow2 -o encrypt.format=aes,encrypt.key-secret=s,compat=0.10 a.qcow2 4M
qemu-io $S --image-opts -c 'write -P 9 1M 100k' driver=qcow2,encrypt.key-secret=s,file.filename=a.qcow2
qemu-img create -q -f qcow2 p.qcow2 4M
qemu-io -f qcow2 -c 'write -P 7 1M 100k' p.qcow2
truncate -s 1M r.raw
";

#[test]
fn encrypted_images_are_shown_opened_and_refused_as_by_qemu_img() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "info l.qcow2
        info --output=json l.qcow2
        info --output=json e.qcow2
        info e.qcow2
        info --output=json a.qcow2
        info a.qcow2
        map l.qcow2
        convert -O raw a.qcow2 x.raw
        compare l.qcow2 p.qcow2
        resize l.qcow2 8M
        check --object secret,id=s,file=key --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2
        check --object secret,id=s,data=wrong --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2
        check --object secret,id=s,file=line --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2
        check --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2
        check --image-opts driver=qcow2,encrypt.format=aes,file.filename=l.qcow2
        check --image-opts driver=qcow2,encrypt.format=luks,file.filename=p.qcow2
        check --image-opts driver=qcow2,encrypt.foo=1,file.filename=l.qcow2
        map --output=json --object secret,id=s,file=key --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2
        map --object secret,id=s,file=key --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2
        measure -O qcow2 -o encrypt.format=luks --size 1M
        measure -O qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s --size 1M
        convert -c -O qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s p.qcow2 x.qcow2
        resize --object secret,id=s,file=key --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2 6M
        compare --object secret,id=s,file=key --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2 driver=qcow2,file.filename=p.qcow2
        compare --object secret,id=s,file=key --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=a.qcow2 driver=qcow2,file.filename=p.qcow2",
    );
    both.finish();
}

#[test]
fn encrypted_images_are_created_in_the_same_words() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    both.compare_all(
        "create --object secret,id=s,file=key -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 n.qcow2 4M
        create --object secret,id=s,file=key -f qcow2 -o encryption=on,encrypt.key-secret=s o.qcow2 4M
        create --object secret,id=s,file=key -f qcow2 -o encrypt.format=aes,encrypt.key-secret=s o.qcow2 4M
        create -f qcow2 -o encrypt.format=luks x.qcow2 1M
        create -f qcow2 -o encryption=on x.qcow2 1M
        create -f qcow2 -o encrypt.format=luks,encrypt.key-secret=zz x.qcow2 1M
        create -f qcow2 -o encrypt.format=foo,encrypt.key-secret=zz x.qcow2 1M
        create -f qcow2 -o encrypt.key-secret=zz x.qcow2 1M
        create -f qcow2 -o encryption=on,encrypt.format=luks x.qcow2 1M
        create -f qcow2 -o encrypt.foo=1 x.qcow2 1M
        create -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-alg=des x.qcow2 1M
        create -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.cipher-mode=gcm x.qcow2 1M
        create -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.hash-alg=crc x.qcow2 1M
        create -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=x x.qcow2 1M",
    );
    // The other side opens what was made, with the same secret.
    both.silently(
        "convert --object secret,id=s,file=key --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2 -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 c.qcow2",
    );
    both.compare(
        "compare --object secret,id=s,file=key --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=c.qcow2 driver=qcow2,file.filename=p.qcow2",
    );
    both.finish();
}

#[test]
fn secrets_are_defined_and_refused_as_by_qemu_img() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(IMAGES);
    let key = "secret,id=k,data=MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=,format=base64";
    for object in [
        "secret",
        "secret,id=s",
        "secret,data=a",
        "secret,id=s,data=a",
        "secret,id=s,data=a,file=key",
        "secret,id=s,data=a,foo=1",
        "secret,id=s,file=nope",
        "secret,id=s,data=a,format=hex",
        "secret,id=s,data=a%b=,format=base64",
        "secret,id=s,data=YWJj,format=base64",
        "secret,id=s,data=zz=,format=base64",
        "secret,id=1s,data=a",
        "secret,id=s,data=",
        "qom-type=secret,id=s,data=a",
        "id=s,data=a",
        "foo,id=s",
        "secret,id=s,data=YWJj,format=base64,keyid=k",
        r#"{"qom-type":"secret","id":"s","data":"a"}"#,
    ] {
        both.compare(&format!("info --object {object} r.raw"));
    }
    both.compare("info --object secret,id=s,data=a --object secret,id=s,data=b r.raw");
    for rest in ["", ",iv=YWJj", ",iv=MDEyMzQ1Njc4OWFiY2RlZg=="] {
        let object = format!("secret,id=s,data=YWJj,format=base64,keyid=k{rest}");
        both.compare(&format!("info --object {key} --object {object} r.raw"));
    }
    both.finish();
}

const SLOTS: &str =
    "--object secret,id=s,file=key --object secret,id=n,data=new --object secret,id=w,data=wrong";

/// Slots are added, found and erased in qemu-img's words, and whoever's change it was, the other side opens what is left.
#[test]
fn key_slots_are_added_and_erased_as_by_qemu_img() {
    if !qemu_is_installed() {
        return;
    }
    let open = "--image-opts driver=qcow2,encrypt.key-secret=s,file.filename=l.qcow2";
    let fast = "encrypt.iter-time=10";
    let mut both = SideBySide::new(IMAGES);
    let commands = [
        format!("amend -o encrypt.state=active,encrypt.new-secret=n,{fast} {SLOTS} {open}"),
        format!(
            "amend -o encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=3,{fast} {SLOTS} {open}"
        ),
        format!(
            "amend -o encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=0,{fast} {SLOTS} {open}"
        ),
        format!(
            "amend -o encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=8,{fast} {SLOTS} {open}"
        ),
        format!("amend -o encrypt.state=inactive,encrypt.keyslot=5 {SLOTS} {open}"),
        format!("amend -o encrypt.state=inactive,encrypt.old-secret=w {SLOTS} {open}"),
        format!("amend -o encrypt.state=inactive,encrypt.keyslot=3 {SLOTS} {open}"),
        format!("amend -o encrypt.state=inactive,encrypt.old-secret=n {SLOTS} {open}"),
        format!("amend -o encrypt.state=inactive,encrypt.old-secret=s {SLOTS} {open}"),
        format!("amend -o encrypt.state=inactive,encrypt.keyslot=0 {SLOTS} {open}"),
        "amend -o encrypt.state=inactive,encrypt.keyslot=0 p.qcow2".to_owned(),
        format!("check {SLOTS} {open}"),
        format!("compare {SLOTS} {open} driver=qcow2,file.filename=p.qcow2"),
    ];
    both.compare_all(&commands.join("\n"));
    both.finish();
}

/// Options that decide what is read are in the name that `info` shows; others aren't.
#[test]
fn info_calls_images_that_no_plain_name_opens_by_their_options() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(
        r#"
qemu-img create -q --object secret,id=s,data=letmein -f qcow2 \
    -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 l.qcow2 1M
qemu-img create -q -f qcow2 a.qcow2 4M
qemu-img create -q -f qcow2 -o data_file=d.raw e.qcow2 4M
cp d.raw d2.raw
qemu-img create -q -f raw r.raw 4M
qemu-img create -q -f qcow2 -F raw -b 'json:{"driver":"raw","file.filename":"r.raw","size":1048576}' o.qcow2
"#,
    );
    both.compare_all(
        "info --object secret,id=s,data=letmein --image-opts driver=qcow2,file.filename=l.qcow2,encrypt.key-secret=s
        info --object secret,id=s,data=letmein --output=json --image-opts encrypt.format=luks,driver=qcow2,file.filename=l.qcow2,lazy-refcounts=on,encrypt.key-secret=s
        info --object secret,id=s,data=letmein --output=json json:{\"driver\":\"qcow2\",\"file.filename\":\"l.qcow2\",\"encrypt\":{\"format\":\"luks\",\"key-secret\":\"s\"}}
        info --output=json --image-opts driver=raw,offset=1M,size=1M,file.filename=r.raw
        info --output=json --image-opts driver=raw,offset=0,file.driver=file,file.filename=r.raw
        info --output=json json:{\"driver\":\"raw\",\"size\":512,\"file\":{\"driver\":\"file\",\"filename\":\"r.raw\"}}
        info --output=json --image-opts driver=qcow2,file.filename=a.qcow2
        info --output=json --image-opts driver=qcow2,node-name=x,discard=unmap,lazy-refcounts=on,l2-cache-size=1M,file.filename=a.qcow2,file.locking=on
        info --output=json --image-opts file.driver=file,file.filename=./a.qcow2
        info --output=json --image-opts driver=qcow2,file.filename=e.qcow2,data-file.driver=file,data-file.filename=d2.raw
        info --output=json --backing-chain o.qcow2",
    );
    both.finish();
}
