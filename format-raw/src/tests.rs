//! Tests of the whole driver on files, some of them side by side with the installed qemu tools.

use std::{process::Command, sync::Arc};

use block_core::{
    BlockHandle, DriverFactory, DriverKind, Error, ErrorKind, Graph, OpenOptions, Options,
    PermissionSet, Permissions, Registry, RequestFlags, Result, async_trait,
    driver::Truncate,
    registry::{OpenContext, Opened},
};
use env_tokio::EnvTokio;
use futures::executor::block_on;
use protocol_file::FileFactory;
use tempfile::TempDir;

use crate::RawFactory;

/// A format that is nothing but a magic.
struct Magic(&'static [u8]);

#[async_trait]
impl DriverFactory for Magic {
    fn name(&self) -> &'static str {
        "magic"
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: &str) -> u32 {
        u32::from(head.starts_with(self.0)) * 100
    }

    async fn open(&self, _context: OpenContext, _options: Options) -> Result<Opened> {
        Err(Error::invalid("only probed"))
    }
}

struct World {
    dir: TempDir,
    registry: Arc<Registry>,
    graph: Arc<Graph>,
}

impl World {
    fn new() -> Self {
        let registry = Registry::new()
            .with(FileFactory::new())
            .with(RawFactory)
            .with(Magic(b"QFI\xfb"));
        Self {
            dir: tempfile::tempdir().unwrap(),
            registry: Arc::new(registry),
            graph: Graph::new(Arc::new(EnvTokio::new(1).unwrap())),
        }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn create(&self, name: &str, options: &str) -> Result<()> {
        let options = Options::from_dotted(options)?;
        block_on(
            self.registry
                .create(&self.graph, "raw", &self.path(name), options),
        )
    }

    fn open(&self, name: &str, format: Option<&str>, options: &str) -> Result<BlockHandle> {
        let options = Options::from_dotted(options)?;
        let path = self.path(name);
        let how = OpenOptions::default();
        let node = block_on(
            self.registry
                .open_file(&self.graph, &path, format, options, how),
        )?;
        let set = PermissionSet::new(Permissions::all(), Permissions::all());
        self.graph.attach(&node, set, "guest")
    }
}

fn write(handle: &BlockHandle, offset: u64, bytes: &[u8]) -> Result<()> {
    block_on(handle.write(offset, bytes.to_vec(), RequestFlags::empty()))
}

fn read(handle: &BlockHandle, offset: u64, len: usize) -> Vec<u8> {
    block_on(handle.read(offset, len)).unwrap().to_vec()
}

#[test]
fn what_is_written_lies_in_the_file_at_the_offset() {
    let world = World::new();
    std::fs::write(world.path("a"), vec![7; 10240]).unwrap();
    let handle = world
        .open("a", Some("raw"), "offset=1000,size=2048")
        .unwrap();
    assert_eq!(handle.length(), 2048);
    write(&handle, 10, &[1; 20]).unwrap();
    block_on(handle.write_zeroes(100, 50, RequestFlags::MAY_UNMAP)).unwrap();
    assert_eq!(read(&handle, 0, 2048)[10..30], [1; 20]);
    assert_eq!(
        write(&handle, 2040, &[1; 9]).unwrap_err().kind(),
        ErrorKind::Io
    );
    block_on(handle.close()).unwrap();
    let mut wanted = vec![7; 10240];
    wanted[1010..1030].fill(1);
    wanted[1100..1150].fill(0);
    assert_eq!(std::fs::read(world.path("a")).unwrap(), wanted);
}

#[test]
fn ranges_outside_of_the_file_are_refused_with_qemus_words() {
    let world = World::new();
    std::fs::write(world.path("a"), vec![0; 1 << 20]).unwrap();
    for (offset, size) in [
        (2 << 20, None),
        (65536, Some(1 << 20)),
        (65536, Some(1000)),
        (u64::MAX >> 1, Some(512)),
    ] {
        let mut options = format!("offset={offset}");
        if let Some(size) = size {
            options.push_str(&format!(",size={size}"));
        }
        let ours = world.open("a", Some("raw"), &options).unwrap_err().reason();
        let mut name = format!(
            "driver=raw,file.driver=file,file.filename={},",
            world.path("a")
        );
        name.push_str(&options);
        let Ok(output) = Command::new("qemu-img")
            .args(["info", "--image-opts", &name])
            .output()
        else {
            eprintln!("qemu-img isn't installed: nothing to compare with");
            continue;
        };
        let theirs = String::from_utf8(output.stderr).unwrap();
        assert!(theirs.trim_end().ends_with(&ours), "{theirs} / {ours}");
    }
}

#[test]
fn a_raw_image_can_be_resized_unless_its_size_is_fixed() {
    let world = World::new();
    world.create("a", "size=1000").unwrap();
    let handle = world.open("a", Some("raw"), "offset=512").unwrap();
    assert_eq!(handle.length(), 512);
    block_on(handle.truncate(4096, Truncate::default())).unwrap();
    assert_eq!(handle.length(), 4096);
    assert_eq!(std::fs::metadata(world.path("a")).unwrap().len(), 4608);
    // Too long for the file's offsets.
    assert!(block_on(handle.truncate(i64::MAX as u64, Truncate::default())).is_err());
    block_on(handle.close()).unwrap();
    let handle = world.open("a", Some("raw"), "size=512").unwrap();
    let error = block_on(handle.truncate(1024, Truncate::default())).unwrap_err();
    assert_eq!(error.reason(), "Cannot resize fixed-size raw disks");
}

#[test]
fn a_guessed_raw_image_does_not_become_another_format() {
    let world = World::new();
    world.create("a", "size=64k").unwrap();
    let handle = world.open("a", None, "").unwrap();
    assert_eq!(handle.node().driver().name(), "raw");
    let refused = |result: Result<()>| {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::NotPermitted);
    };
    refused(write(&handle, 0, b"QFI\xfb and more"));
    refused(write(
        &handle,
        0,
        &[b"QFI\xfb".as_slice(), &vec![0; 60000]].concat(),
    ));
    // In two steps, and backwards.
    write(&handle, 2, b"I\xfb").unwrap();
    refused(write(&handle, 0, b"QF"));
    write(&handle, 0, b"QG").unwrap();
    refused(write(&handle, 1, b"F"));
    // Twice, so that the mapped way would be taken if there was one.
    refused(write(&handle, 1, b"F"));
    assert_eq!(read(&handle, 0, 4), b"QGI\xfb");
    write(&handle, 4096, b"QFI\xfb").unwrap();
    block_on(handle.write_zeroes(0, 65536, RequestFlags::empty())).unwrap();
    assert_eq!(read(&handle, 0, 65536), vec![0; 65536]);
}

