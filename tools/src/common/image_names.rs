//! `--trust-image-names`, or the environment variable `BLK_TRUST_IMAGE_NAMES=1` for who calls us `qemu-img`: names inside images
//! (backing files, data files, extents) may be `json:{…}` and `PROTOCOL:…`, as they always may for qemu-img. Without it they are
//! paths, as whoever made an image would else choose what is opened.

use std::sync::atomic::{AtomicBool, Ordering};

const OPTION: &str = "--trust-image-names";
const VARIABLE: &str = "BLK_TRUST_IMAGE_NAMES";

static TRUSTED: AtomicBool = AtomicBool::new(false);

/// Whether the command line or the environment says so.
pub fn are_trusted() -> bool {
    TRUSTED.load(Ordering::Relaxed) || std::env::var_os(VARIABLE).is_some_and(|value| value == "1")
}

/// Takes the option out of the arguments, wherever it stands before a `--`, and remembers it.
pub fn take(args: Vec<String>) -> Vec<String> {
    let (is_there, left) = split(args);
    if is_there {
        TRUSTED.store(true, Ordering::Relaxed);
    }
    left
}

fn split(mut args: Vec<String>) -> (bool, Vec<String>) {
    let end = args.iter().position(|arg| arg == "--");
    let behind = args.split_off(end.unwrap_or(args.len()));
    let before = args.len();
    args.retain(|arg| arg != OPTION);
    let is_there = args.len() < before;
    args.extend(behind);
    (is_there, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_is_found_anywhere_before_the_end_of_options() {
        let split = |args: &[&str]| split(args.iter().map(ToString::to_string).collect());
        let rest = vec!["info".to_string(), "a".into()];
        assert_eq!(split(&["info", OPTION, "a"]), (true, rest.clone()));
        assert_eq!(split(&[OPTION, "info", "a", OPTION]), (true, rest.clone()));
        assert_eq!(split(&["info", "a"]), (false, rest));
        let behind = vec!["info".to_string(), "--".into(), OPTION.into()];
        assert_eq!(split(&["info", "--", OPTION]), (false, behind));
    }
}
