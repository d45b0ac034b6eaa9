//! Every command of `qemu-io` with the arguments that it takes, and with those that it doesn't, beside the installed one.

mod support;

use support::{SideBySide, qemu_is_installed};

const IMAGES: &str = r"
qemu-img create -q -f qcow2 a.qcow2 64M
qemu-io -f qcow2 -c 'write -P 1 0 1M' a.qcow2
qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 o.qcow2
qemu-img create -q r.raw 1M
printf pattern > pat; : > empty
head -c 30 a.qcow2 > trunc.qcow2
";

/// Each is run for itself; what they write stays for those behind them.
const LINES: &[&str] = &[
    "aio_flush",
    "aio_flush x",
    "aio_read",
    "aio_read 0",
    "aio_read 0 4k",
    "aio_read -q 0 4k",
    "aio_read -P 1 0 4k",
    "aio_read -P 2 0 4k",
    "aio_read -v 0 16",
    "aio_read -C 0 4k",
    "aio_read -i 0 4k",
    "aio_read -z 0 4k",
    "aio_read 0 1k 2k",
    "aio_read 100M 4k",
    "aio_read 1 2",
    "aio_read x 4k",
    "aio_read 0 x",
    "aio_read -P 999 0 4k",
    "aio_write",
    "aio_write 0",
    "aio_write 2M 4k",
    "aio_write -z 2M 4k",
    "aio_write -u 2M 4k",
    "aio_write -z -u 2M 4k",
    "aio_write -P 1 -z 2M 4k",
    "aio_write -f 2M 4k",
    "aio_write -i 2M 4k",
    "aio_write -q 2M 4k",
    "aio_write -C 2M 4k",
    "aio_write -n 2M 4k",
    "aio_write -z 2M 4k 4k",
    "aio_write 2M 4k 8k",
    "aio_write 100M 4k",
    "alloc",
    "alloc 0",
    "alloc 0 1M",
    "alloc 0 4k 1",
    "alloc 63M 2M",
    "alloc 100M",
    "alloc x",
    "alloc 0 x",
    "alloc 1",
    "alloc 512 1",
    "alloc -1",
    "break",
    "break l2_load",
    "break l2_load A",
    "break bogus A",
    "remove_break A",
    "remove_break",
    "resume A",
    "resume",
    "wait_break",
    "discard",
    "discard 0",
    "discard 0 64k",
    "discard -q 0 64k",
    "discard -C 0 64k",
    "discard -z 0 64k",
    "discard 0 64k 1",
    "discard 64M 64k",
    "discard 63M 2M",
    "discard 0 0",
    "discard 1 1",
    "discard 0 4G",
    "discard -1 4k",
    "discard 0 x",
    "flush",
    "flush x",
    "help bogus",
    "help read write",
    "help q",
    "help f",
    "info",
    "info x",
    "i",
    "length",
    "length x",
    "l",
    "map",
    "map x",
    "q",
    "quit",
    "quit x",
    "read",
    "read 0",
    "read 0 4k",
    "read 0 4k 8k",
    "read -v 0 20",
    "read -v 3 20",
    "read -q 0 4k",
    "read -C 0 4k",
    "read -P 1 0 4k",
    "read -P 2 0 4k",
    "read -P 1 -s 1k 0 4k",
    "read -P 1 -s 1k -l 1k 0 4k",
    "read -P 1 -s 5k 0 4k",
    "read -P 1 -l 5k 0 4k",
    "read -P 1 -s 2k -l 3k 0 4k",
    "read -s 1k 0 4k",
    "read -l 1k 0 4k",
    "read -P 0x1 0 4k",
    "read -P 01 0 4k",
    "read -P 256 0 4k",
    "read -P -1 0 4k",
    "read -P x 0 4k",
    "read -P 1x 0 4k",
    "read -z 0 4k",
    "read -b 0 4x",
    "read -p 0 4k",
    "read -r 0 4k",
    "read 0 1",
    "read 1 1",
    "read 0 0",
    "read -1 4k",
    "read 0 -1",
    "read 64M 1",
    "read 63M 2M",
    "read 1T 4k",
    "read 8E 4k",
    "read 0 2G",
    "read 0 4G",
    "read 0 0x1000",
    "read 0x200 0x200",
    "read 010 010",
    "read 1.5k 512",
    "read 1k 1.5k",
    "read 0 1.3",
    "read 0 1e3",
    "read +0 4k",
    "read 0 4kB",
    "read 0 4K",
    "read 0 4b",
    "read 0 4096b",
    "read 0 ''",
    "readv",
    "readv 0",
    "readv 0 4k",
    "readv 0 4k 8k 512",
    "readv -P 1 0 4k 4k",
    "readv -P 2 0 4k 4k",
    "readv -v 0 8 8",
    "readv -q 0 8 8",
    "readv -z 0 8",
    "readv -s 1 0 8",
    "readv 0 2G 2G",
    "readv 64M 1",
    "reopen",
    "reopen x",
    "reopen -r",
    "reopen -w",
    "reopen -r -w",
    "reopen -c bogus",
    "reopen -o lazy-refcounts=on",
    "reopen -o bogus=1",
    "reopen -o driver=raw",
    "reopen -r -o read-only=off",
    "reopen -c writeback -o cache.direct=on",
    "reopen -w -o read-only=on",
    "reopen -o discard=bogus",
    "reopen -z",
    "sigraise",
    "sigraise x",
    "sigraise 0",
    "sigraise 1x",
    "sleep",
    "sleep 0",
    "sleep x",
    "sleep -1",
    "sleep 1 2",
    "truncate",
    "truncate 32M",
    "truncate 128M",
    "truncate x",
    "truncate 1 2",
    "truncate -m off 128M",
    "truncate -m bogus 128M",
    "truncate -m metadata 128M",
    "truncate -m full 65M",
    "truncate -m falloc 65M",
    "truncate -z 1M",
    "truncate 100",
    "truncate -1",
    "write",
    "write 0",
    "write 2M 4k",
    "write 2M 4k 8k",
    "write -P 5 2M 4k",
    "write -P 256 2M 4k",
    "write -q 2M 4k",
    "write -C 2M 4k",
    "write -z 2M 4k",
    "write -z -u 2M 64k",
    "write -u 2M 4k",
    "write -n 2M 4k",
    "write -z -n 2M 4k",
    "write -z -n 2M 64k",
    "write -c 2M 64k",
    "write -c 2M 4k",
    "write -c -z 2M 4k",
    "write -c 2M 128k",
    "write -c -P 3 2M 64k",
    "write -b -z 0 4k",
    "write -f 2M 4k",
    "write -z -f 2M 4k",
    "write -c -f 2M 64k",
    "write -s pat 2M 4k",
    "write -s nope 2M 4k",
    "write -s empty 2M 4k",
    "write -s pat -P 1 2M 4k",
    "write -P 1 -z 2M 4k",
    "write -s pat -z 2M 4k",
    "write -r 2M 4k",
    "write -p 2M 4k",
    "write 0 1",
    "write 1 1",
    "write 0 0",
    "write 64M 1",
    "write 63M 2M",
    "write -1 1",
    "write 0 -1",
    "write 0 x",
    "write x 0",
    "write 0 3G",
    "write -z 0 3G",
    "write -z 0 64M",
    "write -z 1 3",
    "writev",
    "writev 0",
    "writev 2M 4k",
    "writev 2M 4k 8k",
    "writev -P 7 2M 4k 8k",
    "writev -P x 2M 4k",
    "writev -q 2M 4k",
    "writev -C 2M 4k",
    "writev -f 2M 4k",
    "writev -z 2M 4k",
    "writev 64M 4k",
    "writev 2M 2G 2G",
    "abort x",
    "zone_report",
    "zone_report 0 1",
    "zone_open 0 1",
    "zone_append 0 1",
    "za 0 1",
    "zrp 0 1",
    "bogus",
    "open a.qcow2",
    "open",
    "close",
    "close x",
    "r 0 512",
    "w 0 512",
    "f",
    "d 0 64k",
    "rv 0 512",
    "wv 0 512",
    "ar 0 512",
    "aw 0 512",
    "t 128M",
    "c",
    "o",
    "af",
    "s 1",
    "read -P 1 -q 0 4k -v",
    "read 0 4k -q",
    "write 0 4k -P 3",
    "read -- 0 4k",
    "read -qv 0 8",
    "read -P1 0 8",
    "readv 0 1G 1G 1G",
    "readv 0 1G 2G",
    "readv 0 3G",
    "readv 0 4x",
    "writev 0 1G 2G",
    "aio_read 0 2G",
    "aio_write 0 3G",
    "aio_write -z 0 3G",
    "write -n 0 3G",
    "write -z -n 0 3G",
    "write -z -n 0 64M",
    "write -z -u 0 3G",
    "write -c 0 3G",
    "read 0 3G",
    "write -b -f 0 4k",
    "write -c -f -z 0 64k",
    "sigraise",
    "sigraise 17",
    "sigraise 1 2",
    "sigraise -1",
    "zone_append 0 1 2",
    "zone_append 0 x 2",
    "zone_close 0 x",
    "zone_finish 0 1",
    "zone_open 0 1",
    "zone_reset 0 1 2",
    "zap 0 1",
    "zc 0 1",
    "zf 0 1",
    "zo 0 1",
    "zrs 0 1",
    "help zap",
    "help l",
    "help i",
    "help bogus",
    "sleep 0x10",
    "sleep 1x",
    "alloc 0 -1",
    "alloc 64M",
    "alloc 0 100M",
    "alloc 8E",
    "truncate 1 2 3",
    "truncate 1 2 3 4",
    "truncate 64M 5",
    "truncate -m",
    "discard -q",
    "discard -q 0",
];

