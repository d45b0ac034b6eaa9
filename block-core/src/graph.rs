//! The graph: which nodes there are, who is whose parent, who may do what, and how that changes while I/O goes on.
//!
//! Every change of edges happens in a drained section (`drain`), as a transaction: the new permissions are computed for
//! the whole graph, every driver concerned agrees, and only then anything changes. Data never passes through here.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, ReentrantMutex};

use crate::{
    deferred::DeferredWork,
    drain::{DrainGuard, Drains},
    driver::{BlockDriver, ChildRole},
    env::Environment,
    error::{Error, ErrorKind, Operation, Result},
    flags::PermissionSet,
    handle::{self, BlockHandle, RootState},
    node::{Edge, Edges, Node},
    options::{NodeOptions, check_name},
    path, permissions,
    request::Child,
    secret::Secrets,
    tracked::Tracker,
};

/// What the graph knows about who is connected to whom. Nodes hold their own edges.
#[derive(Default)]
pub(crate) struct Topology {
    pub nodes: BTreeMap<u64, Arc<Node>>,
    pub roots: BTreeMap<u64, Arc<RootState>>,
    /// Edges that may not change, and for whom: (parent, edge name).
    frozen: HashMap<(u64, String), Vec<String>>,
}

impl Topology {
    /// The nodes that have `node` as a child.
    pub fn parents(&self, node: u64) -> Vec<Arc<Node>> {
        self.nodes
            .values()
            .filter(|parent| {
                parent
                    .edges()
                    .iter()
                    .any(|edge| edge.child.node().id() == node)
            })
            .cloned()
            .collect()
    }

    /// The handles at `node`.
    pub fn roots_at(&self, node: u64) -> Vec<Arc<RootState>> {
        self.roots
            .values()
            .filter(|root| root.node.load().id() == node)
            .cloned()
            .collect()
    }

    /// `node` and everything above it.
    pub fn ancestors(&self, node: u64) -> Vec<u64> {
        let mut found = vec![node];
        let mut at = 0;
        while at < found.len() {
            for parent in self.parents(found[at]) {
                if !found.contains(&parent.id()) {
                    found.push(parent.id());
                }
            }
            at += 1;
        }
        found
    }
}

/// A change that is being prepared.
#[derive(Default)]
pub(crate) struct Change {
    pub edges: BTreeMap<u64, Arc<Edges>>,
    pub root_nodes: BTreeMap<u64, Arc<Node>>,
    pub root_permissions: BTreeMap<u64, PermissionSet>,
}

/// What a node is made of.
pub struct NodeSpec {
    /// The driver.
    pub driver: Arc<dyn BlockDriver>,
    /// Its children: role, name of the edge, node.
    pub edges: Vec<(ChildRole, String, Arc<Node>)>,
    /// Common options; `node_name` is made up when absent.
    pub options: NodeOptions,
}

impl NodeSpec {
    /// A node without children.
    pub fn new(driver: Arc<dyn BlockDriver>) -> Self {
        Self {
            driver,
            edges: Vec::new(),
            options: NodeOptions::default(),
        }
    }

    /// Adds a child.
    #[must_use]
    pub fn with_child(mut self, role: ChildRole, name: &str, node: &Arc<Node>) -> Self {
        self.edges.push((role, name.to_owned(), node.clone()));
        self
    }

    /// Names the node.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.options.node_name = Some(name.to_owned());
        self
    }
}

/// What a block job has with a node.
struct Claimed {
    job: String,
    /// A filter that goes away with the job.
    passing: bool,
}

/// A set of nodes that belong together, and the handles on them.
pub struct Graph {
    env: Arc<dyn Environment>,
    deferred: Arc<DeferredWork>,
    /// Reentrant, because dropping a handle inside a transaction detaches it.
    pub(crate) topology: ReentrantMutex<std::cell::RefCell<Topology>>,
    pub(crate) drains: Drains,
    /// One change of the graph at a time, over its awaits.
    changing: futures::lock::Mutex<()>,
    next_id: AtomicU64,
    gate: bool,
    claims: Mutex<HashMap<u64, Claimed>>,
    /// Nodes whose opening was given up.
    orphans: Mutex<Vec<Arc<Node>>>,
    on_new_node: Mutex<Option<NodeHook>>,
    secrets: Arc<Secrets>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.deferred.graph_is_gone();
    }
}

