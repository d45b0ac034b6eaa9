//! Reading and rewriting the header of an image that exists: the whole first cluster at once, or single fields that
//! lie side by side.
//!
//! The order between a header update and what it publishes is the caller's to keep: none of these functions flushes when it
//! ends. A power cut leaves the old or the new header as far as the storage writes sectors whole: single fields are one
//! write inside of a sector, and a whole header is switched to with the write of its first sector ([`rewrite`]).

use block_core::{
    error::{Error, ErrorKind, Operation, Result},
    flags::RequestFlags,
    request::Child,
};

use crate::layout::{
    Autoclear, Compatible, Header, HostOffset, Incompatible,
    header::{MIN_HEAD, field},
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

/// What a storage writes whole or not at all, in bytes.
const SECTOR: usize = 512;

/// Rewrites the whole first cluster: unknown extensions and the unknown tail of the header are kept, all else is laid
/// out anew.
///
/// A header can be longer than a sector, and a power cut may tear it there: the extensions of one header would go on with
/// those of the other. So the first sector is switched to a header that lies in it alone, without the names of the features;
/// then what is behind it is written, which nothing refers to; then the first sector refers to it. A backing file's name that
/// doesn't fit into the first sector goes to the end of the cluster first. Only where a cluster of 1 or 2 KiB has no room for
/// an old and a new name of hundreds of bytes it is a single write after all.
///
/// # Errors
/// ENOSPC when the cluster has no room, EINVAL when the backing file's name is too long; nothing was written then.
pub async fn rewrite(file: &Child, header: &Header) -> Result<()> {
    let none = RequestFlags::empty();
    let mut new = header.encode()?;
    let old = file.read_padded(0, new.len()).await?.to_vec();
    let mut changed = (0..new.len() / SECTOR).filter(|n| {
        let sector = n * SECTOR..(n + 1) * SECTOR;
        new[sector.clone()] != old[sector]
    });
    let Some(first) = changed.next() else {
        return Ok(());
    };
    if changed.next().is_none() {
        let sector = first * SECTOR..(first + 1) * SECTOR;
        return file
            .write(sector.start as u64, new[sector].to_vec(), none)
            .await;
    }
    let Some((short, name_at)) = in_one_sector(header, &old) else {
        return file.write(0, new, none).await;
    };
    if let Some(at) = name_at {
        file.write(at as u64, short[at..].to_vec(), none).await?;
        file.flush().await?;
        // It stays there: what is written next must not touch it.
        new = header.padded(header.lay_out(true, name_at)?);
    }
    let short = header.padded(short);
    file.write(0, short[..SECTOR].to_vec(), none).await?;
    file.flush().await?;
    file.write(SECTOR as u64, new[SECTOR..].to_vec(), none)
        .await?;
    if new[..SECTOR] == short[..SECTOR] {
        return Ok(());
    }
    file.flush().await?;
    file.write(0, new[..SECTOR].to_vec(), none).await
}

/// The header without what isn't needed, so that all of it is in the first sector, but perhaps the backing file's name: then the
/// second is where that goes: where there is nothing now. `None` when there is no such place.
fn in_one_sector(header: &Header, old: &[u8]) -> Option<(Vec<u8>, Option<usize>)> {
    let short = header.lay_out(false, None).ok()?;
    if short.len() <= SECTOR {
        return Some((short, None));
    }
    let name = header.backing_file.as_ref()?.len();
    if short.len() - name > SECTOR {
        return None;
    }
    let end = old.len().checked_sub(name)? / 8 * 8;
    // With the names of the features it has to fit as well.
    let at = (SECTOR..=end).rev().step_by(8).find(|at| {
        let is_free = old[*at..*at + name].iter().all(|byte| *byte == 0);
        is_free && header.lay_out(true, Some(*at)).is_ok()
    })?;
    Some((header.lay_out(false, Some(at)).ok()?, Some(at)))
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
