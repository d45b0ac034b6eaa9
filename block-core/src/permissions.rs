//! Who may do what to a node: computes for the whole graph what every parent uses and shares, and finds conflicts
//! (digest of block semantics, section 3). Checks at graph changes only; requests check their handle.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, atomic::Ordering},
};

use crate::{
    error::{Error, ErrorKind, Result},
    flags::{PermissionSet, Permissions},
    graph::{Change, Topology},
    node::{Edges, Node},
};

/// What every node's parents together use and share after the change.
pub(crate) type Plan = BTreeMap<u64, PermissionSet>;

fn edges_after(node: &Node, change: &Change) -> Arc<Edges> {
    change
        .edges
        .get(&node.id())
        .cloned()
        .unwrap_or_else(|| node.edges())
}

/// All nodes, every one after all of its children.
pub(crate) fn bottom_up(topology: &Topology) -> Vec<u64> {
    let mut order = top_down(topology, &Change::default()).unwrap_or_default();
    order.reverse();
    order
}

/// All nodes, every one after all of its parents.
fn top_down(topology: &Topology, change: &Change) -> Result<Vec<u64>> {
    let mut waiting: HashMap<u64, usize> = topology.nodes.keys().map(|id| (*id, 0)).collect();
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
    let mut depths: HashMap<u64, usize> = HashMap::new();
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
    let mut wanted: HashMap<u64, Vec<(String, PermissionSet)>> = HashMap::new();
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
        let who = if root.name.is_empty() {
            format!(
                "an unnamed block device (uses node '{}' as 'root' child)",
                node.name()
            )
        } else {
            format!(
                "block device '{}' (uses node '{}' as 'root' child)",
                root.name,
                node.name()
            )
        };
        refuse_closing(&node)?;
        wanted.entry(node.id()).or_default().push((who, set));
    }
    let mut plan = Plan::new();
    let order = top_down(topology, change)?;
    check_depth(topology, change, &order)?;
    for id in order {
        let Some(node) = topology.nodes.get(&id) else {
            continue;
        };
        let parents = wanted.remove(&id).unwrap_or_default();
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
        for edge in edges_after(node, change).iter() {
            let child = edge.child.node();
            if !node.closing.load(Ordering::SeqCst) {
                refuse_closing(child)?;
            }
            let mut set = node.driver().child_permissions(edge.role, total);
            if node.option(|options| options.force_share) {
                set.shared = Permissions::all();
                set.used &= Permissions::CONSISTENT_READ;
            }
            let who = format!(
                "node '{}' (uses node '{}' as '{}' child)",
                node.name(),
                child.name(),
                edge.name
            );
            wanted.entry(child.id()).or_default().push((who, set));
        }
        plan.insert(id, total);
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

fn check_conflicts(node: &Node, parents: &[(String, PermissionSet)]) -> Result<()> {
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
    let changed = plan.iter().filter_map(|(id, set)| {
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
