//! Who may do what to a node: computes for the whole graph what every parent uses and shares, and finds conflicts
//! (digest of block semantics, section 3). Checks at graph changes only; requests check their handle.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, atomic::Ordering},
};

use crate::{
    error::{Error, ErrorKind, Result},
    flags::{PermissionSet, Permissions},
    graph::{Change, Topology},
    node::{Edges, Node},
};

/// What every node's parents together use and share after the change.
pub(crate) struct Plan {
    sets: BTreeMap<u64, PermissionSet>,
    /// All nodes, every one after all of its parents.
    pub order: Vec<u64>,
}

/// Something by the id of a node. Every change of a graph looks at all of its nodes: in a chain of a thousand images, the time
/// that opening it takes is spent here.
type ById<T> = HashMap<u64, T, BuildHasherDefault<IdHasher>>;

/// Ids are counted up, so that they spread by themselves.
#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        // The table takes its tags from the top bits.
        self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u64(&mut self, id: u64) {
        self.0 = id;
    }
}

/// Who uses a node: for messages.
enum User<'a> {
    Handle {
        name: &'a str,
        node: Arc<Node>,
    },
    Parent {
        node: &'a Node,
        edges: Arc<Edges>,
        edge: usize,
    },
}

impl fmt::Display for User<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Handle { name, node } => {
                match *name {
                    "" => f.write_str("an unnamed block device")?,
                    name => write!(f, "block device '{name}'")?,
                }
                write!(f, " (uses node '{}' as 'root' child)", node.name())
            }
            Self::Parent { node, edges, edge } => {
                write!(f, "node '{}'", node.name())?;
                match edges.get(*edge) {
                    Some(edge) => write!(
                        f,
                        " (uses node '{}' as '{}' child)",
                        edge.child.node().name(),
                        edge.name
                    ),
                    None => Ok(()),
                }
            }
        }
    }
}

fn edges_after(node: &Node, change: &Change) -> Arc<Edges> {
    change
        .edges
        .get(&node.id())
        .cloned()
        .unwrap_or_else(|| node.edges())
}

/// All nodes, every one after all of its parents.
fn top_down(topology: &Topology, change: &Change) -> Result<Vec<u64>> {
    let mut waiting: ById<usize> = topology.nodes.keys().map(|id| (*id, 0)).collect();
    for node in topology.nodes.values() {
        for edge in edges_after(node, change).iter() {
            *waiting.entry(edge.child.node().id()).or_default() += 1;
        }
    }
    let mut order: Vec<u64> = topology
        .nodes
        .keys()
        .copied()
        .filter(|id| waiting.get(id) == Some(&0))
        .collect();
    let mut at = 0;
    while at < order.len() {
        if let Some(node) = topology.nodes.get(&order[at]) {
            for edge in edges_after(node, change).iter() {
                let child = edge.child.node().id();
                if let Some(count) = waiting.get_mut(&child) {
                    *count -= 1;
                    if *count == 0 && topology.nodes.contains_key(&child) {
                        order.push(child);
                    }
                }
            }
        }
        at += 1;
    }
    if order.len() < topology.nodes.len() {
        return Err(Error::invalid(
            "Making this change would create a cycle in the graph",
        ));
    }
    Ok(order)
}

/// The longest chain of backing files and filters that a graph may have.
const MAX_CHAIN: usize = crate::registry::Registry::MAX_DEPTH + 9;

/// Refuses chains that are too deep to be read. `order` has every node after all of its parents.
fn check_depth(topology: &Topology, change: &Change, order: &[u64]) -> Result<()> {
    let mut depths: ById<usize> = ById::default();
    for id in order.iter().rev() {
        let Some(node) = topology.nodes.get(id) else {
            continue;
        };
        let below = edges_after(node, change)
            .chain_child()
            .and_then(|child| depths.get(&child.node().id()).copied())
            .unwrap_or(0);
        if below >= MAX_CHAIN {
            return Err(Error::invalid(format!(
                "the chain below node '{}' would be deeper than {MAX_CHAIN} nodes",
                node.name()
            )));
        }
        depths.insert(*id, below + 1);
    }
    Ok(())
}