type NodeHook = Arc<dyn Fn(&Arc<Node>) + Send + Sync>;

impl Graph {
    /// An empty graph.
    pub fn new(env: Arc<dyn Environment>) -> Arc<Self> {
        Self::with_gate(env, true)
    }

    /// A graph whose nodes have no gate: requests are tracked, but nobody waits. Race tests have to corrupt images with
    /// it. Nothing but a test may call this.
    #[doc(hidden)]
    pub fn new_without_gate_for_tests(env: Arc<dyn Environment>) -> Arc<Self> {
        Self::with_gate(env, false)
    }

    fn with_gate(env: Arc<dyn Environment>, gate: bool) -> Arc<Self> {
        Arc::new(Self {
            deferred: DeferredWork::new(env.clone()),
            env,
            topology: ReentrantMutex::default(),
            drains: Drains::default(),
            changing: futures::lock::Mutex::new(()),
            next_id: AtomicU64::new(1),
            gate,
            claims: Mutex::default(),
            orphans: Mutex::default(),
            on_new_node: Mutex::default(),
            secrets: Arc::default(),
        })
    }

    /// Has `hook` called with every node that is added from now on, before anybody can send it a request: the place to give
    /// it an [observer](Node::observe).
    pub fn on_new_node(&self, hook: impl Fn(&Arc<Node>) + Send + Sync + 'static) {
        *self.on_new_node.lock() = Some(Arc::new(hook));
    }

    /// The environment.
    pub fn env(&self) -> &Arc<dyn Environment> {
        &self.env
    }

    /// The passwords and keys that the options of images in this graph may name.
    pub fn secrets(&self) -> &Arc<Secrets> {
        &self.secrets
    }

    pub(crate) fn deferred(&self) -> &Arc<DeferredWork> {
        &self.deferred
    }

    pub(crate) fn with_topology<T>(&self, f: impl FnOnce(&mut Topology) -> T) -> T {
        let lock = self.topology.lock();
        f(&mut lock.borrow_mut())
    }

