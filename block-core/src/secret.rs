//! Passwords and keys that images are opened with: how they are kept, and where drivers look them up.
//!
//! A program gives its graph what secrets it has, each under an id ([`crate::graph::Graph::secrets`]); the options of
//! images name ids, never the secrets themselves. A [`Secret`] is wiped when it is dropped and shows in no `Debug`, no
//! error and no log. What is done with secrets (ciphers, key derivation) isn't here.

use std::{collections::BTreeMap, fmt, sync::Arc};

use parking_lot::Mutex;
use zeroize::Zeroizing;

use crate::error::{Error, ErrorKind, Result};

/// Bytes that nobody is to see. Copies share one place in memory, which is wiped with the last of them.
///
/// ```
/// use block_core::secret::Secret;
///
/// let secret = Secret::new(b"letmein".to_vec());
/// assert_eq!(format!("{secret:?}"), "Secret(..)");
/// assert_eq!(secret.expose(), b"letmein");
/// ```
#[derive(Clone)]
pub struct Secret(Arc<Zeroizing<Vec<u8>>>);

impl Secret {
    /// Keeps `bytes`.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(Arc::new(Zeroizing::new(bytes.into())))
    }

    /// The bytes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl From<Zeroizing<Vec<u8>>> for Secret {
    fn from(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(Arc::new(bytes))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// The secrets that a graph's images may use, by id.
#[derive(Default)]
pub struct Secrets(Mutex<BTreeMap<String, Secret>>);

impl Secrets {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a secret.
    ///
    /// # Errors
    /// EEXIST when there is one of that id.
    pub fn add(&self, id: &str, secret: Secret) -> Result<()> {
        let mut secrets = self.0.lock();
        if secrets.contains_key(id) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("attempt to add duplicate property '{id}' to object (type 'container')"),
            ));
        }
        secrets.insert(id.to_owned(), secret);
        Ok(())
    }

    /// Forgets a secret. Images that were opened with it stay open.
    ///
    /// # Errors
    /// ENOENT when there is none of that id.
    pub fn remove(&self, id: &str) -> Result<()> {
        let removed = self.0.lock().remove(id);
        removed.map(|_| ()).ok_or_else(|| missing(id))
    }

    /// The secret of that id.
    ///
    /// # Errors
    /// ENOENT when there is none.
    pub fn get(&self, id: &str) -> Result<Secret> {
        self.0.lock().get(id).cloned().ok_or_else(|| missing(id))
    }
}

fn missing(id: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("No secret with id '{id}'"))
}

/// The ids alone.
impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.lock().keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_by_its_id_and_shown_nowhere() {
        let secrets = Secrets::new();
        secrets.add("s", Secret::new("letmein")).unwrap();
        assert_eq!(secrets.get("s").unwrap().expose(), b"letmein");
        let again = secrets.add("s", Secret::new("other")).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::AlreadyExists);
        let missing = secrets.get("t").unwrap_err();
        assert_eq!(missing.reason(), "No secret with id 't'");
        let shown = format!("{secrets:?} {:?} {again:?} {missing:?}", secrets.get("s"));
        assert!(
            !shown.contains("letmein") && !shown.contains("108, 101"),
            "{shown}"
        );
        secrets.remove("s").unwrap();
        assert!(secrets.get("s").is_err() && secrets.remove("s").is_err());
    }
}
