//! What an embedder does with the named bitmaps of a node. Each step checks everything before it changes anything. Nothing
//! here knows how a format stores them.

use std::sync::Arc;

use super::{
    BitmapInfo, BitmapUse, DirtyBitmap, MAX_GRANULARITY, MAX_NAME, MIN_GRANULARITY, NamedBitmap,
};
use crate::{
    driver::Capabilities,
    error::{Error, ErrorKind, Result},
    handle::{RootGuard, RootState},
    node::Node,
    path,
};

/// Default granularity, unless the image's clusters are smaller.
const DEFAULT_GRANULARITY: u64 = 65536;
/// The smallest default.
const MIN_DEFAULT: u64 = 4096;

/// A bitmap that is to be added.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewBitmap {
    /// 1 to 1023 bytes.
    pub name: String,
    /// Bytes per bit: a power of two from 512 to 2 GiB. `None`: the image's cluster size, within 4 to 64 KiB.
    pub granularity: Option<u64>,
    /// The image stores it when it is closed or becomes read-only.
    pub persistent: bool,
    /// It records nothing until it is enabled.
    pub disabled: bool,
}

impl NewBitmap {
    /// One that is lost when the node is closed, and records from the start.
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// The same, stored by the image.
    #[must_use]
    pub fn persistent(mut self) -> Self {
        self.persistent = true;
        self
    }

    /// The same, with so many bytes per bit.
    #[must_use]
    pub fn with_granularity(mut self, granularity: u64) -> Self {
        self.granularity = Some(granularity);
        self
    }
}

enum Place {
    Node(Arc<Node>),
    Handle(Arc<RootState>),
}

/// The named bitmaps of a node: [`crate::BlockHandle::named_bitmaps`], [`Node::named_bitmaps`].
///
/// Requests go on meanwhile, except while the image's own metadata is changed (a persistent bitmap is added or removed,
/// [`Self::store`]): those steps wait for all requests that began before, and hold back later ones. A request that is
/// under way is recorded when it ends, in the bitmaps that are enabled then; so whatever is written after one of these
/// steps has returned is recorded according to it.
///
/// Cancellation: a step that still waits leaves no trace; one that has reached the driver runs to its end.
///
/// ```
/// # use std::sync::Arc;
/// # use block_core::{BlockHandle, RequestFlags, Result, bitmap::NewBitmap};
/// async fn since(disk: &BlockHandle) -> Result<u64> {
///     let bitmaps = disk.named_bitmaps();
///     bitmaps.add(NewBitmap::named("since-monday").with_granularity(65536)).await?;
///     disk.write(1 << 20, vec![1; 512], RequestFlags::empty()).await?;
///     let bitmap = bitmaps.find("since-monday")?;
///     assert_eq!(bitmap.bits().next_dirty(0, u64::MAX), Some((1 << 20, 65536)));
///     bitmaps.remove("since-monday").await?;
///     Ok(bitmap.info().count)
/// }
/// ```
pub struct Bitmaps(Place);

impl Bitmaps {
    pub(crate) fn of_node(node: Arc<Node>) -> Self {
        Self(Place::Node(node))
    }

    pub(crate) fn of_handle(root: Arc<RootState>) -> Self {
        Self(Place::Handle(root))
    }

    fn node(&self) -> Arc<Node> {
        match &self.0 {
            Place::Node(node) => node.clone(),
            Place::Handle(root) => root.node.load_full(),
        }
    }

    /// Admits a step, and says where.
    async fn enter(&self) -> (Arc<Node>, Option<RootGuard>) {
        match &self.0 {
            Place::Node(node) => (node.clone(), None),
            Place::Handle(root) => {
                let guard = root.enter().await;
                (root.node.load_full(), Some(guard))
            }
        }
    }

    /// All of them, oldest first.
    pub fn list(&self) -> Vec<BitmapInfo> {
        self.node()
            .named()
            .iter()
            .map(|bitmap| bitmap.info())
            .collect()
    }

    /// All of them, oldest first.
    pub fn all(&self) -> Vec<Arc<NamedBitmap>> {
        self.node().named()
    }