    fn new_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::SeqCst)
    }

    /// Adds a node. It has no parents yet; its children get one more.
    ///
    /// # Errors
    /// The name is taken or not a name; the children's other parents don't share what the node needs.
    pub fn add_node(self: &Arc<Self>, spec: NodeSpec) -> Result<Arc<Node>> {
        let NodeSpec {
            driver,
            edges,
            options,
        } = spec;
        let id = self.new_id();
        let name = match &options.node_name {
            Some(name) => {
                check_name("node-name", name, 31)?;
                name.clone()
            }
            None => format!("#block{id:03}"),
        };
        if self.node(&name).is_some() {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("Duplicate nodes with node-name='{name}'"),
            ));
        }
        let edges = edges
            .into_iter()
            .map(|(role, name, node)| Edge {
                role,
                name,
                child: Child(node),
            })
            .collect();
        let edges = Arc::new(Edges::new(edges));
        let tracker = || {
            if self.gate {
                Tracker::new()
            } else {
                Tracker::new_without_gate_for_tests()
            }
        };
        let node = Arc::new(Node::new(
            id,
            name,
            driver,
            self.env.clone(),
            self.deferred.clone(),
            Edges::default(),
            (tracker(), tracker()),
            options,
        ));
        self.with_topology(|topology| topology.nodes.insert(id, node.clone()));
        let mut change = Change::default();
        change.edges.insert(id, edges);
        if let Err(error) = self.commit(change) {
            self.with_topology(|topology| topology.nodes.remove(&id));
            return Err(error);
        }
        node.refresh_limits();
        let hook = self.on_new_node.lock().clone();
        if let Some(hook) = hook {
            hook(&node);
        }
        Ok(node)
    }

    /// The node called `name`.
    pub fn node(&self, name: &str) -> Option<Arc<Node>> {
        self.with_topology(|topology| {
            topology
                .nodes
                .values()
                .find(|node| node.name() == name)
                .cloned()
        })
    }

    /// All nodes, oldest first.
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        self.with_topology(|topology| topology.nodes.values().cloned().collect())
    }

    /// The nodes that have `node` as a child.
    pub fn parents(&self, node: &Node) -> Vec<Arc<Node>> {
        self.with_topology(|topology| topology.parents(node.id()))
    }

    /// Keeps a node also when it has no parents, until [`Self::release`] is called for it.
    pub fn keep(&self, node: &Node) {
        node.kept.store(true, Ordering::SeqCst);
    }

    /// Makes a handle on `node`.
    ///
    /// # Errors
    /// A permission conflict with another parent, which the message names.
    pub fn attach(
        self: &Arc<Self>,
        node: &Arc<Node>,
        permissions: PermissionSet,
        name: &str,
    ) -> Result<BlockHandle> {
        let id = self.new_id();
        let root = Arc::new(RootState::new(
            id,
            name.to_owned(),
            node.clone(),
            PermissionSet::NONE,
        ));
        self.with_topology(|topology| topology.roots.insert(id, root.clone()));
        self.drains.refresh(self);
        let handle = BlockHandle::new(root, self);
        handle.set_permissions(permissions)?;
        Ok(handle)
    }

    pub(crate) fn detach(&self, root: &Arc<RootState>) {
        let removed = self
            .with_topology(|topology| topology.roots.remove(&root.id))
            .is_some();
        if removed {
            // Needing less never conflicts.
            let _ = self.commit(Change::default());
        }
    }

    pub(crate) fn set_root_permissions(
        &self,
        root: &Arc<RootState>,
        permissions: PermissionSet,
    ) -> Result<()> {
        let mut change = Change::default();
        change.root_permissions.insert(root.id, permissions);
        self.commit(change)
    }

    /// Computes permissions as they would be after `change`, asks the drivers, and makes it so. The nodes whose edges
    /// change are drained, or nobody knows them yet.
    pub(crate) fn commit(&self, change: Change) -> Result<()> {
        let lock = self.topology.lock();
        {
            let topology = lock.borrow();
            for (id, edges) in &change.edges {
                check_frozen(&topology, *id, edges)?;
            }
            let plan = permissions::plan(&topology, &change)?;
            permissions::apply(&topology, &plan)?;
            for (id, edges) in &change.edges {
                if let Some(node) = topology.nodes.get(id) {
                    node.set_edges(edges.clone());
                }
            }
            for (id, node) in &change.root_nodes {
                if let Some(root) = topology.roots.get(id) {
                    root.node.store(node.clone());
                }
            }
            // A flush through a node that came in between covers what was written below it before.
            let moved = change.root_nodes.values();
            let rewired = change
                .edges
                .iter()
                .filter(|(_, edges)| edges.iter().next().is_some())
                .filter_map(|(id, _)| topology.nodes.get(id));
            for node in rewired.chain(moved) {
                node.flush.written.fetch_add(1, Ordering::SeqCst);
            }
            for (id, set) in &change.root_permissions {
                if let Some(root) = topology.roots.get(id) {
                    root.set_permissions(*set);
                }
            }
            if !change.edges.is_empty() {
                // The nodes whose edges changed, and all above them.
                let mut concerned: HashSet<u64> = change.edges.keys().copied().collect();
                for id in plan.order.iter().rev() {
                    let Some(node) = topology.nodes.get(id) else {
                        continue;
                    };
                    let is_above = || {
                        let edges = node.edges();
                        edges
                            .iter()
                            .any(|edge| concerned.contains(&edge.child.node().id()))
                    };
                    if concerned.contains(id) || is_above() {
                        concerned.insert(*id);
                        node.refresh_debugged();
                        node.refresh_limits();
                    }
                }
            }
        }
        drop(lock);
        if !change.edges.is_empty() || !change.root_nodes.is_empty() {
            self.drains.refresh(self);
        }
        Ok(())
    }

    /// Stops all producers above `node` and waits until nothing of theirs is in flight; ends when the guard is dropped.
    ///
    /// Cancellation: dropping the future lets the producers go on.
    pub async fn drain(self: &Arc<Self>, node: &Arc<Node>) -> DrainGuard {
        self.drains.begin(self, Some(node.id()), None).await
    }

    /// Like [`Self::drain`], except that `handle` is not stopped: its owner does the last of its I/O inside the section
    /// (a mirror that copies what is left before it switches over). Two such sections over nodes that have ancestors
    /// in common would wait for each other: whoever opens them opens one at a time.
    pub async fn drain_except(
        self: &Arc<Self>,
        node: &Arc<Node>,
        handle: &BlockHandle,
    ) -> DrainGuard {
        let except = Some(handle.root().id);
        self.drains.begin(self, Some(node.id()), except).await
    }

    /// The same for the whole graph.
    pub async fn drain_all(self: &Arc<Self>) -> DrainGuard {
        self.drains.begin(self, None, None).await
    }

    /// Lets every parent and handle of `from` use `to` instead, except those that are `to` itself or below it. So a
    /// filter above `from` is put between `from` and its parents.
    ///
    /// Cancellation: nothing or all of it has happened.
    ///
    /// # Errors
    /// Frozen edges, permission conflicts, loops; with nothing changed.
    pub async fn replace_node(self: &Arc<Self>, from: &Arc<Node>, to: &Arc<Node>) -> Result<()> {
        self.replace_node_in(from, to, |_| true).await
    }

    /// [`Self::replace_node`] for those parents only whose node id `wanted` accepts; handles always change.
    pub async fn replace_node_in(
        self: &Arc<Self>,
        from: &Arc<Node>,
        to: &Arc<Node>,
        wanted: impl Fn(&Node) -> bool,
    ) -> Result<()> {
        let _changing = self.changing.lock().await;
        let _drained = self.drain(from).await;
        let _drained_too = self.drain(to).await;
        let change = self.with_topology(|topology| {
            let mut change = Change::default();
            let skip = below(to);
            for parent in topology.parents(from.id()) {
                if parent.id() == to.id() || skip.contains(&parent.id()) || !wanted(&parent) {
                    continue;
                }
                let edges = parent
                    .edges()
                    .iter()
                    .cloned()
                    .map(|mut edge| {
                        if edge.child.node().id() == from.id() {
                            edge.child = Child(to.clone());
                        }
                        edge
                    })
                    .collect();
                change
                    .edges
                    .insert(parent.id(), Arc::new(Edges::new(edges)));
            }
            for root in topology.roots_at(from.id()) {
                change.root_nodes.insert(root.id, to.clone());
            }
            change
        });
        self.commit(change)
            .map_err(|error| error.with_operation(Operation::Graph, 0, 0))
    }

    /// Puts `handle` onto another node.
    pub async fn move_handle(self: &Arc<Self>, handle: &BlockHandle, to: &Arc<Node>) -> Result<()> {
        let _changing = self.changing.lock().await;
        let from = handle.node();
        let _drained = self.drain(&from).await;
        let mut change = Change::default();
        change.root_nodes.insert(handle.root().id, to.clone());
        self.commit(change)
    }

    /// Puts the filter node `filter`, whose filtered child is `below`, between `below` and its parents.
    pub async fn insert_filter(self: &Arc<Self>, filter: &Arc<Node>) -> Result<()> {
        let below = filtered(filter)?;
        self.replace_node(&below, filter).await
    }

    /// Takes the filter node `filter` out: its parents use its filtered child again. The node stays, without
    /// parents, until it is released.
    pub async fn remove_filter(self: &Arc<Self>, filter: &Arc<Node>) -> Result<()> {
        let below = filtered(filter)?;
        self.replace_node(filter, &below).await
    }

    /// Changes (or removes) the edge `name` of `node`. The header isn't touched.
    pub async fn set_child(
        self: &Arc<Self>,
        node: &Arc<Node>,
        role: ChildRole,
        name: &str,
        child: Option<&Arc<Node>>,
    ) -> Result<()> {
        self.put_child(node, role, name, child, None).await
    }

    async fn put_child(
        self: &Arc<Self>,
        node: &Arc<Node>,
        role: ChildRole,
        name: &str,
        child: Option<&Arc<Node>>,
        frozen: Option<FreezeGuard>,
    ) -> Result<()> {
        let _changing = self.changing.lock().await;
        let _drained = self.drain(node).await;
        let mut list: Vec<Edge> = node.edges().iter().cloned().collect();
        match (list.iter().position(|edge| edge.name == name), child) {
            (Some(at), Some(child)) => {
                list[at] = Edge {
                    role,
                    name: name.to_owned(),
                    child: Child(child.clone()),
                };
            }
            (Some(at), None) => {
                list.remove(at);
            }
            (None, Some(child)) => {
                list.push(Edge {
                    role,
                    name: name.to_owned(),
                    child: Child(child.clone()),
                });
            }
            (None, None) => return Ok(()),
        }
        let mut change = Change::default();
        change.edges.insert(node.id(), Arc::new(Edges::new(list)));
        // From here on nobody else gets a turn until it is done.
        drop(frozen);
        self.commit(change)
            .map_err(|error| error.with_operation(Operation::Graph, 0, 0))
    }

    /// Changes (or removes) the backing child of `node`. The header isn't touched.
    pub async fn set_backing(
        self: &Arc<Self>,
        node: &Arc<Node>,
        backing: Option<&Arc<Node>>,
    ) -> Result<()> {
        self.set_child(node, ChildRole::Backing, "backing", backing)
            .await
    }

    /// The same for an edge that `frozen` has kept from changing so far: nobody can change it in between.
    pub async fn set_frozen_backing(
        self: &Arc<Self>,
        node: &Arc<Node>,
        backing: Option<&Arc<Node>>,
        frozen: Option<FreezeGuard>,
    ) -> Result<()> {
        self.put_child(node, ChildRole::Backing, "backing", backing, frozen)
            .await
    }

    /// Changes the backing file's name in the header of `node`, under a serialising request over the whole node.
    pub async fn change_backing_file(
        self: &Arc<Self>,
        node: &Arc<Node>,
        file: Option<&str>,
        format: Option<&str>,
    ) -> Result<()> {
        handle::change_backing(node, None, file, format).await
    }

    /// Forbids changes of the chain edges from `top` down to `base` (or to the end), until the guard is dropped. `holder`
    /// is the block job that is named to those who want to change one.
    ///
    /// # Errors
    /// EBUSY when one of them leads to a filter that a block job takes out at its end ([`Self::claim_filter_for_job`]): that
    /// job could not end any more.
    pub fn freeze_chain(
        self: &Arc<Self>,
        top: &Arc<Node>,
        base: Option<&Arc<Node>>,
        holder: &str,
    ) -> Result<FreezeGuard> {
        // Edges change under the topology's lock: what is frozen is the chain as it is at one moment.
        let keys = self.with_topology(|topology| -> Result<_> {
            let mut keys = Vec::new();
            let mut at = top.clone();
            while base.is_none_or(|base| base.id() != at.id()) {
                let edges = at.edges();
                let edge = edges
                    .iter()
                    .find(|edge| matches!(edge.role, ChildRole::Filtered | ChildRole::Backing));
                let Some(edge) = edge else { break };
                self.refuse_passing(&at, edge)?;
                keys.push((at.id(), edge.name.clone()));
                at = edge.child.node().clone();
            }
            for key in &keys {
                topology
                    .frozen
                    .entry(key.clone())
                    .or_default()
                    .push(holder.to_owned());
            }
            Ok(keys)
        })?;
        Ok(FreezeGuard {
            graph: self.clone(),
            keys,
            holder: holder.to_owned(),
        })
    }

    /// Refuses an edge to a filter that goes away with its job.
    fn refuse_passing(&self, parent: &Node, edge: &Edge) -> Result<()> {
        let child = edge.child.node();
        match self.claims.lock().get(&child.id()) {
            Some(claimed) if claimed.passing => Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "Cannot freeze '{}' link from '{}' to '{}': node is in use by block job: {}",
                    edge.name,
                    parent.name(),
                    child.name(),
                    claimed.job
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Marks `node` as in use by a block job; a second job on it is refused with a message as qemu's.
    ///
    /// # Errors
    /// EBUSY when another job has it.
    pub fn claim_for_job(self: &Arc<Self>, node: &Arc<Node>, job: &str) -> Result<JobClaim> {
        self.claim(node, job, false)
    }

    /// The same for a filter that the job takes out of the graph at its end. Nobody can freeze a link to it meanwhile; a job
    /// that claims it before it puts it in will be able to take it out.
    ///
    /// # Errors
    /// EBUSY when another job has it.
    pub fn claim_filter_for_job(
        self: &Arc<Self>,
        filter: &Arc<Node>,
        job: &str,
    ) -> Result<JobClaim> {
        self.claim(filter, job, true)
    }

    fn claim(self: &Arc<Self>, node: &Arc<Node>, job: &str, passing: bool) -> Result<JobClaim> {
        let mut claims = self.claims.lock();
        if let Some(other) = claims.get(&node.id()) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "Node '{}' is busy: block device is in use by block job: {}",
                    node.name(),
                    other.job
                ),
            ));
        }
        let job = job.to_owned();
        claims.insert(node.id(), Claimed { job, passing });
        Ok(JobClaim {
            graph: self.clone(),
            node: node.id(),
        })
    }

    /// Gives up a node: when nobody else has it, it is drained, closed and removed, and so are its children that
    /// nobody else has.
    ///
    /// # Errors
    /// The first error of a flush or of a driver's `close`. The nodes are gone all the same.
    pub async fn release(self: &Arc<Self>, node: &Arc<Node>) -> Result<()> {
        node.kept.store(false, Ordering::SeqCst);
        self.collect_orphans().await;
        self.collect(node).await
    }

    /// [`Self::release`] for somebody who never kept the node: one that a program keeps ([`Self::keep`]) stays.
    ///
    /// # Errors
    /// As with [`Self::release`].
    pub async fn collect(self: &Arc<Self>, node: &Arc<Node>) -> Result<()> {
        let mut result = Ok(());
        let mut todo = vec![node.clone()];
        while let Some(node) = todo.pop() {
            let closed = self.collect_one(&node, &mut todo).await;
            result = result.and(closed);
        }
        result
    }

    /// Closes `node` if nobody has it, and adds its children to those that may be nobody's now.
    async fn collect_one(
        self: &Arc<Self>,
        node: &Arc<Node>,
        todo: &mut Vec<Arc<Node>>,
    ) -> Result<()> {
        let in_use = self.with_topology(|topology| {
            !topology.nodes.contains_key(&node.id())
                || node.kept.load(Ordering::SeqCst)
                || !topology.parents(node.id()).is_empty()
                || !topology.roots_at(node.id()).is_empty()
                || node.closing.swap(true, Ordering::SeqCst)
        });
        if in_use {
            return Ok(());
        }
        // What the node's own close still wants to do to its children is admitted by nobody's handle.
        let drained = self.drain(node).await;
        // Who dropped the last handle may not have flushed. Where nothing was written, or nothing since, no driver is asked.
        let flushed = if node.flush.changed.load(Ordering::SeqCst) {
            path::flush(node, None).await
        } else {
            Ok(())
        };
        let driver = node.driver().clone();
        let closed = path::exclusive(node, None, move |request| driver.close(request))
            .await
            .map_err(|error| {
                error
                    .with_operation(Operation::Close, 0, 0)
                    .with_node(node.name())
            });
        todo.extend(
            node.edges()
                .iter()
                .rev()
                .map(|edge| edge.child.node().clone()),
        );
        let mut change = Change::default();
        change.edges.insert(node.id(), Arc::new(Edges::default()));
        let detached = self.commit(change);
        self.with_topology(|topology| topology.nodes.remove(&node.id()));
        drop(drained);
        flushed.and(closed).and(detached)
    }

    /// Leaves a node, which somebody opened and then gave up, to the next who opens or closes anything.
    pub(crate) fn orphan(&self, node: Arc<Node>) {
        self.orphans.lock().push(node);
    }

    /// Closes what was orphaned.
    pub(crate) async fn collect_orphans(self: &Arc<Self>) {
        let orphans = std::mem::take(&mut *self.orphans.lock());
        for node in orphans {
            // Whoever opened it is gone, and so is the one who would want to know.
            let _ = self.collect(&node).await;
        }
    }

    /// Closes every node that nobody holds a handle on, parents first.
    pub async fn close_all(self: &Arc<Self>) -> Result<()> {
        self.collect_orphans().await;
        let mut result = Ok(());
        for node in self.nodes().into_iter().rev() {
            let closed = self.release(&node).await;
            result = result.and(closed);
        }
        result
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.nodes()).finish()
    }
}