#[test]
fn two_harmless_writes_at_once_make_no_header_together() {
    let world = World::new();
    world.create("a", "size=64k").unwrap();
    for _ in 0..50 {
        let handle = world.open("a", None, "").unwrap();
        let (first, second) = std::thread::scope(|scope| {
            let first = scope.spawn(|| write(&handle, 0, b"QF"));
            let second = write(&handle, 2, b"I\xfb");
            (first.join().unwrap(), second)
        });
        assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
        write(&handle, 0, &[0; 512]).unwrap();
        block_on(handle.close()).unwrap();
    }
}

#[test]
fn a_raw_image_that_was_named_so_takes_any_header() {
    let world = World::new();
    world.create("a", "size=64k").unwrap();
    let handle = world.open("a", Some("raw"), "").unwrap();
    write(&handle, 0, b"QFI\xfb").unwrap();
    assert_eq!(read(&handle, 0, 4), b"QFI\xfb");
}

#[test]
fn block_status_is_that_of_the_file() {
    let world = World::new();
    world.create("a", "size=1M").unwrap();
    let handle = world.open("a", Some("raw"), "offset=64k").unwrap();
    write(&handle, 65536, &vec![1; 65536]).unwrap();
    let status = block_on(handle.block_status(65536, 65536)).unwrap();
    assert!(status.is_data() && status.is_allocated());
    let (node, offset) = status.mapped.unwrap();
    assert_eq!((node.driver().name(), offset), ("file", 131072));
    let status = block_on(handle.block_status(131072, 1 << 19)).unwrap();
    assert!(status.is_zero());
}

#[test]
fn creation_and_measuring_round_up_to_sectors() {
    let world = World::new();
    world.create("a", "size=1000").unwrap();
    assert_eq!(std::fs::metadata(world.path("a")).unwrap().len(), 1024);
    let measure = RawFactory.measure(1000, &[], Options::new()).unwrap();
    assert_eq!((measure.required, measure.fully_allocated), (1024, 1024));
    let error = world
        .create("b", "size=1M,preallocation=metadata")
        .unwrap_err();
    assert_eq!(error.reason(), "Unsupported preallocation mode: metadata");
    world.create("b", "size=1M,preallocation=full").unwrap();
    assert!(world.create("c", "size=1M,bogus=1").is_err());
    assert!(RawFactory.measure(u64::MAX, &[], Options::new()).is_err());
}
