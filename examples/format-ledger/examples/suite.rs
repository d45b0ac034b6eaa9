//! The suite as a program, with this driver in it: `cargo run -p format-ledger --example suite -- run -f ledger`.

use std::process::ExitCode;

use block_core::Registry;
use format_ledger::LedgerFactory;
use iotests::Suite;

fn main() -> ExitCode {
    Suite::new(&Registry::new().with(LedgerFactory))
        .with_safeguards(&[format_ledger::NAME])
        .called("cargo run -p format-ledger --example suite --")
        .main()
}
