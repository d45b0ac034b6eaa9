//! Nodes and their edges. A node is one layer: a driver, its children, and everything the core keeps about it. How the
//! graph changes is the business of `graph`; how requests run is that of `path`.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use parking_lot::{Mutex, RwLock};
use serde_json::Value;

use crate::{
    bitmap::{BitmapUse, Bitmaps, DirtyBitmap, NamedBitmap},
    deferred::DeferredWork,
    driver::{BlockDriver, ChildRole, DriverKind},
    env::Environment,
    error::Error,
    flags::PermissionSet,
    limits::Limits,
    observe::Observer,
    options::{DetectZeroes, DiscardMode, NodeOptions, Options},
    request::Child,
    stats::NodeStats,
    tracked::Tracker,
};

/// A parent's view of one child.
#[derive(Debug, Clone)]
pub struct Edge {
    /// What the child is to the parent.
    pub role: ChildRole,
    /// The name of the edge: `file`, `backing`, `extents.0`, …
    pub name: String,
    /// The child.
    pub child: Child,
}

/// The children of a node at one moment. Immutable: a change of the graph makes a new one.
#[derive(Debug, Clone, Default)]
pub struct Edges(Vec<Edge>);

impl Edges {
    /// Edges from a list.
    pub fn new(list: Vec<Edge>) -> Self {
        Self(list)
    }

    /// The first child in `role`.
    pub fn child(&self, role: ChildRole) -> Option<&Child> {
        self.0
            .iter()
            .find(|edge| edge.role == role)
            .map(|edge| &edge.child)
    }

    /// The edge called `name`.
    pub fn named(&self, name: &str) -> Option<&Edge> {
        self.0.iter().find(|edge| edge.name == name)
    }

    /// The index of the first child in `role`, as [`crate::driver::Mapping::Data`] wants it.
    pub fn index(&self, role: ChildRole) -> Option<usize> {
        self.0.iter().position(|edge| edge.role == role)
    }

    /// The edge at `index`.
    pub fn get(&self, index: usize) -> Option<&Edge> {
        self.0.get(index)
    }

    /// All edges.
    pub fn iter(&self) -> std::slice::Iter<'_, Edge> {
        self.0.iter()
    }

    /// The child through which a chain goes on: the filtered child of a filter, the backing child of a format.
    pub fn chain_child(&self) -> Option<&Child> {
        self.child(ChildRole::Filtered)
            .or_else(|| self.child(ChildRole::Backing))
    }

    /// The child that holds this node's own data: filtered, data file or file.
    pub fn primary(&self) -> Option<&Child> {
        self.child(ChildRole::Filtered)
            .or_else(|| self.child(ChildRole::DataFile))
            .or_else(|| self.child(ChildRole::File))
    }
}

