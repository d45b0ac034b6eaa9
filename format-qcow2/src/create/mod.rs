//! Making new images (digest, section 6).
//!
//! [`parameters`] reads the options, [`plan`] says what goes where; both are free of I/O. Here the plan is written,
//! the header last: until then the storage holds no image.

pub mod parameters;
pub mod plan;

use std::sync::Arc;

use block_core::{
    buffer::IoBuf,
    driver::{Preallocation, Truncate},
    env::Environment,
    error::{Error, ErrorKind, Result},
    flags::RequestFlags,
    options::Options,
    registry::{CreateContext, CreateOption},
    request::Child,
    secret::Secret,
};
use crypto::{EncryptionFormat, luks, passphrase};

pub use parameters::Parameters;
pub(crate) use parameters::take_below_encrypt;
pub use plan::Plan;

use crate::encryption::FileArea;
use crate::layout::{Header, HostOffset, L1Entry, L2Entry, Refcounts, Space, Subclusters};

/// The options that [`create`] takes, for help texts.
pub const OPTIONS: &[CreateOption] = &[
    CreateOption {
        name: "backing_file",
        kind: "str",
        help: "File name of a base image",
    },
    CreateOption {
        name: "backing_fmt",
        kind: "str",
        help: "Image format of the base image",
    },
    CreateOption {
        name: "cluster_size",
        kind: "size",
        help: "qcow2 cluster size",
    },
    CreateOption {
        name: "compat",
        kind: "str",
        help: "Compatibility level (v2 [0.10] or v3 [1.1])",
    },
    CreateOption {
        name: "compression_type",
        kind: "str",
        help: "Compression method used for image cluster compression",
    },
    CreateOption {
        name: "data_file",
        kind: "str",
        help: "File name of an external data file",
    },
    CreateOption {
        name: "data_file_raw",
        kind: "bool (on/off)",
        help: "The external data file must stay valid as a raw image",
    },
    CreateOption {
        name: "encrypt.cipher-alg",
        kind: "str",
        help: "Name of encryption cipher algorithm",
    },
    CreateOption {
        name: "encrypt.cipher-mode",
        kind: "str",
        help: "Name of encryption cipher mode",
    },
    CreateOption {
        name: "encrypt.format",
        kind: "str",
        help: "Encrypt the image, format choices: 'aes', 'luks'",
    },
    CreateOption {
        name: "encrypt.hash-alg",
        kind: "str",
        help: "Name of encryption hash algorithm",
    },
    CreateOption {
        name: "encrypt.iter-time",
        kind: "num",
        help: "Time to spend in PBKDF in milliseconds",
    },
    CreateOption {
        name: "encrypt.ivgen-alg",
        kind: "str",
        help: "Name of IV generator algorithm",
    },
    CreateOption {
        name: "encrypt.ivgen-hash-alg",
        kind: "str",
        help: "Name of IV generator hash algorithm",
    },
    CreateOption {
        name: "encrypt.key-secret",
        kind: "str",
        help: "ID of secret providing qcow AES key or LUKS passphrase",
    },
    CreateOption {
        name: "encryption",
        kind: "bool (on/off)",
        help: "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    },
    CreateOption {
        name: "extended_l2",
        kind: "bool (on/off)",
        help: "Extended L2 tables",
    },
    CreateOption {
        name: "lazy_refcounts",
        kind: "bool (on/off)",
        help: "Postpone refcount updates",
    },
    CreateOption {
        name: "preallocation",
        kind: "str",
        help: "Preallocation mode (allowed values: off, metadata, falloc, full)",
    },
    CreateOption {
        name: "refcount_bits",
        kind: "num",
        help: "Width of a reference count entry in bits",
    },
    CreateOption {
        name: "size",
        kind: "size",
        help: "Virtual disk size",
    },
];

/// Tables are written in pieces of about this many bytes.
const CHUNK: usize = 1 << 20;

/// What an image is made with. All that can be refused is, with nothing made and no file emptied.
fn prepare(context: &CreateContext, options: Options) -> Result<(Parameters, Option<Secret>)> {
    let parameters = Parameters::from_options(options)?;
    let key = match &parameters.encryption {
        None => None,
        Some(format) => {
            if let EncryptionFormat::Luks(luks) = format {
                luks.check()?;
            }
            let secrets = context.graph().secrets();
            Some(passphrase(secrets, parameters.key_secret.as_deref())?)
        }
    };
    Plan::new(&parameters)?.header(&parameters).encode()?;
    Ok((parameters, key))
}

/// Refuses what [`create`] would refuse.
///
/// # Errors
/// EINVAL, EFBIG and ENOTSUP for options.
pub fn may_create(context: &CreateContext, options: Options) -> Result<()> {
    prepare(context, options).map(drop)
}

/// Makes a new image in the fresh storage of `context`.
///
/// # Errors
/// EINVAL, EFBIG and ENOTSUP for options, before anything was written; afterwards whatever the storage reports.
///
/// # Cancellation
/// A creation that is cut off leaves storage without a header, which no driver takes for an image.
pub async fn create(context: CreateContext, options: Options) -> Result<()> {
    let (parameters, key) = prepare(&context, options)?;
    let graph = context.graph();
    let Some(name) = &parameters.data_file else {
        return create_image(&context, &parameters, key).await;
    };
    let mut storage = Options::new().with("size", parameters.size);
    match parameters.preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => storage.set("preallocation", "falloc"),
        Preallocation::Full => storage.set("preallocation", "full"),
    }
    let node = context.create_sibling(name, storage).await?;
    let created = async {
        Child::unattached(node.clone()).flush().await?;
        create_image(&context, &parameters, key).await
    }
    .await;
    let released = graph.release(&node).await;
    created.and(released)
}