#[test]
fn commands_answer_odd_arguments_as_qemu_io_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::made_twice(IMAGES);
    for line in LINES {
        both.io(&["-f", "qcow2", "-c", line, "a.qcow2"], "");
    }
    both.same_content("qcow2", "a.qcow2");
    both.finish();
}

#[test]
fn commands_that_cannot_do_their_work_say_so_as_qemu_io_does() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::made_twice(IMAGES);
    for line in [
        "read 0 512",
        "write 0 512",
        "aio_write 0 512",
        "write -z 0 512",
        "discard 0 512",
        "truncate 1M",
        "writev 0 512",
        "flush",
        "reopen -w",
    ] {
        both.io(&["-r", "-f", "qcow2", "-c", line, "a.qcow2"], "");
    }
    for line in [
        "read 0 512",
        "write 0 512",
        "close",
        "flush",
        "length",
        "info",
        "map",
        "sleep 0",
        "bogus",
        "reopen",
        "quit",
        "aio_flush",
        "sigraise 0",
        "truncate 1",
        "read",
        "write",
        "open",
    ] {
        both.io(&["-c", line], "");
    }
    for input in [
        "read 0 512\nbogus\n\n  \nquit\nread 0 512\n",
        "read 0 512\nwrite 0 512\n",
        "close\nread 0 512\nopen o.qcow2\nread 0 512\n",
        "# comment\nread 0 512 # comment\n",
    ] {
        both.io(&["-f", "qcow2", "a.qcow2"], input);
    }
    both.finish();
}

