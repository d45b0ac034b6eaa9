//! Signals: the first SIGINT, SIGTERM or SIGHUP asks the command to end and close its images, a second one of those
//! ends the process at once; SIGUSR1 prints a line of progress.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use futures::{
    FutureExt,
    channel::oneshot,
    future::{BoxFuture, Shared},
};
use parking_lot::Mutex;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1},
    iterator::Signals as Iterator,
};

use super::progress::Meter;

/// What signals have said. Clones are the same one.
#[derive(Clone)]
pub struct Signals {
    state: Arc<State>,
    ended: Shared<BoxFuture<'static, ()>>,
}

#[derive(Default)]
struct State {
    interrupted: AtomicBool,
    meter: Mutex<Option<Meter>>,
}

impl Signals {
    /// Starts to listen. Where the system refuses that, signals keep their default effects.
    pub fn listen() -> Self {
        let state = Arc::new(State::default());
        let (tx, rx) = oneshot::channel::<()>();
        match Iterator::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1]) {
            Ok(signals) => {
                let state = state.clone();
                let _ = thread::Builder::new()
                    .name("blk-signals".into())
                    .spawn(move || Self::serve(signals, &state, tx));
            }
            Err(error) => tracing::warn!(%error, "signals keep their default effects"),
        }
        // A listener that is gone must not look like a signal.
        let ended = async move {
            if rx.await.is_err() {
                futures::future::pending::<()>().await;
            }
        };
        Self {
            state,
            ended: ended.boxed().shared(),
        }
    }

    fn serve(mut signals: Iterator, state: &State, tx: oneshot::Sender<()>) {
        let mut tx = Some(tx);
        for signal in signals.forever() {
            if signal == SIGUSR1 {
                if let Some(meter) = &*state.meter.lock() {
                    meter.tell();
                }
                continue;
            }
            if state.interrupted.swap(true, Ordering::SeqCst) {
                std::process::exit(128 + signal);
            }
            if let Some(tx) = tx.take() {
                let _ = tx.send(());
            }
        }
    }

    /// Completes when the command is asked to end.
    pub fn interrupted(&self) -> impl Future<Output = ()> + Send + 'static {
        self.ended.clone()
    }

    /// SIGUSR1 shows this one from here on.
    pub fn show(&self, meter: &Meter) {
        *self.state.meter.lock() = Some(meter.clone());
    }
}
