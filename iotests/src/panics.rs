//! Panics of the code under test become a sentence with their place, and don't reach the terminal. Panics elsewhere are
//! left alone.

use std::{
    cell::RefCell,
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

thread_local! {
    /// `None` outside of [`catch`]; inside, what the last panic said.
    static CAUGHT: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let ours = CAUGHT.with(|caught| match caught.borrow_mut().as_mut() {
                Some(said) => {
                    let place = info
                        .location()
                        .map(|at| format!(" at {}:{}", at.file(), at.line()))
                        .unwrap_or_default();
                    let payload = info.payload();
                    let text = payload
                        .downcast_ref::<String>()
                        .map(String::as_str)
                        .or_else(|| payload.downcast_ref::<&str>().copied())
                        .unwrap_or("(no text)");
                    *said = format!("panic{place}: {text}");
                    true
                }
                None => false,
            });
            if !ours {
                before(info);
            }
        }));
    });
}

/// Runs `work`.
///
/// # Errors
/// What its panic said, and where.
pub fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    install();
    let outer = CAUGHT.with(|caught| caught.borrow_mut().replace(String::new()));
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    let said = CAUGHT.with(|caught| std::mem::replace(&mut *caught.borrow_mut(), outer));
    result.map_err(|_| said.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::catch;

    #[test]
    fn a_panic_becomes_a_sentence_with_its_place_also_when_nested() {
        let outer = catch(|| {
            let inner = catch(|| panic!("inner {}", 1)).unwrap_err();
            assert!(inner.contains("panics.rs:") && inner.ends_with("inner 1"));
            panic!("outer");
        });
        assert!(outer.unwrap_err().ends_with(": outer"));
        assert_eq!(catch(|| 7), Ok(7));
    }
}