#[test]
fn an_image_that_cannot_be_opened_is_called_by_its_name_where_it_has_one() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::made_twice(IMAGES);
    for args in [
        "nope",
        "-f qcow2 nope",
        "-r nope",
        "-f qcow2 r.raw",
        "-f bogus r.raw",
        "r.raw",
        "-r r.raw",
        "trunc.qcow2",
        "-f qcow2 trunc.qcow2",
        "bogus:x",
        "-f qcow2 -t bogus a.qcow2",
        "-f qcow2 -d bogus a.qcow2",
        "-f qcow2 -i bogus a.qcow2",
        "-C -r -f qcow2 o.qcow2",
        "-C -f qcow2 o.qcow2",
        "-m -f qcow2 a.qcow2",
        "--image-opts driver=qcow2,file.filename=nope",
        "--image-opts driver=qcow2,file.filename=r.raw",
        "--image-opts driver=bogus,file.filename=r.raw",
        "--image-opts file.filename=nope",
        "--image-opts file.filename=a.qcow2",
        "--image-opts filename=nope",
        "--image-opts filename=a.qcow2",
        "--image-opts driver=qcow2,filename=a.qcow2",
        "--image-opts driver=qcow2,bogus=1,file.filename=a.qcow2",
        "--image-opts driver=qcow2,file.filename=o.qcow2,backing=",
        "--image-opts -f qcow2 a.qcow2",
        r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"nope"}}"#,
    ] {
        let mut args: Vec<&str> = args.split(' ').collect();
        args.extend(["-c", "info", "-c", "read 0 512"]);
        both.io(&args, "");
    }
    for line in [
        "open nope",
        "open a b",
        "open -t bogus a.qcow2",
        "open -d bogus a.qcow2",
        "open -z a.qcow2",
        "open r.raw",
        "open -r r.raw",
        "open -o driver=qcow2 nope",
        "open -o driver=qcow2 a.qcow2",
        "open -o driver=qcow2 r.raw",
        "open -o driver=bogus a.qcow2",
        "open -o driver=qcow2,bogus=1 a.qcow2",
        "open -o lazy-refcounts=on a.qcow2",
        "open -o driver=qcow2,file.filename=nope",
        "open -o driver=qcow2,file.filename=a.qcow2",
        "open -o file.filename=nope",
        "open -o file.filename=a.qcow2",
        "open -o filename=a.qcow2",
        "open -o driver=qcow2 -o lazy-refcounts=on a.qcow2",
        "open -o driver=qcow2,backing= o.qcow2",
    ] {
        both.io(
            &[
                "-c",
                line,
                "-c",
                "info",
                "-c",
                "read 0 512",
                "-c",
                "open a.qcow2",
            ],
            "",
        );
    }
    both.finish();
}

