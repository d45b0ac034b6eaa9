//! Probes, opens and creates images. Whatever a file holds, opening it gives an image that makes sense or an error that
//! names the field.

use std::sync::Arc;

use async_trait::async_trait;
use block_core::{
    Capabilities, Child, ChildRole, DriverFactory, DriverKind, Error, Options, RequestFlags,
    Result,
    driver::Truncate,
    options::Size,
    registry::{CreateContext, CreateOption, OpenContext, Opened},
};
use serde::Deserialize;

use crate::{
    NAME,
    driver::Ledger,
    layout::{ENTRY_BYTES, GuestCluster, HEADER_BYTES, Header, MAGIC, Owner},
    table::Table,
};

/// Makes nodes of the ledger format.
///
/// Options of a node: `file`, and `backing` in place of the backing file that the image names.
#[derive(Debug, Clone, Copy, Default)]
pub struct LedgerFactory;

/// What `-o` takes. Unknown options are refused, not ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct CreateOptions {
    size: Option<Size>,
    cluster_size: Option<Size>,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
}

#[async_trait]
impl DriverFactory for LedgerFactory {
    fn name(&self) -> &'static str {
        NAME
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: &str) -> u32 {
        if head.starts_with(MAGIC) { 100 } else { 0 }
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let node = context.open_file(&mut options).await?;
        // A way to the file for as long as this function runs. It isn't kept.
        let file = Child::unattached(node.clone());
        let header = Header::parse(&file.read_padded(0, HEADER_BYTES).await?)?;
        let end = header.first_data().0 * header.cluster_size;
        // Checked before memory is asked for: a short file can't make us read large tables.
        if file.length() < end {
            return Err(
                Error::invalid("The file ends within its tables").with_field(
                    "file length",
                    file.length(),
                    format!("at least {end}"),
                ),
            );
        }
        let table = async |at, entries| {
            let bytes = file
                .read_padded(at, (entries * ENTRY_BYTES) as usize)
                .await?;
            Ok::<_, Error>(Table::from_bytes(at, &bytes))
        };
        let map = table(header.map_at(), header.map_entries).await?;
        let ledger = table(header.ledger_at(), header.ledger_entries).await?;
        for (guest, raw) in map.entries().iter().enumerate() {
            header.check_entry(GuestCluster(guest as u64), *raw)?;
        }
        // Opening a file that an image names is the caller's decision; the core asks it.
        let (name, format) = header.backing.clone().unzip();
        let format = format.filter(|format| !format.is_empty());
        let backing = context
            .open_backing(&mut options, &node, name.as_deref(), format.as_deref())
            .await?;
        if let Some(key) = options.0.keys().next() {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
        let writable = file.driver().capabilities().contains(Capabilities::WRITE);
        let read_only = context.node.read_only || (context.node.auto_read_only && !writable);
        let for_check = context.how.for_check;
        if !read_only && !for_check {
            header.check_writable()?;
        }
        let driver = Ledger::new(header, map, ledger, read_only);
        if !read_only && !for_check {
            // An allocator that believed a wrong ledger would give one cluster to two owners.
            let report = driver.examine();
            if let Some(finding) = report.findings.iter().find(|_| report.corruptions > 0) {
                let text = format!("The image is corrupt ({}): check it", finding.message);
                return Err(Error::corrupt(text));
            }
        }
        let mut edges = vec![(ChildRole::File, "file".to_owned(), node)];
        edges.extend(backing.map(|node| (ChildRole::Backing, "backing".to_owned(), node)));
        Ok(Opened {
            driver: Arc::new(driver),
            edges,
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        const {
            &[
                CreateOption::new("backing_file", "str", "File name of a base image"),
                CreateOption::new("backing_fmt", "str", "Image format of the base image"),
                CreateOption::new("cluster_size", "size", "Cluster size, 64k if not given"),
                CreateOption::new("size", "size", "Virtual disk size"),
            ]
        }
    }

    async fn create(&self, context: CreateContext, options: Options) -> Result<()> {
        let options: CreateOptions = options.parse()?;
        let size = options
            .size
            .ok_or_else(|| Error::invalid("Image creation needs a size parameter"))?;
        let cluster_size = options.cluster_size.map_or(65536, |size| size.0);
        let format = options.backing_fmt.unwrap_or_default();
        let backing = options.backing_file.map(|file| (file, format));
        let header = Header::new(size.0, cluster_size, backing)?;

        // The storage is empty and reads as zeroes: the map is complete as it is. The ledger has one kind of entry.
        let file = context.file()?;
        let first_data = header.first_data().0;
        let how = Truncate::default();
        file.truncate(first_data * cluster_size, how).await?;
        let by_format = Owner::Format.encode().to_le_bytes();
        let ledger = by_format.repeat(first_data as usize);
        let none = RequestFlags::empty();
        file.write(header.ledger_at(), ledger, none).await?;
        // The header is what makes it an image, so it comes last.
        file.flush().await?;
        file.write(0, header.to_bytes()?, none).await?;
        file.flush().await
    }
}