fn check_frozen(topology: &Topology, id: u64, new: &Edges) -> Result<()> {
    let Some(parent) = topology.nodes.get(&id) else {
        return Ok(());
    };
    for edge in parent.edges().iter() {
        let key = (id, edge.name.clone());
        let Some(holder) = topology.frozen.get(&key).and_then(|all| all.first()) else {
            continue;
        };
        let same = new
            .named(&edge.name)
            .is_some_and(|other| other.child.node().id() == edge.child.node().id());
        if !same {
            return Err(Error::new(
                ErrorKind::NotPermitted,
                format!(
                    "Cannot change frozen '{}' link from '{}' to '{}': in use by block job: {holder}",
                    edge.name,
                    parent.name(),
                    edge.child.node().name()
                ),
            ));
        }
    }
    Ok(())
}

fn filtered(filter: &Arc<Node>) -> Result<Arc<Node>> {
    filter
        .edges()
        .child(ChildRole::Filtered)
        .map(|child| child.node().clone())
        .ok_or_else(|| Error::invalid("not a filter").with_node(filter.name()))
}

/// All nodes below `node`, without it.
fn below(node: &Arc<Node>) -> Vec<u64> {
    let mut found = Vec::new();
    let mut todo = vec![node.clone()];
    while let Some(at) = todo.pop() {
        for edge in at.edges().iter() {
            let child = edge.child.node();
            if !found.contains(&child.id()) {
                found.push(child.id());
                todo.push(child.clone());
            }
        }
    }
    found
}

/// Keeps edges of a chain from changing; dropping it lets them go.
#[derive(Debug)]
pub struct FreezeGuard {
    graph: Arc<Graph>,
    keys: Vec<(u64, String)>,
    holder: String,
}

impl Drop for FreezeGuard {
    fn drop(&mut self) {
        self.graph.with_topology(|topology| {
            for key in &self.keys {
                if let Some(holders) = topology.frozen.get_mut(key) {
                    if let Some(at) = holders.iter().position(|holder| *holder == self.holder) {
                        holders.swap_remove(at);
                    }
                    if holders.is_empty() {
                        topology.frozen.remove(key);
                    }
                }
            }
        });
    }
}

/// Keeps other jobs off a node; dropping it lets them.
#[derive(Debug)]
pub struct JobClaim {
    graph: Arc<Graph>,
    node: u64,
}

impl Drop for JobClaim {
    fn drop(&mut self) {
        self.graph.claims.lock().remove(&self.node);
    }
}