#[test]
fn vm_state_is_read_and_written_in_the_same_words() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(
        "qemu-img create -q -f qcow2 -o cluster_size=4k a.qcow2 1M
        qemu-img create -q -f qcow2 -o compat=0.10 b.qcow2 1M
        qemu-img create -q -f qcow2 -o cluster_size=16k,extended_l2=on c.qcow2 1M
        qemu-img create -q -f raw r.raw 1M
        qemu-img create -q -f vmdk v.vmdk 1M",
    );
    for (format, name) in [
        ("qcow2", "a.qcow2"),
        ("qcow2", "b.qcow2"),
        ("qcow2", "c.qcow2"),
        ("raw", "r.raw"),
        ("vmdk", "v.vmdk"),
    ] {
        for line in [
            "read -b -v 0 512",
            "read -b 0 16",
            "write -b 100 512",
            "write -b 0 100",
            "write -b -P 5 512 10k",
            "read -bv 0 1k",
            "read -b -P 5 512 10k",
            "read -b -P 6 512 10k",
            "read -b -P 0 16k 64k",
            "read -b -P 0 1G 4k",
            "read -bq 0 4k",
            "read -bC 16k 512",
            "write -bz 0 4k",
            "write -bc -P 9 20k 4k",
            "read -b -P 9 20k 4k",
            "write -bf 0 4k",
            "write -bzc 0 4k",
            "write -bzf 0 4k",
            "write -b -u 0 4k",
            "write -b -n 0 4k",
            "write -bq 0 4k",
            "write -b -P 7 4M 8k",
            "read -b -P 7 4M 8k",
            "writev -b 0 4k",
            "readv -b 0 4k",
            "aio_write -b 0 4k",
            "write -b",
            "read -b 0",
            "read -P 0 0 1M",
        ] {
            both.io(&["-f", format, "-c", line, name], "");
        }
        both.io(&["-r", "-f", format, "-c", "read -b 0 512", name], "");
        both.io(&["-r", "-f", format, "-c", "write -b 0 512", name], "");
        both.same_content(format, name);
    }
    both.finish();
}

#[test]
fn what_is_written_with_snapshot_goes_nowhere() {
    if !qemu_is_installed() {
        return;
    }
    let mut both = SideBySide::new(
        "qemu-img create -q -f qcow2 a.qcow2 1M
        qemu-io -f qcow2 -c 'write -P 1 0 1M' a.qcow2 > /dev/null
        qemu-img create -q -f raw r.raw 1000
        mkdir dir",
    );
    let before = both.ours_alone("info --output=json a.qcow2").stdout;
    for line in [
        "write -P 5 0 64k\nread -P 5 0 64k\nread -P 1 64k 64k\nmap\ninfo\n",
        "truncate 2M\nlength\nwrite -z 1M 4k\nread -P 0 1M 4k\ndiscard 0 64k\nread -P 0 0 64k\n",
    ] {
        both.io(&["-s", "-f", "qcow2", "a.qcow2"], line);
        both.io(&["--snapshot", "-n", "-f", "qcow2", "a.qcow2"], line);
        both.io(&["-s", "-r", "-f", "qcow2", "a.qcow2"], line);
    }
    both.io(
        &[],
        "open -s a.qcow2\nwrite -P 9 0 4k\nread -P 9 0 4k\nclose\nopen a.qcow2\nread -P 1 0 4k\n",
    );
    both.io(
        &["-s", "-f", "raw", "r.raw"],
        "length\nwrite -P 3 0 512\nread -P 3 0 512\n",
    );
    both.io(&["-s", "-f", "raw", "-c", "length", "nope"], "");
    both.io(
        &[
            "-s",
            "--image-opts",
            "-c",
            "length",
            "driver=qcow2,file.filename=a.qcow2",
        ],
        "",
    );
    assert!(both.ours_alone("info --output=json a.qcow2").stdout == before);
    both.io(&["-c", "read -P 1 0 1M", "a.qcow2"], "");
    both.same_content("qcow2", "a.qcow2");
    both.finish();
}

#[test]
fn the_temporary_file_of_a_snapshot_is_gone_at_once() {
    let blk = support::Alone::new();
    assert_eq!(blk.blk(&["create", "-q", "-f", "raw", "a.raw", "1M"]).0, 0);
    let dir = tempfile::tempdir().unwrap();
    let run = |tmp: &std::path::Path| {
        let args = ["io", "-s", "-f", "raw", "-c", "write 0 64k", "a.raw"];
        blk.command(&args).env("TMPDIR", tmp).output().unwrap()
    };
    let done = run(dir.path());
    assert!(done.status.success(), "{done:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let refused = run(&dir.path().join("nowhere"));
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        said.contains("Could not open temporary file") && said.contains("nowhere"),
        "{said}"
    );
}
