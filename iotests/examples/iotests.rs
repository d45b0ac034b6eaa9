//! The program with every driver of this workspace in it: `cargo run -p iotests --example iotests -- run`.
//!
//! The crate itself links no driver; a third party's program looks like this one, with their driver registered.

use std::process::ExitCode;

use block_core::Registry;
use format_qcow2::Qcow2Factory;
use format_raw::RawFactory;
use format_vmdk::VmdkFactory;
use iotests::cli::Suite;

fn main() -> ExitCode {
    let registry = Registry::new()
        .with(RawFactory)
        .with(Qcow2Factory::default())
        .with(VmdkFactory);
    let bare = registry
        .clone()
        .with(Qcow2Factory::without_safeguards_for_tests());
    Suite::new(&registry).with_bare(&bare).main()
}
