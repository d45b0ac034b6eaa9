//! Cache modes (`-t`, `-T`): what each name means for the options of a node.

use block_core::Options;
use serde_json::json;

/// A cache mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheMode {
    /// Past the page cache.
    pub direct: bool,
    /// Flushes are not passed on.
    pub no_flush: bool,
    /// Every write is durable when it completes.
    pub write_through: bool,
}

impl CacheMode {
    /// The page cache, flushes when asked.
    pub const WRITEBACK: Self = Self {
        direct: false,
        no_flush: false,
        write_through: false,
    };
    /// The page cache, and no flushes: for images that are made anew if the machine fails.
    pub const UNSAFE: Self = Self {
        direct: false,
        no_flush: true,
        write_through: false,
    };

    /// The mode called `name`.
    pub fn parse(name: &str) -> Option<Self> {
        let (direct, no_flush, write_through) = match name {
            "none" | "off" => (true, false, false),
            "writeback" => (false, false, false),
            "writethrough" => (false, false, true),
            "directsync" => (true, false, true),
            "unsafe" => (false, true, false),
            _ => return None,
        };
        Some(Self {
            direct,
            no_flush,
            write_through,
        })
    }

    /// Sets it on a node, unless the node's own options say something.
    pub fn apply(self, options: &mut Options) {
        options.set_default(
            "cache",
            json!({"direct": self.direct, "no-flush": self.no_flush}),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_qemus() {
        assert_eq!(CacheMode::parse("unsafe"), Some(CacheMode::UNSAFE));
        assert_eq!(CacheMode::parse("writeback"), Some(CacheMode::WRITEBACK));
        assert!(CacheMode::parse("directsync").is_some_and(|m| m.direct && m.write_through));
        assert!(CacheMode::parse("none").is_some_and(|m| m.direct && !m.no_flush));
        assert_eq!(CacheMode::parse("bogus"), None);
    }
}