impl<'a> IntoIterator for &'a Edges {
    type Item = &'a Edge;
    type IntoIter = std::slice::Iter<'a, Edge>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

/// What every request looks at, in one place, so that it takes one load. Immutable: a change makes a new one.
pub(crate) struct View {
    pub edges: Arc<Edges>,
    pub limits: Limits,
    pub discard: DiscardMode,
    pub detect_zeroes: DetectZeroes,
}

/// What flush needs to know about the past of a node.
#[derive(Default)]
pub(crate) struct FlushState {
    /// Bumped when a request that may have changed something has ended.
    pub written: AtomicU64,
    /// What `written` was when the last successful flush began.
    pub flushed: AtomicU64,
    /// Data or the length were changed at this node, ever: it isn't closed without a flush. (`written` is also bumped for what only may
    /// have changed something.)
    pub changed: AtomicBool,
    /// The first flush that failed: every later one fails like it until the node is reopened.
    pub failed: Mutex<Option<Error>>,
    /// One flush at a time; those who come meanwhile share the next.
    pub turn: Arc<futures::lock::Mutex<()>>,
}

impl FlushState {
    /// Data or the length were changed by a request that has ended.
    pub fn note_change(&self) {
        if !self.changed.load(Ordering::Relaxed) {
            self.changed.store(true, Ordering::SeqCst);
        }
        self.written.fetch_add(1, Ordering::SeqCst);
    }
}

/// One layer of the graph.
pub struct Node {
    id: u64,
    name: String,
    driver: Arc<dyn BlockDriver>,
    env: Arc<dyn Environment>,
    pub(crate) deferred: Arc<DeferredWork>,
    view: ArcSwap<View>,
    tracker: Arc<Tracker>,
    /// Who asks what the node is made of, and who changes that without changing its content: a repair, an amendment, a change
    /// of its snapshots. Questions aren't tracked like data requests, since whoever holds a range may have to ask.
    questions: Tracker,
    options: RwLock<NodeOptions>,
    pub(crate) flush: FlushState,
    bitmaps: RwLock<Vec<Arc<DirtyBitmap>>>,
    has_bitmaps: AtomicBool,
    /// Those that users know by name, oldest first. Their bits are among `bitmaps`.
    named: RwLock<Vec<Arc<NamedBitmap>>>,
    stats: NodeStats,
    /// Boxed once more, because a pointer to a trait object doesn't fit into one word.
    observer: ArcSwapOption<Box<dyn Observer>>,
    has_observer: AtomicBool,
    /// What all parents together use and share, as last committed.
    permissions: Mutex<PermissionSet>,
    /// Held by the program itself, not only by parents (`blockdev-add`).
    pub(crate) kept: AtomicBool,
    /// It is being closed: nobody may come to it any more.
    pub(crate) closing: AtomicBool,
    /// A node below wants to be told of debug events: requests go through the drivers then, not past them.
    debugged: AtomicBool,
    /// Bumped when something that requests look at before they have their ticket changes: length, edges, options.
    epoch: AtomicU64,
    /// The largest request alignment that any parent ever had: how far beyond the end parents may read.
    parent_alignment: AtomicU64,
}

impl Node {
    pub(crate) fn new(
        id: u64,
        name: String,
        driver: Arc<dyn BlockDriver>,
        env: Arc<dyn Environment>,
        deferred: Arc<DeferredWork>,
        edges: Edges,
        (tracker, questions): (Tracker, Tracker),
        options: NodeOptions,
    ) -> Self {
        let view = View {
            limits: driver.limits(&edges),
            edges: Arc::new(edges),
            discard: options.discard,
            detect_zeroes: options.detect_zeroes,
        };
        Self {
            id,
            name,
            driver,
            env,
            deferred,
            view: ArcSwap::from_pointee(view),
            tracker: Arc::new(tracker),
            questions,
            options: RwLock::new(options),
            flush: FlushState::default(),
            bitmaps: RwLock::default(),
            has_bitmaps: AtomicBool::new(false),
            named: RwLock::default(),
            stats: NodeStats::default(),
            observer: ArcSwapOption::empty(),
            has_observer: AtomicBool::new(false),
            permissions: Mutex::new(PermissionSet::NONE),
            kept: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            debugged: AtomicBool::new(false),
            epoch: AtomicU64::new(0),
            parent_alignment: AtomicU64::new(1),
        }
    }

    /// A number that no other node of the graph ever has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The node's name, unique in the graph.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The driver.
    pub fn driver(&self) -> &Arc<dyn BlockDriver> {
        &self.driver
    }

    /// The environment.
    pub fn env(&self) -> &Arc<dyn Environment> {
        &self.env
    }

    /// The children now.
    pub fn edges(&self) -> Arc<Edges> {
        self.view.load().edges.clone()
    }

    /// The block size in which parents read: the last block may lie partly beyond the end, where it reads as zeroes.
    pub(crate) fn tail_alignment(&self, limits: &Limits) -> u64 {
        let parents = self.parent_alignment.load(Ordering::SeqCst);
        parents.max(limits.request_alignment).max(1)
    }

    /// What requests look at, now.
    #[inline]
    pub(crate) fn view(&self) -> Guard<Arc<View>> {
        self.view.load()
    }

    /// Makes another view. Whoever looked at the old one before they had their ticket looks again.
    fn change_view(&self, change: impl Fn(&View) -> View) {
        self.view.rcu(|old| change(old));
        self.bump_epoch();
        let view = self.view();
        for edge in view.edges.iter() {
            let child = &edge.child.node().parent_alignment;
            child.fetch_max(view.limits.request_alignment, Ordering::SeqCst);
        }
    }

    pub(crate) fn set_edges(&self, edges: Arc<Edges>) {
        self.change_view(|old| View {
            edges: edges.clone(),
            ..*old
        });
    }

    /// Whether a node below wants to be told of this node's debug events.
    pub fn is_debugged(&self) -> bool {
        self.debugged.load(Ordering::Relaxed)
    }