    /// The one called `name`.
    ///
    /// # Errors
    /// ENOENT.
    pub fn find(&self, name: &str) -> Result<Arc<NamedBitmap>> {
        find(&self.node(), name)
    }

    fn usable(&self, name: &str, purpose: BitmapUse) -> Result<Arc<NamedBitmap>> {
        let bitmap = self.find(name)?;
        bitmap.check(purpose)?;
        Ok(bitmap)
    }

    /// Adds a clear bitmap.
    ///
    /// # Errors
    /// EINVAL for a name or granularity out of range, EEXIST for a name that is taken; for a persistent one ENOTSUP when
    /// the format can't store any, EPERM when the image is read-only, and what the format says of its own limits.
    pub async fn add(&self, new: NewBitmap) -> Result<Arc<NamedBitmap>> {
        let (node, guard) = self.enter().await;
        if new.name.is_empty() {
            return Err(Error::invalid("Bitmap name cannot be empty"));
        }
        let granularity = match new.granularity {
            Some(granularity) => granularity,
            None => default_granularity(&node).await?,
        };
        if !granularity.is_power_of_two()
            || !(MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity)
        {
            return Err(
                Error::invalid("Granularity must be power of 2 and at least 512").with_field(
                    "granularity",
                    granularity,
                    "a power of two, 512 to 2147483648",
                ),
            );
        }
        check_free(&node, &new.name)?;
        if new.persistent {
            let (name, driver) = (new.name.clone(), node.driver().clone());
            let able = driver
                .capabilities()
                .contains(Capabilities::PERSISTENT_BITMAPS);
            let to = node.clone();
            // In the same exclusive step, so that nobody comes in between.
            path::exclusive(&node, guard, move |request| {
                Box::pin(async move {
                    let made = driver
                        .check_new_bitmap(request, name.clone(), granularity)
                        .await;
                    made.map_err(|error| {
                        // An image of this kind can't, or the format can't at all.
                        let never = !able && error.reason() == ErrorKind::NotSupported.strerror();
                        error.context(if never {
                            format!("Can't store persistent bitmaps to {}", to.name())
                        } else {
                            format!("Can't make bitmap '{name}' persistent in '{}'", to.name())
                        })
                    })?;
                    attach(&to, &new, granularity)
                })
            })
            .await
        } else {
            if new.name.len() > MAX_NAME {
                return Err(Error::invalid(format!(
                    "Name length exceeds maximum ({MAX_NAME} characters)"
                )));
            }
            attach(&node, &new, granularity)
        }
    }

    /// Removes a bitmap; a persistent one from the image, too, durably.
    ///
    /// # Errors
    /// ENOENT, EBUSY, EPERM (read-only), and whatever the storage reports. The bitmap is still there then.
    pub async fn remove(&self, name: &str) -> Result<()> {
        let (node, guard) = self.enter().await;
        let bitmap = find(&node, name)?;
        let held = bitmap.hold(BitmapUse::Remove)?;
        if bitmap.is_persistent() {
            let (driver, name) = (node.driver().clone(), name.to_owned());
            let to = node.clone();
            return path::exclusive(&node, guard, move |request| {
                Box::pin(async move {
                    driver.remove_bitmap(request, name).await?;
                    to.detach_named(held.bitmap());
                    Ok(())
                })
            })
            .await;
        }
        node.detach_named(&bitmap);
        Ok(())
    }

    /// Clears all bits.
    ///
    /// # Errors
    /// ENOENT, EBUSY, EPERM (read-only), EINVAL (inconsistent).
    pub fn clear(&self, name: &str) -> Result<()> {
        self.usable(name, BitmapUse::Change)?.bits().clear_all();
        Ok(())
    }

    /// Begins to record writes.
    ///
    /// # Errors
    /// As [`Self::clear`].
    pub fn enable(&self, name: &str) -> Result<()> {
        self.usable(name, BitmapUse::Change)?
            .bits()
            .set_enabled(true);
        Ok(())
    }