/// Makes the image itself; its data file is there.
async fn create_image(
    context: &CreateContext,
    parameters: &Parameters,
    key: Option<Secret>,
) -> Result<()> {
    match (parameters.encryption, key) {
        (Some(EncryptionFormat::Luks(luks)), Some(key)) => {
            let env = context.graph().env();
            create_encrypted(context.file()?, parameters, &luks, env, &key).await
        }
        _ => create_in(context.file()?, parameters).await,
    }
}

/// Makes a new image with a LUKS header in `file`.
async fn create_encrypted(
    file: &Child,
    parameters: &Parameters,
    luks: &luks::CreateParameters,
    env: &Arc<dyn Environment>,
    password: &Secret,
) -> Result<()> {
    let plan = Plan::new(parameters)?;
    let header = plan.header(parameters);
    // Deriving the keys takes its time: all that can be refused is refused before.
    header.encode()?;
    let (_, _, steps) = luks::create(env, luks, password).await?;
    let Some(pointer) = header.extensions.luks else {
        return Err(Error::invalid("The plan has no place for a LUKS header"));
    };
    write_tables(file, parameters, &plan).await?;
    let area = plan.luks_clusters * plan.geometry.cluster_size();
    file.write_zeroes(pointer.offset, area, RequestFlags::empty())
        .await?;
    luks::run(env, &FileArea { file, pointer }, steps).await?;
    write_header(file, &header).await
}

/// Makes a new image in `file`, of any kind but with a LUKS header.
pub async fn create_in(file: &Child, parameters: &Parameters) -> Result<()> {
    if let Some(EncryptionFormat::Luks(_)) = parameters.encryption {
        return Err(Error::invalid(
            "An image with a LUKS header needs a password",
        ));
    }
    let plan = Plan::new(parameters)?;
    let header = plan.header(parameters);
    // The header has to fit before anything is written.
    header.encode()?;
    write_tables(file, parameters, &plan).await?;
    write_header(file, &header).await
}

/// Writes everything but the header.
async fn write_tables(file: &Child, parameters: &Parameters, plan: &Plan) -> Result<()> {
    prepare_storage(file, plan, parameters.preallocation).await?;
    write_refcounts(file, plan).await?;
    write_l1(file, plan).await?;
    if plan.mapped_clusters > 0 {
        write_l2(file, plan, parameters).await?;
    }
    Ok(())
}

/// Makes the image one, once all that it refers to is durable.
async fn write_header(file: &Child, header: &Header) -> Result<()> {
    file.flush().await?;
    file.write(0, header.encode()?, RequestFlags::empty())
        .await?;
    file.flush().await
}

/// Gives the storage its length, and what preallocation asks for.
async fn prepare_storage(file: &Child, plan: &Plan, preallocation: Preallocation) -> Result<()> {
    let end = plan.end();
    match preallocation {
        Preallocation::Off => return Ok(()),
        _ if file.length() >= end => {
            // A host device, say: it has its length, and may have content, which must not show through.
            let (data, len) = (plan.data_offset().0, end - plan.data_offset().0);
            if len > 0 {
                let flags = match preallocation {
                    Preallocation::Metadata => RequestFlags::MAY_UNMAP,
                    _ => RequestFlags::empty(),
                };
                file.write_zeroes(data, len, flags).await?;
            }
            return Ok(());
        }
        _ => {}
    }
    let storage = match preallocation {
        Preallocation::Off | Preallocation::Metadata => Preallocation::Off,
        other => other,
    };
    let how = Truncate {
        exact: false,
        preallocation: storage,
        zero: true,
    };
    match file.truncate(end, how).await {
        Err(error) if error.kind() == ErrorKind::NotSupported && storage != Preallocation::Off => {
            if storage == Preallocation::Falloc {
                return Err(error.context("Could not preallocate space"));
            }
            let from = file.length();
            file.write_zeroes(from, end - from.min(end), RequestFlags::empty())
                .await
        }
        other => other,
    }
}