/// Works the permissions out, or says who is in whose way.
pub(crate) fn plan(topology: &Topology, change: &Change) -> Result<Plan> {
    // For each node: who its parents are (for messages), and what they use and share.
    let mut wanted: ById<Vec<(User, PermissionSet)>> = ById::default();
    for root in topology.roots.values() {
        let node = change
            .root_nodes
            .get(&root.id)
            .cloned()
            .unwrap_or_else(|| root.node.load_full());
        let set = change
            .root_permissions
            .get(&root.id)
            .copied()
            .unwrap_or_else(|| root.permissions());
        refuse_closing(&node)?;
        let id = node.id();
        let user = User::Handle {
            name: &root.name,
            node,
        };
        wanted.entry(id).or_default().push((user, set));
    }
    let mut plan = Plan {
        sets: BTreeMap::new(),
        order: top_down(topology, change)?,
    };
    check_depth(topology, change, &plan.order)?;
    for id in &plan.order {
        let Some(node) = topology.nodes.get(id) else {
            continue;
        };
        let parents = wanted.remove(id).unwrap_or_default();
        check_conflicts(node, &parents)?;
        let mut total = parents
            .iter()
            .fold(PermissionSet::NONE, |all, (_, set)| PermissionSet {
                used: all.used | set.used,
                shared: all.shared & set.shared,
            });
        if node.option(|options| options.force_share) {
            total.shared = Permissions::all();
            total.used &= Permissions::CONSISTENT_READ;
        }
        let edges = edges_after(node, change);
        for (at, edge) in edges.iter().enumerate() {
            let child = edge.child.node();
            if !node.closing.load(Ordering::SeqCst) {
                refuse_closing(child)?;
            }
            let mut set = node.driver().child_permissions(edge.role, total);
            if node.option(|options| options.force_share) {
                set.shared = Permissions::all();
                set.used &= Permissions::CONSISTENT_READ;
            }
            let user = User::Parent {
                node,
                edges: edges.clone(),
                edge: at,
            };
            wanted.entry(child.id()).or_default().push((user, set));
        }
        plan.sets.insert(*id, total);
    }
    Ok(plan)
}

/// Nobody comes to a node that is being closed.
fn refuse_closing(node: &Node) -> Result<()> {
    if node.closing.load(Ordering::SeqCst) {
        return Err(Error::new(
            ErrorKind::NoMedium,
            format!("Node '{}' is being closed", node.name()),
        ));
    }
    Ok(())
}

fn check_conflicts(node: &Node, parents: &[(User, PermissionSet)]) -> Result<()> {
    for (at, (user, uses)) in parents.iter().enumerate() {
        for (other_at, (other, shares)) in parents.iter().enumerate() {
            let conflict = uses.used - shares.shared;
            if at == other_at || conflict.is_empty() {
                continue;
            }
            let names: Vec<&str> = conflict.iter().map(Permissions::name).collect();
            return Err(Error::new(
                ErrorKind::NotPermitted,
                format!(
                    "Permission conflict on node '{}': permissions '{}' are both required by {user} and unshared by {other}.",
                    node.name(),
                    names.join(", ")
                ),
            ));
        }
    }
    Ok(())
}

/// Tells every driver whose permissions change; when one refuses, those that agreed are told to forget it.
pub(crate) fn apply(topology: &Topology, plan: &Plan) -> Result<()> {
    let mut prepared: Vec<&Arc<Node>> = Vec::new();
    let changed = plan.sets.iter().filter_map(|(id, set)| {
        let node = topology.nodes.get(id)?;
        (node.permissions() != *set).then_some((node, *set))
    });
    for (node, set) in changed.clone() {
        if let Err(error) = node.driver().prepare_permissions(set) {
            for node in prepared {
                node.driver().abort_permissions();
            }
            let file = node.filename();
            let error = error.with_node(node.name());
            return Err(match file {
                Some(file) => error.with_file(file),
                None => error,
            });
        }
        prepared.push(node);
    }
    for (node, set) in changed {
        node.driver().commit_permissions();
        node.set_permissions(set);
    }
    Ok(())
}
