//! `--bitmaps`: the persistent bitmaps of the one source are copied with its data.

use block_core::{
    BlockHandle, Capabilities,
    bitmap::{NamedBitmap, NewBitmap},
};
use std::sync::Arc;

use crate::common::{failure::Failure, output::complain, program::Program};

/// What is to be copied: found out before the target is made.
pub struct ToCopy {
    from: Arc<block_core::Node>,
    list: Vec<Arc<NamedBitmap>>,
}

impl ToCopy {
    /// The bitmaps of `source`, without the broken ones if those are to be skipped.
    pub fn of(source: &BlockHandle, skip_broken: bool, program: Program) -> Result<Self, Failure> {
        let from = source.node();
        if !from
            .driver()
            .capabilities()
            .contains(Capabilities::PERSISTENT_BITMAPS)
        {
            return Err(Failure::new("Source lacks bitmap support"));
        }
        let mut list = source.named_bitmaps().all();
        list.retain(|bitmap| bitmap.is_persistent());
        for bitmap in list.iter().filter(|bitmap| bitmap.is_inconsistent()) {
            let name = bitmap.name();
            if !skip_broken {
                return Err(Failure::new(format!(
                    "Cannot copy inconsistent bitmap '{name}'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap \
                     --remove' to delete it"
                )));
            }
            complain!(
                "{}: warning: Skipping inconsistent bitmap '{name}'",
                program.name()
            );
        }
        list.retain(|bitmap| !bitmap.is_inconsistent());
        Ok(Self { from, list })
    }

    /// Copies them into `target`, whose data has been written.
    pub async fn copy(&self, target: &BlockHandle) -> Result<(), Failure> {
        let bitmaps = target.named_bitmaps();
        // qemu-img begins with the last.
        if let Some(taken) = self
            .list
            .iter()
            .rev()
            .find(|bitmap| bitmaps.find(bitmap.name()).is_ok())
        {
            let name = taken.name();
            return Err(Failure::new(format!(
                "Failed to create bitmap {name}: Bitmap already exists: {name}"
            )));
        }
        for bitmap in &self.list {
            let name = bitmap.name();
            let new = NewBitmap {
                name: name.to_owned(),
                granularity: Some(bitmap.bits().granularity()),
                persistent: true,
                disabled: true,
            };
            bitmaps.add(new).await.map_err(|error| {
                Failure::context(format!("Failed to create bitmap {name}"), &error)
            })?;
        }
        for bitmap in self.list.iter().rev() {
            let name = bitmap.name();
            let source = (self.from.clone(), name.to_owned());
            let merged = bitmaps.merge(name, &[source]).and_then(|()| {
                if bitmap.bits().is_enabled() {
                    bitmaps.enable(name)?;
                }
                Ok(())
            });
            if let Err(error) = merged {
                let failure = Failure::context(format!("Failed to populate bitmap {name}"), &error);
                // A target that existed is left without what is only half there.
                for bitmap in &self.list {
                    let _ = bitmaps.remove(bitmap.name()).await;
                }
                return Err(failure);
            }
        }
        Ok(())
    }
}
