//! The program with every driver of this workspace in it: `cargo run --release -p iotests -- run`.
//!
//! It decides which drivers there are and nothing else. A third party's program looks like this one with their driver
//! registered, and doesn't need the feature `program`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use block_core::Registry;
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use format_vmdk::VmdkFactory;
use iotests::Suite;
use protocol_file::FileFactory;

fn main() -> ExitCode {
    let registry = Registry::new()
        .with(FileFactory::new())
        .with(RawFactory)
        .with(Qcow2Factory::default())
        .with(VmdkFactory);
    let bare = registry
        .clone()
        .with(Qcow2Factory::without_safeguards_for_tests());
    Suite::new(&registry)
        .with_bare(&bare)
        .with_safeguards(&["qcow2", "vmdk"])
        .called("cargo run --release -p iotests --")
        .main()
}
