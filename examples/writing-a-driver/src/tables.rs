//! Opening and making images that have the tables of the finished example: the same for steps 3, 4 and 5, which differ in the
//! driver only.

use std::{marker::PhantomData, sync::Arc};

use async_trait::async_trait;
use block_core::{
    BlockDriver, Capabilities, Child, ChildRole, DriverFactory, DriverKind, Error, Options, Result,
    registry::{CreateContext, CreateOption, OpenContext, Opened},
};
use format_ledger::{
    LedgerFactory,
    layout::{ENTRY_BYTES, GuestCluster, HEADER_BYTES, Header, MAGIC},
    table::Table,
};

/// A driver over the tables.
pub trait OverTables: BlockDriver + Sized {
    /// Its name.
    const NAME: &'static str;

    /// An image that has these tables.
    fn new(header: &Header, map: Table, ledger: Table, read_only: bool) -> Self;
}

/// Makes nodes of `D`.
pub struct Factory<D>(PhantomData<fn() -> D>);

impl<D> Default for Factory<D> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

#[async_trait]
impl<D: OverTables> DriverFactory for Factory<D> {
    fn name(&self) -> &'static str {
        D::NAME
    }

    fn kind(&self) -> DriverKind {
        DriverKind::Format
    }

    fn probe(&self, head: &[u8], _filename: &str) -> u32 {
        if head.starts_with(MAGIC) { 100 } else { 0 }
    }

    async fn open(&self, context: OpenContext, mut options: Options) -> Result<Opened> {
        let node = context.open_file(&mut options).await?;
        let file = Child::unattached(node.clone());
        let header = Header::parse(&file.read_padded(0, HEADER_BYTES).await?)?;
        let map_bytes = (header.map_entries * ENTRY_BYTES) as usize;
        let map = file.read_padded(header.map_at(), map_bytes).await?;
        let map = Table::from_bytes(header.map_at(), &map);
        for (guest, raw) in map.entries().iter().enumerate() {
            header.check_entry(GuestCluster(guest as u64), *raw)?;
        }
        let ledger_bytes = (header.ledger_entries * ENTRY_BYTES) as usize;
        let ledger = file.read_padded(header.ledger_at(), ledger_bytes).await?;
        let ledger = Table::from_bytes(header.ledger_at(), &ledger);

        let (name, format) = header.backing.clone().unzip();
        let backing = context
            .open_backing(&mut options, &node, name.as_deref(), format.as_deref())
            .await?;
        if let Some(key) = options.0.keys().next() {
            return Err(Error::invalid(format!("Invalid parameter '{key}'")));
        }
        let driver = D::new(&header, map, ledger, context.node.read_only);
        if backing.is_some() && !driver.capabilities().contains(Capabilities::BACKING) {
            return Err(Error::unsupported("The driver has no backing files"));
        }
        let mut edges = vec![(ChildRole::File, "file".to_owned(), node)];
        edges.extend(backing.map(|node| (ChildRole::Backing, "backing".to_owned(), node)));
        Ok(Opened {
            driver: Arc::new(driver),
            edges,
        })
    }

    fn create_options(&self) -> &'static [CreateOption] {
        LedgerFactory.create_options()
    }

    async fn create(&self, context: CreateContext, options: Options) -> Result<()> {
        LedgerFactory.create(context, options).await
    }
}