    /// Stops to record writes; the bits stay as they are.
    ///
    /// # Errors
    /// As [`Self::clear`].
    pub fn disable(&self, name: &str) -> Result<()> {
        self.usable(name, BitmapUse::Change)?
            .bits()
            .set_enabled(false);
        Ok(())
    }

    /// Adds to `target` what is dirty in `sources`: bitmaps of this node or of others, of any granularity.
    ///
    /// # Errors
    /// As [`Self::clear`]; EINVAL when lengths differ. Nothing was merged then.
    pub fn merge(&self, target: &str, sources: &[(Arc<Node>, String)]) -> Result<()> {
        let target = self.usable(target, BitmapUse::Change)?;
        let mut merged = Vec::with_capacity(sources.len());
        for (node, name) in sources {
            let source = find(node, name)?;
            source.check(BitmapUse::Read)?;
            // An empty one of the same length is merged as a trial.
            let (to, from) = (target.bits().length(), source.bits().length());
            if to != from {
                DirtyBitmap::new(to, MAX_GRANULARITY)?
                    .merge(&DirtyBitmap::new(from, MAX_GRANULARITY)?)?;
            }
            merged.push(source);
        }
        for source in merged {
            target.bits().merge(source.bits())?;
        }
        Ok(())
    }

    /// Has the image write all persistent bitmaps now, as they are, durably. While the image stays writable they go on being
    /// marked as in use there, since later writes aren't in them; they become trustworthy when it is closed or
    /// made read-only.
    ///
    /// # Errors
    /// ENOTSUP when the format can't store any, and whatever the storage reports.
    pub async fn store(&self) -> Result<()> {
        let (node, guard) = self.enter().await;
        let driver = node.driver().clone();
        path::exclusive(&node, guard, move |request| driver.store_bitmaps(request)).await
    }
}

impl std::fmt::Debug for Bitmaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.list()).finish()
    }
}

fn find(node: &Node, name: &str) -> Result<Arc<NamedBitmap>> {
    let found = node
        .named()
        .into_iter()
        .find(|bitmap| bitmap.name() == name);
    found.ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!("Dirty bitmap '{name}' not found"),
        )
    })
}

fn taken(name: &str) -> Error {
    Error::new(
        ErrorKind::AlreadyExists,
        format!("Bitmap already exists: {name}"),
    )
}

fn check_free(node: &Node, name: &str) -> Result<()> {
    match find(node, name) {
        Ok(_) => Err(taken(name)),
        Err(_) => Ok(()),
    }
}

fn attach(node: &Node, new: &NewBitmap, granularity: u64) -> Result<Arc<NamedBitmap>> {
    let bits = DirtyBitmap::new(node.length(), granularity)?;
    bits.set_enabled(!new.disabled);
    let mut bitmap = NamedBitmap::new(new.name.clone(), bits);
    if new.persistent {
        bitmap = bitmap.persistent();
    }
    let bitmap = Arc::new(bitmap);
    if !node.attach_named(&bitmap) {
        return Err(taken(&new.name));
    }
    Ok(bitmap)
}

/// The image's cluster size, within limits.
async fn default_granularity(node: &Arc<Node>) -> Result<u64> {
    let driver = node.driver().clone();
    let info = path::unranged(node, None, move |request| driver.info(request)).await?;
    let cluster = info.cluster_size.unwrap_or(DEFAULT_GRANULARITY);
    Ok(cluster.clamp(MIN_DEFAULT, DEFAULT_GRANULARITY))
}

/// Has the driver of a node that was just opened load what its image stores. Nobody else has the node yet.
pub(crate) async fn load(node: &Arc<Node>) -> Result<()> {
    let driver = node.driver().clone();
    if !driver
        .capabilities()
        .contains(Capabilities::PERSISTENT_BITMAPS)
    {
        return Ok(());
    }
    let loaded = path::exclusive(node, None, move |request| driver.load_bitmaps(request)).await?;
    for bitmap in loaded {
        let bitmap = Arc::new(bitmap);
        if !node.attach_named(&bitmap) {
            return Err(taken(bitmap.name()));
        }
    }
    Ok(())
}
