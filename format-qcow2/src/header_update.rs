//! Reading and rewriting the header of an image that exists: the whole first cluster at once, or single fields that
//! lie side by side.
//!
//! The order between a header update and what it publishes is the caller's to keep: none of these functions flushes when it
//! ends. A power cut leaves the old or the new header as far as the storage writes sectors whole: single fields are one
//! write inside of a sector, and a whole header is written in an order of sectors that is tried out first (`header_plan`).

use block_core::{
    error::{Error, ErrorKind, Operation, Result},
    flags::RequestFlags,
    request::Child,
};

use crate::{
    header_plan::{self, SECTOR, Step},
    layout::{
        Autoclear, Compatible, Header, HostOffset, Incompatible,
        header::{MIN_HEAD, field},
    },
};

/// Reads and checks the header of the image in `file`. Bytes beyond the end of the file count as zeroes.
///
/// # Errors
/// Those of [`Header::decode`], and whatever the storage reports.
pub async fn read_header(file: &Child) -> Result<Header> {
    // The most that is needed at once is a cluster of 2 MiB, and only when the fields before allow it.
    let head = file.read_padded(0, 4096.max(MIN_HEAD)).await?;
    let cluster_size = Header::cluster_size_of(&head).map_err(at_open)?;
    if cluster_size <= head.len() {
        return Header::decode(&head[..cluster_size]).map_err(at_open);
    }
    let cluster = file.read_padded(0, cluster_size).await?;
    Header::decode(&cluster).map_err(at_open)
}

fn at_open(error: Error) -> Error {
    error.with_operation(Operation::Open, 0, 0)
}

/// A whole header that is to be written, in steps that a power cut can't turn into harm.
pub(crate) struct Rewrite(Vec<Step>);

/// Finds out how the first cluster is rewritten: unknown extensions and the unknown tail of the header are kept, all else is laid
/// out anew. Nothing is written yet.
///
/// # Errors
/// ENOSPC when the cluster has no room, or not enough to write the new header beside the old one; EINVAL when the backing file's
/// name is too long.
pub(crate) async fn prepare(file: &Child, header: &Header) -> Result<Rewrite> {
    let len = header.encode()?.len();
    let old = file.read_padded(0, len).await?;
    header_plan::plan(&old, header).map(Rewrite).ok_or_else(|| {
        Error::new(
            ErrorKind::NoSpace,
            "The header can't be changed safely: a power cut could leave neither the old nor the new one, as its cluster is too \
             small for both",
        )
        .with_field("header", len, "less, for a cluster of this size")
    })
}

impl Rewrite {
    /// Writes it. The last step isn't flushed.
    ///
    /// # Errors
    /// Whatever the storage reports: the header is the old or the new one then.
    pub async fn write(self, file: &Child) -> Result<()> {
        for (n, (sector, bytes)) in self.0.into_iter().enumerate() {
            if n > 0 {
                file.flush().await?;
            }
            let at = (sector * SECTOR) as u64;
            file.write(at, bytes, RequestFlags::empty()).await?;
        }
        Ok(())
    }
}

/// Rewrites the whole first cluster: prepares the writes, then makes them.
///
/// # Errors
/// Those of both. After ENOSPC and EINVAL of the former nothing was written.
pub async fn rewrite(file: &Child, header: &Header) -> Result<()> {
    prepare(file, header).await?.write(file).await
}

/// Records another backing file, `None` for none, and updates `header` to what was written.
///
/// # Errors
/// As [`rewrite`]; EINVAL for an empty name or a format without a file. `header` is unchanged after an error.
pub async fn change_backing(
    file: &Child,
    header: &mut Header,
    backing_file: Option<&str>,
    backing_format: Option<&str>,
) -> Result<()> {
    let name = backing_file.filter(|name| !name.is_empty());
    let format = backing_format.filter(|format| !format.is_empty());
    if name.is_none() && format.is_some() {
        return Err(Error::invalid(
            "Backing format cannot be used without backing file",
        ));
    }
    if name.is_some() && header.autoclear.contains(Autoclear::RAW_DATA_FILE) {
        return Err(Error::invalid(
            "Backing file and data-file-raw cannot be used at the same time",
        ));
    }
    let mut changed = header.clone();
    changed.backing_file = name.map(|name| name.as_bytes().to_vec());
    changed.extensions.backing_format = format.map(str::to_owned);
    rewrite(file, &changed).await?;
    *header = changed;
    Ok(())
}

