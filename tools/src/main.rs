//! `blk`: create, inspect, check, convert and exercise disk images. Called as `qemu-img` (through a symbolic link) it
//! behaves as that program does.
//!
//! This file finds out which program and which command is meant, and nothing else.

#![forbid(unsafe_code)]
#![deny(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "they panic when the reader went away, and images are open"
)]
#![allow(missing_docs, reason = "a program has no users of its items")]

mod common;
mod img;
mod io;
mod live;

use std::process::ExitCode;

use common::{
    image_names,
    output::{complain, say, write_out},
    program::Program,
    trace,
};

fn main() -> ExitCode {
    let mut args = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned());
    let argv0 = args.next().unwrap_or_default();
    let args: Vec<String> = args.collect();
    let log = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr);
    if std::env::var_os("RUST_LOG").is_some() {
        log.init();
    } else {
        // Nobody asked for a log: what a library has to say (an image was found corrupt) is said as qemu does.
        log.without_time()
            .with_level(false)
            .with_target(false)
            .init();
    }
    Program::set_argv0(&argv0);
    let program = Program::from_argv0(&argv0);
    if program.is_qemu() {
        return ExitCode::from(dispatch(program, &args));
    }
    let args = match trace::take(args) {
        Ok((wanted, args)) => {
            wanted.into_iter().for_each(trace::want);
            args
        }
        Err(message) => {
            complain!("blk: {message}");
            return ExitCode::from(1);
        }
    };
    ExitCode::from(dispatch(program, &image_names::take(args)))
}

fn dispatch(program: Program, args: &[String]) -> u8 {
    if program == Program::QemuIo {
        return io::run(program, args);
    }
    let (name, argv0) = (program.name(), program.argv0());
    let usage = |message: String| {
        complain!("{message}");
        complain!("Try '{argv0} --help' for more info");
        1
    };
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "-h" | "--help" => {
                help(program);
                return 0;
            }
            "-V" | "--version" => {
                say!("{}", program.version());
                return 0;
            }
            // qemu's tracing: RUST_LOG takes its place.
            "-T" | "--trace" => {
                if rest.next().is_none() {
                    return usage(format!("{argv0}: option requires an argument -- 'T'"));
                }
            }
            long if long.starts_with("--") && long.len() > 2 => {
                return usage(format!("{argv0}: unrecognized option '{long}'"));
            }
            short if short.starts_with('-') && short.len() > 1 => {
                let option = short.chars().nth(1).unwrap_or('-');
                return usage(format!("{argv0}: invalid option -- '{option}'"));
            }
            "io" if program == Program::Blk => {
                return io::run(program, &rest.cloned().collect::<Vec<_>>());
            }
            "live" if program == Program::Blk => {
                return live::run(program, &rest.cloned().collect::<Vec<_>>());
            }
            command => {
                let args: Vec<String> = rest.cloned().collect();
                return img::run(program, command, &args)
                    .unwrap_or_else(|| usage(format!("{name}: Command not found: {command}")));
            }
        }
    }
    usage(format!("{name}: Not enough arguments"))
}

fn help(program: Program) {
    let name = program.argv0();
    write_out(format_args!(
        "{}\nDisk images: qcow2, raw and VMDK.\n\nUsage: {name} COMMAND [OPTIONS]\n       {name} COMMAND --help\n\nCommands:\n",
        program.version()
    ));
    for command in img::COMMANDS {
        let about = command.about.split(". ").next().unwrap_or_default();
        say!("  {:10} {}", command.name, about.trim_end_matches('.'));
    }
    if program == Program::Blk {
        say!(
            "  {:10} {}",
            "io",
            "Reads and writes an image command by command, as qemu-io does"
        );
        say!(
            "  {:10} {}",
            "live",
            "Guest I/O and four jobs on a live chain, every byte verified"
        );
    }
    say!(
        "\nOptions:\n  -h, --help     print this help and exit\n  -V, --version  print the version and exit"
    );
    if program == Program::Blk {
        say!(
            "  --trace FILE   record the requests of every image that the command opens; 'iotests replay FILE' runs\n                 \
             them again under the simulator\n  --trace-hashes with --trace: record a hash of what is written\n  --trust-image-names\n                 \
             follow names in images (of backing files, data files, extents) that are more than paths: json:{{…}} and\n                 \
             PROTOCOL:… choose drivers and options, and so what is opened"
        );
    }
    say!(
        "\nEnvironment:\n  RUST_LOG       what is logged to standard error (error, warn, info, debug, trace)\n  \
         BLK_TRUST_IMAGE_NAMES=1\n                 as blk --trust-image-names"
    );
}