    /// After a change of edges anywhere below.
    pub(crate) fn refresh_debugged(&self) {
        let debugged = crate::debug::heard(&self.view.load().edges);
        self.debugged.store(debugged, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    fn bump_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// The node's length in bytes, now.
    pub fn length(&self) -> u64 {
        self.driver.length(&self.view.load().edges)
    }

    /// The node's limits, now.
    pub fn limits(&self) -> Limits {
        self.view.load().limits
    }

    /// Asks the driver for its limits again. Whoever looked at the node before, and goes on later, looks again.
    pub(crate) fn refresh_limits(&self) {
        self.change_view(|old| View {
            limits: self.driver.limits(&old.edges),
            edges: old.edges.clone(),
            ..*old
        });
    }

    /// The file name that a user knows the node by: its own, or that of the child that holds its data.
    pub fn filename(&self) -> Option<String> {
        self.driver.filename().or_else(|| {
            let edges = self.edges();
            edges
                .child(ChildRole::File)
                .or_else(|| edges.primary())
                .and_then(|child| child.filename())
        })
    }

    /// The name by which an image can name this node as its backing file: its file's where opening that with the node's driver is enough,
    /// `json:{…}` where more has to be said. Filters are left out. What an overlay says of backing files and data files *of* this node
    /// isn't in it: its own header says that. `None` for a node without a file.
    pub fn name_in_images(self: &Arc<Self>) -> Option<String> {
        let image = self.skip_filters();
        let file = image.file_below();
        let is_plain = file.is_none_or(|file| file.driver.kind() == DriverKind::Protocol);
        if is_plain && image.driver.decisive_options().0.is_empty() {
            return image.filename();
        }
        let options = image.options_in_images()?;
        Some(format!("json:{}", Value::Object(options.0)))
    }

    /// What this image is in, without filters. `None` for storage.
    fn file_below(&self) -> Option<Arc<Self>> {
        let edges = self.edges();
        let file = edges.child(ChildRole::File).or_else(|| edges.primary())?;
        let file = file.node();
        match file.driver.kind() {
            DriverKind::Filter => file.file_below(),
            _ => Some(file.clone()),
        }
    }

    fn options_in_images(&self) -> Option<Options> {
        let mut options = self.driver.decisive_options();
        options.set("driver", self.driver.name());
        match self.file_below() {
            None => options.set("filename", self.filename()?),
            Some(file) => options.set("file", Value::Object(file.options_in_images()?.0)),
        }
        Some(options)
    }

    /// The common options that it was opened with.
    pub fn options(&self) -> NodeOptions {
        self.options.read().clone()
    }

    pub(crate) fn with_options<T>(&self, f: impl FnOnce(&mut NodeOptions) -> T) -> T {
        let mut options = self.options.write();
        let result = f(&mut options);
        self.change_view(|old| View {
            edges: old.edges.clone(),
            discard: options.discard,
            detect_zeroes: options.detect_zeroes,
            ..*old
        });
        result
    }

    pub(crate) fn option<T>(&self, f: impl FnOnce(&NodeOptions) -> T) -> T {
        f(&self.options.read())
    }

    /// The tracked requests of this node.
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.tracker
    }

    /// Block status requests, and what they have to wait for.
    pub(crate) fn questions(&self) -> &Tracker {
        &self.questions
    }

    /// Counters.
    pub fn stats(&self) -> &NodeStats {
        &self.stats
    }

    /// From the next request on, `observer` is told of every request of this node; `None` ends that.
    pub fn observe(&self, observer: Option<Box<dyn Observer>>) {
        self.has_observer
            .store(observer.is_some(), Ordering::Release);
        self.observer.store(observer.map(Arc::new));
    }

    /// Tells the observer, if there is one.
    #[inline]
    pub(crate) fn tell(&self, event: impl FnOnce(&dyn Observer)) {
        if self.has_observer.load(Ordering::Acquire)
            && let Some(observer) = &*self.observer.load()
        {
            event(&***observer);
        }
    }

    /// What all its parents together use and share.
    pub fn permissions(&self) -> PermissionSet {
        *self.permissions.lock()
    }

    pub(crate) fn set_permissions(&self, set: PermissionSet) {
        *self.permissions.lock() = set;
    }

    /// Starts to record writes in `bitmap`. Call it in a drained section, or accept that requests in flight may or
    /// may not be recorded.
    pub fn add_bitmap(&self, bitmap: Arc<DirtyBitmap>) {
        self.bitmaps.write().push(bitmap);
        self.has_bitmaps.store(true, Ordering::SeqCst);
    }

    /// Stops recording in `bitmap`.
    pub fn remove_bitmap(&self, bitmap: &Arc<DirtyBitmap>) {
        let mut bitmaps = self.bitmaps.write();
        bitmaps.retain(|other| !Arc::ptr_eq(other, bitmap));
        self.has_bitmaps
            .store(!bitmaps.is_empty(), Ordering::SeqCst);
    }

    /// The bitmaps that record writes.
    pub fn bitmaps(&self) -> Vec<Arc<DirtyBitmap>> {
        self.bitmaps.read().clone()
    }

    /// The bitmaps that users know by name, and what can be done with them.
    pub fn named_bitmaps(self: &Arc<Self>) -> Bitmaps {
        Bitmaps::of_node(self.clone())
    }

    /// The named bitmaps, oldest first. What is done with them goes through [`Self::named_bitmaps`].
    pub fn named(&self) -> Vec<Arc<NamedBitmap>> {
        self.named.read().clone()
    }

    /// False when the name is taken.
    pub(crate) fn attach_named(&self, bitmap: &Arc<NamedBitmap>) -> bool {
        let mut named = self.named.write();
        if named.iter().any(|other| other.name() == bitmap.name()) {
            return false;
        }
        named.push(bitmap.clone());
        if !bitmap.is_inconsistent() {
            self.add_bitmap(bitmap.bits().clone());
        }
        true
    }

    pub(crate) fn detach_named(&self, bitmap: &Arc<NamedBitmap>) {
        let mut named = self.named.write();
        named.retain(|other| !Arc::ptr_eq(other, bitmap));
        self.remove_bitmap(bitmap.bits());
    }

    /// Whether every persistent bitmap can follow a change of the length: a driver asks before it resizes an image that
    /// stores bitmaps. The core resizes the bits when the request has ended.
    ///
    /// # Errors
    /// Those of [`NamedBitmap::check`]: a busy, read-only or inconsistent bitmap can't follow.
    pub fn check_bitmaps_resizable(&self) -> crate::error::Result<()> {
        let named = self.named.read();
        let mut stored = named.iter().filter(|bitmap| bitmap.is_persistent());
        stored.try_for_each(|bitmap| bitmap.check(BitmapUse::Change))
    }

    pub(crate) fn mark_dirty(&self, offset: u64, len: u64) {
        if self.has_bitmaps.load(Ordering::SeqCst) {
            for bitmap in self.bitmaps.read().iter() {
                if offset.saturating_add(len) > bitmap.length() {
                    bitmap.grow(self.length());
                }
                bitmap.mark(offset, len);
            }
        }
    }

    pub(crate) fn resize_bitmaps(&self, length: u64) {
        if self.has_bitmaps.load(Ordering::SeqCst) {
            for bitmap in self.bitmaps.read().iter() {
                bitmap.resize(length);
            }
        }
    }

    /// The nodes below, following the chain: filtered and backing children, topmost first, without this one.
    pub fn chain(self: &Arc<Self>) -> Vec<Arc<Node>> {
        let mut chain = Vec::new();
        let mut at = self.edges().chain_child().map(|child| child.node().clone());
        while let Some(node) = at {
            at = node.edges().chain_child().map(|child| child.node().clone());
            chain.push(node);
        }
        chain
    }

    /// The backing node of the first format found through filters, if there is one.
    pub fn backing(self: &Arc<Self>) -> Option<Arc<Node>> {
        let mut at = self.clone();
        loop {
            let edges = at.edges();
            if let Some(child) = edges.child(ChildRole::Backing) {
                return Some(child.node().clone());
            }
            let next = edges.child(ChildRole::Filtered)?.node().clone();
            at = next;
        }
    }

    /// This node, or what it filters.
    pub fn skip_filters(self: &Arc<Self>) -> Arc<Node> {
        let mut at = self.clone();
        loop {
            let next = at
                .edges()
                .child(ChildRole::Filtered)
                .map(|child| child.node().clone());
            match next {
                Some(next) => at = next,
                None => return at,
            }
        }
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node '{}' ({})", self.name, self.driver.name())
    }
}