/// Drops the autoclear bits that this driver doesn't know, as every writer must before its first write. Says whether
/// anything was written; the caller flushes then.
pub async fn drop_unknown_autoclear(file: &Child, header: &mut Header) -> Result<bool> {
    let known = header.autoclear & Autoclear::from_bits_retain(Autoclear::KNOWN);
    if header.version < 3 || known == header.autoclear {
        return Ok(false);
    }
    write_u64(file, field::AUTOCLEAR, known.bits()).await?;
    header.autoclear = known;
    Ok(true)
}

/// Writes the incompatible features in place.
///
/// # Errors
/// EINVAL for an image of version 2, which has none, unless `incompatible` is empty: then there is nothing to do.
pub async fn write_incompatible(
    file: &Child,
    header: &mut Header,
    incompatible: Incompatible,
) -> Result<()> {
    if header.incompatible == incompatible {
        return Ok(());
    }
    needs_version_3(header, "incompatible_features")?;
    write_u64(file, field::INCOMPATIBLE, incompatible.bits()).await?;
    header.incompatible = incompatible;
    Ok(())
}

/// Writes the compatible features in place.
///
/// # Errors
/// As [`write_incompatible`].
pub async fn write_compatible(
    file: &Child,
    header: &mut Header,
    compatible: Compatible,
) -> Result<()> {
    if header.compatible == compatible {
        return Ok(());
    }
    needs_version_3(header, "compatible_features")?;
    write_u64(file, field::COMPATIBLE, compatible.bits()).await?;
    header.compatible = compatible;
    Ok(())
}

/// Writes the size of the virtual disk in place.
pub async fn write_size(file: &Child, header: &mut Header, size: u64) -> Result<()> {
    if header.l1_entries_needed(size) > u64::from(header.l1_size) {
        return Err(
            Error::new(ErrorKind::TooBig, "L1 table is too small").with_field(
                "size",
                size,
                "what the L1 table covers",
            ),
        );
    }
    write_u64(file, field::SIZE, size).await?;
    header.size = size;
    Ok(())
}

/// Switches to another L1 table in one write.
pub async fn write_l1_pointer(
    file: &Child,
    header: &mut Header,
    offset: HostOffset,
    entries: u32,
) -> Result<()> {
    let mut bytes = entries.to_be_bytes().to_vec();
    bytes.extend_from_slice(&offset.0.to_be_bytes());
    file.write(field::L1, bytes, RequestFlags::empty()).await?;
    header.l1_table_offset = offset;
    header.l1_size = entries;
    Ok(())
}

/// Switches to another refcount table in one write.
pub async fn write_refcount_table_pointer(
    file: &Child,
    header: &mut Header,
    offset: HostOffset,
    clusters: u32,
) -> Result<()> {
    let mut bytes = offset.0.to_be_bytes().to_vec();
    bytes.extend_from_slice(&clusters.to_be_bytes());
    file.write(field::REFCOUNT_TABLE, bytes, RequestFlags::empty())
        .await?;
    header.refcount_table_offset = offset;
    header.refcount_table_clusters = clusters;
    Ok(())
}

/// Switches to another size, L1 table, refcount table and snapshot table at once: the fields from `size` to
/// `snapshots_offset` lie in one sector. `header` says which.
pub async fn write_table_pointers(file: &Child, header: &Header) -> Result<()> {
    let mut bytes = Vec::with_capacity(48);
    bytes.extend_from_slice(&header.size.to_be_bytes());
    bytes.extend_from_slice(&header.crypt_method.to_be_bytes());
    bytes.extend_from_slice(&header.l1_size.to_be_bytes());
    bytes.extend_from_slice(&header.l1_table_offset.0.to_be_bytes());
    bytes.extend_from_slice(&header.refcount_table_offset.0.to_be_bytes());
    bytes.extend_from_slice(&header.refcount_table_clusters.to_be_bytes());
    bytes.extend_from_slice(&header.nb_snapshots.to_be_bytes());
    bytes.extend_from_slice(&header.snapshots_offset.0.to_be_bytes());
    debug_assert_eq!(field::SIZE + bytes.len() as u64, field::SNAPSHOTS + 12);
    file.write(field::SIZE, bytes, RequestFlags::empty()).await
}

fn needs_version_3(header: &Header, name: &str) -> Result<()> {
    if header.version < 3 {
        return Err(
            Error::invalid("Images of version 2 have no feature bits").with_field(
                name,
                "a change",
                "version 3",
            ),
        );
    }
    Ok(())
}

async fn write_u64(file: &Child, at: u64, value: u64) -> Result<()> {
    file.write(at, value.to_be_bytes().to_vec(), RequestFlags::empty())
        .await
}
