//! Probing, creating and opening images of the third party's format.

use std::sync::Arc;

use async_trait::async_trait;
use block_core::{
    driver::{ChildRole, DriverKind},
    error::{Error, Result},
    flags::RequestFlags,
    options::{Options, parse_size},
    registry::{CreateContext, CreateOption, DriverFactory, OpenContext, Opened},
    request::Child,
};
use serde_json::Value;

use super::{
    NAME,
    driver::ThirdParty,
    table::{MAGIC, MAX_CLUSTERS, TABLE_AT, Table},
};

/// Makes nodes of the third party's format.
///
/// Options of creation: `size` and `cluster_size` (default 4096). A backing file is named when the image is opened
/// (`backing`), not in the image.
#[derive(Debug, Clone, Copy, Default)]
pub struct ThirdPartyFactory;

fn take_size(options: &mut Options, key: &str) -> Result<Option<u64>> {
    match options.take(key) {
        None => Ok(None),
        Some(Value::String(text)) => parse_size(&text).map(Some),
        Some(value) => value
            .as_u64()
            .map(Some)
            .ok_or_else(|| Error::invalid(format!("Parameter '{key}' expects a size"))),
    }
}

/// The mapping of an image.
async fn read_table(file: &Child) -> Result<Table> {
    let head = file.read_padded(0, 32).await?;
    let (cluster, size, room) = Table::parse_header(&head)?;
    let mut table = Table::new(cluster, size, room);
    let bytes = file.read_padded(TABLE_AT, table.entries.len() * 8).await?;
    table.load(&bytes, file.length())?;
    Ok(table)
}

#[async_trait]
impl DriverFactory for ThirdPartyFactory {
    fn name(&self) -> &'static str {
        NAME
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn has_backing(&self) -> bool {
        // Its images don't name one: it comes with the options.
        true
    }

    fn probe(&self, head: &[u8], _: &str) -> u32 {
        if head.starts_with(MAGIC) { 100 } else { 0 }
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let file = context.open_file(&mut options).await?;
        let backing = context
            .open_backing(&mut options, &file, None, None)
            .await?;
        if let Some(key) = options.0.keys().next() {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
        let child = Child::unattached(file.clone());
        let table = read_table(&child)
            .await
            .map_err(|error| match child.filename() {
                Some(name) => error.with_file(name),
                None => error,
            })?;
        let driver = ThirdParty::new(table, context.node.read_only);
        let mut edges = vec![(ChildRole::File, "file".to_owned(), file)];
        if let Some(backing) = backing {
            edges.push((ChildRole::Backing, "backing".to_owned(), backing));
        }
        Ok(Opened {
            driver: Arc::new(driver),
            edges,
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        &[
            CreateOption {
                name: "cluster_size",
                kind: "size",
                help: "Cluster size",
            },
            CreateOption {
                name: "size",
                kind: "size",
                help: "Virtual disk size",
            },
        ]
    }

    async fn create(&self, context: CreateContext, mut options: Options) -> Result<()> {
        let size = take_size(&mut options, "size")?
            .ok_or_else(|| Error::invalid("Image creation needs a size parameter"))?;
        let cluster = take_size(&mut options, "cluster_size")?.unwrap_or(4096);
        if let Some(key) = options.0.keys().next() {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
        // Room for growing to four times the size.
        let room = size
            .div_ceil(cluster.max(1))
            .saturating_mul(4)
            .clamp(64, MAX_CLUSTERS);
        let table = Table::new(cluster, size, room);
        let bytes = table.to_bytes();
        Table::parse_header(&bytes)?;
        let file = context.file()?;
        file.write(0, bytes, RequestFlags::empty()).await?;
        file.flush().await
    }
}
