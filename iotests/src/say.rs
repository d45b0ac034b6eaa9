//! What commands print to standard output, which may be closed at any time, as with `| head`: that is no reason to panic.

/// A line on standard output.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout().lock(), $($text)*);
    }};
}

pub(crate) use say;