/// The refcount table and its blocks: one reference to every cluster up to the plan's end.
async fn write_refcounts(file: &Child, plan: &Plan) -> Result<()> {
    let geometry = plan.geometry;
    let cluster_size = geometry.cluster_size();
    let table_len = plan.refcount_table_clusters * cluster_size;
    let blocks: Vec<u64> = (0..plan.refcount_blocks)
        .map(|block| plan.refcount_block_offset().0 + block * cluster_size)
        .collect();
    let table = encode_table(blocks.into_iter(), table_len)?;
    file.write(plan.refcount_table_offset().0, table, RequestFlags::empty())
        .await?;

    let refcounts = Refcounts::from(geometry);
    let per_block = geometry.refcounts_per_block();
    let blocks_at_once = (CHUNK as u64 / cluster_size).max(1);
    let mut block = 0;
    while block < plan.refcount_blocks {
        let count = blocks_at_once.min(plan.refcount_blocks - block);
        let mut bytes = zeroed(count * cluster_size)?;
        let first = block * per_block;
        let used = plan
            .total_clusters
            .saturating_sub(first)
            .min(count * per_block);
        // The refcounts of adjacent blocks are adjacent too.
        for index in 0..used {
            refcounts.set(&mut bytes, index as usize, 1)?;
        }
        let at = plan.refcount_block_offset().0 + block * cluster_size;
        file.write(at, bytes, RequestFlags::empty()).await?;
        block += count;
    }
    Ok(())
}

/// The L1 table. Without preallocation it is nothing but zeroes, and the file ends with its last entry.
async fn write_l1(file: &Child, plan: &Plan) -> Result<()> {
    if plan.l1_entries == 0 {
        return Ok(());
    }
    let len = plan.l1_entries * 8;
    if plan.l2_tables == 0 {
        let zeroes = IoBuf::zeroes(len as usize);
        return file
            .write(plan.l1_offset().0, zeroes, RequestFlags::empty())
            .await;
    }
    let geometry = plan.geometry;
    let entries = (0..plan.l2_tables).map(|table| {
        let l2 = HostOffset(plan.l2_offset().0 + table * geometry.cluster_size());
        L1Entry {
            l2: Some(l2),
            copied: true,
        }
        .encode()
    });
    file.write(
        plan.l1_offset().0,
        encode_table(entries, len)?,
        RequestFlags::empty(),
    )
    .await
}

/// The L2 tables of a preallocated image: every guest cluster has a host cluster of its own.
async fn write_l2(file: &Child, plan: &Plan, parameters: &Parameters) -> Result<()> {
    let encrypted = parameters.encryption.is_some();
    let shows_space = parameters.data_file_raw && !encrypted;
    let geometry = plan.geometry;
    let cluster_size = geometry.cluster_size();
    let tables_at_once = (CHUNK as u64 / cluster_size).max(1);
    let mut table = 0;
    while table < plan.l2_tables {
        let count = tables_at_once.min(plan.l2_tables - table);
        let first = table * geometry.l2_entries();
        let last = plan
            .mapped_clusters
            .min(first + count * geometry.l2_entries());
        let words = (first..last).flat_map(|cluster| {
            let start = if geometry.has_data_file() {
                0
            } else {
                plan.data_offset().0
            };
            let host = HostOffset(start + cluster * cluster_size);
            // A raw data file shows all that it has; there is no backing file then.
            let entry = if geometry.has_extended_l2() && !shows_space {
                // The space is reserved, and hides nothing of a backing file.
                let space = Some(Space { host, copied: true });
                L2Entry::from_parts(space, Subclusters::UNALLOCATED)
            } else if encrypted && geometry.has_zero_flag() {
                // Zeroes in the file are noise once they are decrypted.
                L2Entry::ZeroAllocated { host, copied: true }
            } else {
                L2Entry::Normal { host, copied: true }
            };
            entry.encode(geometry).words(geometry)
        });
        let bytes = encode_table(words, count * cluster_size)?;
        let at = plan.l2_offset().0 + table * cluster_size;
        file.write(at, bytes, RequestFlags::empty()).await?;
        table += count;
    }
    Ok(())
}

fn zeroed(len: u64) -> Result<Vec<u8>> {
    let out_of_memory = || {
        Error::new(
            ErrorKind::OutOfMemory,
            format!("cannot allocate {len} bytes"),
        )
    };
    let len = usize::try_from(len).map_err(|_| out_of_memory())?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(len).map_err(|_| out_of_memory())?;
    bytes.resize(len, 0);
    Ok(bytes)
}

/// `words` big-endian, followed by zeroes up to `len` bytes.
fn encode_table(words: impl Iterator<Item = u64>, len: u64) -> Result<Vec<u8>> {
    let mut bytes = zeroed(len)?;
    let (slots, _) = bytes.as_chunks_mut::<8>();
    for (slot, word) in slots.iter_mut().zip(words) {
        *slot = word.to_be_bytes();
    }
    Ok(bytes)
}
