//! One run of a command: the graph, the drivers, the environment, signals, and the orderly end of them all.

use std::{sync::Arc, thread};

use block_core::{Graph, Registry};
use env_tokio::EnvTokio;
use futures::{
    channel::oneshot,
    future::{self, Either},
};
use jobs::JobManager;
use parking_lot::Mutex;

use super::output::say;
use super::{
    failure::{Failure, Outcome},
    program::Program,
    signals::Signals,
    trace::{self, Tracing},
};

/// What a command works with.
pub struct Session {
    /// Who we are, for messages.
    pub program: Program,
    /// The nodes.
    pub graph: Arc<Graph>,
    /// The block jobs. Those that still run when the command ends are cancelled.
    pub jobs: Arc<JobManager>,
    /// The drivers.
    pub registry: Arc<Registry>,
    /// Clock, tasks, CPU workers.
    pub env: Arc<EnvTokio>,
    /// Signals.
    pub signals: Signals,
    tracing: Mutex<Option<Tracing>>,
    tasks: Mutex<Vec<oneshot::Receiver<()>>>,
}

impl Session {
    /// A session with all drivers.
    ///
    /// # Errors
    /// When the system gives no threads.
    pub fn new(program: Program) -> Result<Self, Failure> {
        let env = EnvTokio::new(0)
            .map_err(|error| Failure::new(format!("Could not start threads: {error}")))?;
        let env = Arc::new(env);
        let graph = Graph::new(env.clone());
        let tracing = trace::wanted()
            .map(|options| Tracing::start(&graph, options))
            .transpose()?;
        Ok(Self {
            program,
            jobs: JobManager::new(&graph),
            graph,
            registry: Arc::new(drivers()),
            env,
            signals: Signals::listen(),
            tracing: Mutex::new(tracing),
            tasks: Mutex::default(),
        })
    }

    /// Runs `task` beside the command, on a thread of its own: storage that has the data at once completes requests on
    /// the thread that asks, so that tasks which share threads would wait for each other. The session isn't over
    /// before it has ended.
    ///
    /// Cancellation: dropping the answer doesn't stop the task.
    pub fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (tx, rx) = oneshot::channel();
        let (ended, watch) = oneshot::channel::<()>();
        self.tasks.lock().push(watch);
        // Without a thread the answer is dropped, which says that it won't come.
        let started = thread::Builder::new()
            .name("blk-copy".into())
            .spawn(move || {
                let _ = tx.send(futures::executor::block_on(task));
                drop(ended);
            });
        if let Err(error) = started {
            tracing::error!(%error, "no thread for a part of the work");
        }
        rx
    }

    /// Runs a command to its end, or until a signal asks it to stop, then closes all images. Gives the exit status;
    /// failures have been printed.
    pub fn run(&self, command: impl Future<Output = Outcome>) -> u8 {
        let outcome = self.env.block_on(async {
            let command = Box::pin(command);
            let mut outcome = match future::select(command, self.signals.interrupted()).await {
                Either::Left((outcome, _)) => outcome,
                Either::Right(((), command)) => {
                    drop(command);
                    Err(Failure::new("Interrupted").with_code(130))
                }
            };
            let tasks = std::mem::take(&mut *self.tasks.lock());
            future::join_all(tasks).await;
            // Requests that stand at a breakpoint would be waited for in vain.
            iotests::faults::resume_all(&self.graph);
            self.jobs.cancel_all().await;
            if let Err(error) = self.graph.close_all().await
                && outcome.is_ok()
            {
                outcome = Err(Failure::context("Could not close the image", &error));
            }
            outcome
        });
        let status = match outcome {
            Ok(code) => code,
            Err(failure) => {
                failure.report(self.program);
                failure.code
            }
        };
        self.end_trace(status)
    }

    /// Writes what is left of the trace, if one was asked for. Gives the exit status: `status`, unless that was 0 and the
    /// trace couldn't be written.
    pub fn end_trace(&self, status: u8) -> u8 {
        let tracing = self.tracing.lock().take();
        match tracing.map_or(Ok(()), Tracing::finish) {
            Ok(()) => status,
            Err(failure) => {
                failure.report(self.program);
                if status == 0 { failure.code } else { status }
            }
        }
    }
}

/// All drivers that the programs have.
pub fn drivers() -> Registry {
    let file = protocol_file::FileFactory::new().with_inline(protocol_file::Inline::Always);
    let mut registry = Registry::new()
        .with(file.host_device())
        .with(file)
        .with(format_raw::RawFactory)
        .with(format_qcow2::Qcow2Factory::default())
        .with(format_vmdk::VmdkFactory);
    filters::register(&mut registry);
    iotests::faults::register(&mut registry);
    let tell = |notice: &iotests::faults::Notice| say!("{notice}");
    let blkdebug = iotests::faults::BlkdebugFactory::default().with_observer(Arc::new(tell));
    registry.register(Arc::new(blkdebug));
    registry
}
