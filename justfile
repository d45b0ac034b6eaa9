# Every command that a contributor needs. `just` lists them.

default:
    @just --list

# README's first command: guest I/O, four jobs and a verdict
live *args:
    cargo run --release -- live {{args}}

# README's second command
test:
    cargo test --workspace

# What a change has to pass before it lands
check: fmt-check clippy doc test loom

fmt-check:
    cargo fmt --all -- --check

clippy:
    cargo clippy --workspace --all-targets -- -D warnings

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# All interleavings of the shipped gate and pins, in small cases
loom:
    RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 CARGO_TARGET_DIR=target/loom cargo test --release -p block-core --test loom_tracked --test loom_pins
    RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p format-qcow2 --lib -- loom

# Undefined behaviour in the buffers (`rustup component add miri rust-src --toolchain nightly` first; four minutes)
miri:
    cargo +nightly miri test -p block-core --lib buffer

# The numbers that the README speaks of
bench:
    cargo bench -p block-core --bench tracked
    cargo bench -p protocol-file --bench inline_read
    cargo bench -p tools --bench stack
    cargo bench -p format-qcow2 --bench check

# The conformance suite and the race tests as a program: run, list, race, crash, storm-commands
iotests *args:
    cargo run --release -p iotests -- {{args}}

# Licences, bans, advisories (needs cargo-deny)
deny:
    cargo deny check

# The suite as the program runs it, on everything: all cases, 20,000 seeds of each format, every schedule of small scenarios
suite:
    cargo build --release -p iotests
    target/release/iotests run
    target/release/iotests simulate --seeds 0..20000 -f qcow2
    target/release/iotests simulate --seeds 0..20000 -f raw
    target/release/iotests simulate --seeds 0..20000 -f vmdk
    target/release/iotests explore
    target/release/iotests crash -f qcow2

# The worked example, the steps of its tutorial, and the copies that forget one duty (minutes)
examples:
    cargo test -p format-ledger --test conformance
    cargo test -p writing-a-driver --test steps
    cargo test -p forgotten-duties --test named

# All images of the matrix of qcow2 options, made by qemu's tools and by ours, judged by both (minutes; needs qemu-img)
matrix:
    cargo test -p tools --test matrix -- --ignored --nocapture the_whole_matrix

# Hunts every seeded bug with the whole suite: what finds it, and how fast (docs/mutants.md)
mutants *args:
    cargo run --release -p iotests --features mutants -- mutants {{args}}
