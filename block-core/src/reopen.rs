//! Reopening: options of an open image are changed, drained, all or nothing. What a node keeps itself (`discard`,
//! `detect-zeroes`) is changed here; everything else is the driver's business. It never changes an edge.

use std::sync::Arc;

use crate::{
    driver::{ChildRole, Reopen},
    error::Result,
    graph::{Change, Graph},
    node::Node,
    options::{DetectZeroes, DiscardMode, Options},
    path,
};

/// The options that the core keeps, as they are going to be.
struct Own {
    discard: DiscardMode,
    detect_zeroes: DetectZeroes,
}

impl Own {
    /// Takes the core's options out of `changes`. `None` when there are none.
    fn take(node: &Node, changes: &mut Reopen) -> Result<Option<Self>> {
        let mut own = node.option(|options| Self {
            discard: options.discard,
            detect_zeroes: options.detect_zeroes,
        });
        let mut given = Options(std::mem::take(&mut changes.options));
        let discard = given.take("discard");
        let detect = given.take("detect-zeroes");
        changes.options = given.0;
        if discard.is_none() && detect.is_none() {
            return Ok(None);
        }
        if let Some(value) = discard {
            own.discard = DiscardMode::parse(value)?;
        }
        if let Some(value) = detect {
            own.detect_zeroes = DetectZeroes::parse(value)?;
        }
        own.detect_zeroes.check_with(own.discard)?;
        Ok(Some(own))
    }
}

impl Graph {
    /// Changes options of an open image, drained: first its storage (when it becomes writable), then the image, or the
    /// other way round (when it becomes read-only). A failed flush is forgotten, of the storage as well.
    ///
    /// # Errors
    /// Options that nobody knows or that can't be changed, with everything as it was.
    pub async fn reopen(self: &Arc<Self>, node: &Arc<Node>, changes: Reopen) -> Result<()> {
        let _drained = self.drain(node).await;
        let mut changes = changes;
        let own = Own::take(node, &mut changes)?;
        let result = self.reopen_drained(node, &changes, own.is_some()).await;
        match (&result, changes.read_only) {
            (Ok(()), _) => {
                if let Some(own) = own {
                    node.with_options(|options| {
                        options.discard = own.discard;
                        options.detect_zeroes = own.detect_zeroes;
                    });
                }
            }
            (Err(_), Some(read_only)) => {
                // All or nothing: what was switched is switched back, as far as it goes.
                let back = Reopen {
                    read_only: Some(!read_only),
                    ..Reopen::default()
                };
                if node.driver().is_read_only() == read_only
                    && let Err(error) = self.reopen_drained(node, &back, false).await
                {
                    tracing::warn!(node = node.name(), %error, "a reopen that failed can't be undone");
                }
            }
            (Err(_), None) => {}
        }
        result
    }

    /// `own`: options of the core are changed; the driver isn't asked if there is nothing else.
    async fn reopen_drained(
        self: &Arc<Self>,
        node: &Arc<Node>,
        changes: &Reopen,
        own: bool,
    ) -> Result<()> {
        let storage: Vec<Arc<Node>> = node
            .edges()
            .iter()
            .filter(|edge| !matches!(edge.role, ChildRole::Backing | ChildRole::Target))
            .map(|edge| edge.child.node().clone())
            .collect();
        let only_mode = Reopen {
            read_only: changes.read_only,
            ..Reopen::default()
        };
        if changes.read_only != Some(true) {
            for child in &storage {
                // Storage that keeps its mode has something to begin anew only where a flush has failed.
                if changes.read_only.is_some() || has_failed(child) {
                    Box::pin(self.reopen(child, only_mode.clone())).await?;
                }
            }
        }
        let nothing_else = own
            && changes.read_only.is_none()
            && changes.options.is_empty()
            && node.flush.failed.lock().is_none();
        if !nothing_else {
            let (driver, changes) = (node.driver().clone(), changes.clone());
            path::exclusive(node, None, move |request| driver.reopen(request, changes)).await?;
        }
        *node.flush.failed.lock() = None;
        if let Some(read_only) = changes.read_only {
            node.with_options(|options| options.read_only = read_only);
        }
        node.refresh_limits();
        self.commit(Change::default())?;
        if changes.read_only == Some(true) {
            for child in &storage {
                Box::pin(self.reopen(child, only_mode.clone())).await?;
            }
        }
        Ok(())
    }
}

/// Whether a flush of the node, or of the storage below it, has failed.
fn has_failed(node: &Node) -> bool {
    node.flush.failed.lock().is_some()
        || node.edges().iter().any(|edge| {
            !matches!(edge.role, ChildRole::Backing | ChildRole::Target)
                && has_failed(edge.child.node())
        })
}
