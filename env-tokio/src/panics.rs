//! What becomes of panics in tasks and offloaded work: they are logged, counted, and made known to `block_on`.

use std::any::Any;

use tokio::sync::watch;

/// The panics of one environment.
pub(crate) struct Panics {
    state: watch::Sender<State>,
}

#[derive(Default)]
struct State {
    count: u64,
    first: Option<String>,
}

impl Panics {
    pub(crate) fn new() -> Self {
        Self {
            state: watch::Sender::new(State::default()),
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.state.borrow().count
    }

    /// Records the panic of `what`.
    pub(crate) fn report(&self, what: &str, payload: &(dyn Any + Send)) {
        let message = payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "(no message)".to_owned());
        tracing::error!(%message, "{what} panicked");
        self.state.send_modify(|state| {
            state.count += 1;
            state.first.get_or_insert(message);
        });
    }

    /// Waits for the first panic, and tells its message.
    pub(crate) async fn first(&self) -> String {
        let mut changes = self.state.subscribe();
        match changes.wait_for(|state| state.count > 0).await {
            Ok(state) => state.first.clone().unwrap_or_default(),
            // The sender lives in `self`.
            Err(_) => std::future::pending().await,
        }
    }
}
