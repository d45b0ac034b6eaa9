//! Writing to standard output and standard error. A reader that went away is no reason to panic: the images that are
//! open still have to be closed.

use std::{fmt, io::Write};

/// Writes to standard output.
pub fn write_out(text: fmt::Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_fmt(text);
}

/// Writes to standard error.
pub fn write_err(text: fmt::Arguments<'_>) {
    let mut out = std::io::stderr().lock();
    let _ = out.write_fmt(text);
}

/// Flushes standard output, so that what follows on standard error comes after it.
pub fn flush_out() {
    let _ = std::io::stdout().lock().flush();
}

/// A line on standard output.
macro_rules! say {
    ($($arg:tt)*) => {
        $crate::common::output::write_out(format_args!("{}\n", format_args!($($arg)*)))
    };
}

/// A part of a line on standard output.
macro_rules! put {
    ($($arg:tt)*) => {
        $crate::common::output::write_out(format_args!($($arg)*))
    };
}

/// A line on standard error.
macro_rules! complain {
    ($($arg:tt)*) => {
        $crate::common::output::write_err(format_args!("{}\n", format_args!($($arg)*)))
    };
}

pub(crate) use {complain, put, say};
