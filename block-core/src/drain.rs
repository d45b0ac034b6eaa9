//! Drained sections: producers are stopped at their handles, what they began is waited for, and the graph may change.
//!
//! A drained section stops nobody inside: sub-requests of what was already admitted go on. Sections nest and overlap;
//! a handle is let go when the last one that covers it has ended. A change of the graph inside a section can bring
//! further handles above the drained node: they are stopped as well.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
};

use parking_lot::Mutex;

use crate::{graph::Graph, handle::RootState, mutant};

#[derive(Default)]
pub(crate) struct Drains {
    sections: Mutex<Vec<Section>>,
    next: AtomicU64,
}

struct Section {
    id: u64,
    /// The node, or everything.
    node: Option<u64>,
    /// The handle that goes on: of whoever does the rest of its I/O inside the section.
    except: Option<u64>,
    roots: Vec<Arc<RootState>>,
}

/// A drained section. Dropping it ends the section.
#[must_use = "the section ends when the guard is dropped"]
pub struct DrainGuard {
    graph: Arc<Graph>,
    id: u64,
}

impl std::fmt::Debug for DrainGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DrainGuard {}", self.id)
    }
}

impl Drains {
    /// Opens a section over `node`, or over the whole graph, and waits until it is quiet.
    pub(crate) async fn begin(
        &self,
        graph: &Arc<Graph>,
        node: Option<u64>,
        except: Option<u64>,
    ) -> DrainGuard {
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        self.sections.lock().push(Section {
            id,
            node,
            except,
            roots: Vec::new(),
        });
        // From here on dropping the future ends the section.
        let guard = DrainGuard {
            graph: graph.clone(),
            id,
        };
        self.refresh(graph);
        let watch = graph.deferred().watch();
        futures::future::poll_fn(|cx| {
            let roots = self.roots(id);
            for root in &roots {
                root.wake_when_idle(cx.waker());
            }
            // Also what was dropped by handles that are gone, and what no handle counted.
            let quiet = watch.help(cx) || mutant::is_active("drain-ignores-dropped-requests");
            if quiet && roots.iter().all(|root| root.is_idle()) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        guard
    }

    fn roots(&self, id: u64) -> Vec<Arc<RootState>> {
        self.sections
            .lock()
            .iter()
            .find(|section| section.id == id)
            .map(|section| section.roots.clone())
            .unwrap_or_default()
    }

    /// Stops the handles that have come above a drained node since.
    pub(crate) fn refresh(&self, graph: &Graph) {
        let mut sections = self.sections.lock();
        for section in sections.iter_mut() {
            let wanted: Vec<Arc<RootState>> = graph.with_topology(|topology| match section.node {
                None => topology.roots.values().cloned().collect(),
                Some(node) => {
                    let ancestors = topology.ancestors(node);
                    topology
                        .roots
                        .values()
                        .filter(|root| ancestors.contains(&root.node.load().id()))
                        .cloned()
                        .collect()
                }
            });
            for root in wanted {
                if section.except == Some(root.id) {
                    continue;
                }
                if !section.roots.iter().any(|old| Arc::ptr_eq(old, &root)) {
                    root.quiesce();
                    section.roots.push(root);
                }
            }
        }
    }
}

impl Drop for DrainGuard {
    fn drop(&mut self) {
        let roots = {
            let mut sections = self.graph.drains.sections.lock();
            match sections.iter().position(|section| section.id == self.id) {
                Some(at) => sections.swap_remove(at).roots,
                None => Vec::new(),
            }
        };
        for root in roots {
            if mutant::is_active("drain-end-resumes-nested") {
                root.resume();
            }
            root.resume();
        }
    }
}
