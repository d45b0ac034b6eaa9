//! The image that `convert` writes to: made anew, or there already; and what is known of its content beforehand.

use block_core::{BlockHandle, Capabilities, ErrorKind, Options, RequestFlags};
use serde_json::json;

use super::super::{create as image, create_options::CreateOptions};
use crate::common::{
    cache::CacheMode,
    failure::Failure,
    open::{self, Access, ImageSpec},
    session::Session,
};

/// What the command line says of the target.
pub struct Request<'a> {
    pub name: &'a str,
    pub format: &'a str,
    pub list: Option<&'a str>,
    pub image_opts: bool,
    pub exists: bool,
    pub is_zero: bool,
    pub backing: Option<&'a str>,
    pub backing_format: Option<&'a str>,
    pub compress: bool,
    /// Bitmaps are going to be copied into it.
    pub bitmaps: bool,
    pub cache: CacheMode,
    /// What stands before the reason when the target can't be made.
    pub failure: &'a str,
}

impl Request<'_> {
    /// What can't be, before anything is opened or made.
    pub fn check(&self, session: &Session, sources: usize) -> Result<(), Failure> {
        if self.exists && self.list.is_some() {
            return Err(Failure::new(
                "-o has no effect when skipping image creation",
            ));
        }
        if self.image_opts && !self.exists {
            return Err(Failure::new("--target-image-opts requires use of -n flag"));
        }
        if self.is_zero && !self.exists {
            return Err(Failure::new("--target-is-zero requires use of -n flag"));
        }
        if !self.image_opts && session.registry.get(self.format).is_err() {
            return Err(Failure::new(format!(
                "Unknown file format '{}'",
                self.format
            )));
        }
        if self.backing.is_some() && sources > 1 {
            return Err(Failure::new(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            ));
        }
        Ok(())
    }
}

/// The target, open for writing.
pub struct Target {
    pub handle: BlockHandle,
    /// What the target doesn't hold itself comes from a backing file.
    pub has_backing: bool,
    /// It reads as zeroes where nothing was written yet.
    pub is_zero: bool,
    /// Zeroes smaller than this, or not aligned to it, are written as data.
    pub zero_unit: u64,
    /// What compressed writes are a multiple of.
    pub cluster: u64,
}

impl Target {
    /// Makes the target for `length` bytes unless it exists, and opens it.
    pub async fn prepare(
        session: &Session,
        request: &Request<'_>,
        length: u64,
    ) -> Result<Self, Failure> {
        let mut own = Options::new();
        if !request.exists
            && let Some(secret) = create(session, request, length).await?
        {
            own.set("encrypt", json!({ "key-secret": secret }));
        }
        let access = Access {
            write: true,
            unmap: true,
            cache: request.cache,
            ..Access::default()
        };
        let image = ImageSpec {
            name: request.name,
            format: (!request.image_opts).then_some(request.format),
            image_opts: request.image_opts,
        };
        let handle = open::open_nested(session, image, access, own).await?;
        let node = handle.node();
        let capabilities = node.driver().capabilities();
        // A qcow2 image with a data file can't, though others can: as with qemu-img, its first write says so.
        if request.compress
            && !capabilities.contains(Capabilities::COMPRESSED)
            && node.driver().name() != "qcow2"
        {
            return Err(no_compression());
        }
        let info = handle.info().await?;
        if request.compress && info.encrypted && !info.compressed_plaintext {
            return Err(Failure::new(format!(
                "{NO_COMPRESSED_ENCRYPTION} (with the target's option encrypt.compressed-plaintext=on compressed clusters are \
                 stored unencrypted)"
            )));
        }
        if handle.length() < length {
            return Err(Failure::new("output file is smaller than input file"));
        }
        let has_backing = node.backing().is_some();
        let mut is_zero = request.is_zero
            || (!request.exists && !has_backing && capabilities.contains(Capabilities::ZERO_INIT));
        if !is_zero && !has_backing && length > 0 {
            // All at once, where that is cheap.
            let flags = RequestFlags::MAY_UNMAP | RequestFlags::NO_FALLBACK;
            is_zero = handle.write_zeroes(0, length, flags).await.is_ok();
        }
        if request.bitmaps && !capabilities.contains(Capabilities::PERSISTENT_BITMAPS) {
            return Err(Failure::new(format!(
                "Format driver '{}' does not support bitmaps",
                node.driver().name()
            )));
        }
        let limits = handle.limits();
        let cluster = info.cluster_size.unwrap_or(65536);
        drop(node);
        Ok(Self {
            has_backing,
            is_zero,
            zero_unit: limits
                .zeroes_alignment
                .max(limits.request_alignment)
                .max(512),
            cluster,
            handle,
        })
    }

    /// Flushes and closes it.
    pub async fn close(self) -> Result<(), Failure> {
        Ok(self.handle.close().await?)
    }
}

fn no_compression() -> Failure {
    Failure::new("Compression not supported for this file format")
}

const NO_COMPRESSED_ENCRYPTION: &str = "Compression and encryption not supported at the same time";

/// Makes the target; gives the id of the secret that it is encrypted with.
async fn create(
    session: &Session,
    request: &Request<'_>,
    length: u64,
) -> Result<Option<String>, Failure> {
    let registry = &session.registry;
    let Request { name, format, .. } = *request;
    let mut options = CreateOptions::of(registry, format, name, request.list)?;
    options.set_backing(request.backing, request.backing_format)?;
    if options.get("backing_file").is_some() && options.get("backing_fmt").is_none() {
        return Err(Failure::new(
            "Use of backing file requires explicit backing format",
        ));
    }
    if request.compress && matches!(options.get("preallocation"), Some(mode) if mode != "off") {
        return Err(Failure::new(
            "Compression and preallocation not supported at the same time",
        ));
    }
    if request.compress && format == "raw" {
        return Err(no_compression());
    }
    let encrypts =
        options.get("encrypt.format").is_some() || options.get("encryption") == Some("on");
    if request.compress && encrypts {
        return Err(Failure::new(NO_COMPRESSED_ENCRYPTION));
    }
    // Whatever `-o` says: the copy is as large as what is copied.
    options.set("size", &length.to_string())?;
    let values = options
        .for_creation()
        .map_err(|failure| failure.prefixed(&format!("{name}: error while converting {format}")))?;
    image::make(session, format, name, values)
        .await
        .map_err(|error| {
            let reason = match error.kind() {
                ErrorKind::TooBig => {
                    format!("The image size is too large for file format '{format}'")
                }
                _ => error.reason(),
            };
            Failure::new(format!("{name}: {}: {reason}", request.failure)).with_details(&error)
        })?;
    Ok(options.get("encrypt.key-secret").map(str::to_owned))
}
