//! Tests of the environment.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use block_core::{
    ErrorKind,
    env::{Environment, offload},
};
use futures::FutureExt;

use crate::{EnvTokio, cores};

#[test]
fn a_timer_can_be_polled_outside_of_the_runtime() {
    let env = EnvTokio::new(1).unwrap();
    let before = env.now();
    futures::executor::block_on(env.sleep(Duration::from_millis(20)));
    assert!(env.now() >= before + Duration::from_millis(20));
}

#[test]
fn a_spawned_task_runs_in_the_background() {
    let env = EnvTokio::new(1).unwrap();
    let (tx, rx) = mpsc::channel();
    env.spawn(async move { tx.send(7).unwrap() }.boxed());
    assert_eq!(rx.recv_timeout(Duration::from_secs(10)), Ok(7));
}

#[test]
fn offloaded_work_never_uses_more_threads_than_there_are_cores() {
    let env: Arc<dyn Environment> = Arc::new(EnvTokio::new(1).unwrap());
    let running = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let works = (0..cores() * 8).map(|index| {
        let (running, most) = (Arc::clone(&running), Arc::clone(&most));
        let env = Arc::clone(&env);
        async move {
            let work = move || {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(2));
                running.fetch_sub(1, Ordering::SeqCst);
                index
            };
            offload(&env, work).await.unwrap()
        }
    });
    let results = futures::executor::block_on(futures::future::join_all(works));
    assert_eq!(results, (0..cores() * 8).collect::<Vec<_>>());
    let most = most.load(Ordering::SeqCst);
    assert!((1..=cores()).contains(&most), "{most} at once");
}

#[test]
fn a_panicking_task_ends_block_on_instead_of_hanging_it() {
    let env = EnvTokio::new(1).unwrap();
    env.spawn(async { panic!("boom") }.boxed());
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        env.block_on(std::future::pending::<()>());
    }));
    let payload = outcome.unwrap_err();
    let message = payload.downcast_ref::<String>().unwrap();
    assert_eq!(message, "a background task panicked: boom");
    assert_eq!(env.panics(), 1);
}

#[test]
fn panicking_work_is_counted_and_leaves_the_workers_usable() {
    let env: Arc<EnvTokio> = Arc::new(EnvTokio::new(1).unwrap());
    let dynamic: Arc<dyn Environment> = env.clone();
    for round in 1..=(cores() as u64 + 1) {
        let result = futures::executor::block_on(offload::<()>(&dynamic, || panic!("boom")));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
        // The waiter learns before the panic is recorded.
        while env.panics() < round {
            std::thread::yield_now();
        }
    }
    assert_eq!(
        futures::executor::block_on(offload(&dynamic, || 5)).unwrap(),
        5
    );
}

#[test]
fn an_environment_may_be_dropped_inside_of_its_own_task() {
    let env = Arc::new(EnvTokio::new(1).unwrap());
    let (tx, rx) = mpsc::channel();
    let (go, gone) = futures::channel::oneshot::channel::<()>();
    let mine = Arc::clone(&env);
    env.spawn(
        async move {
            gone.await.unwrap();
            drop(mine);
            tx.send(()).unwrap();
        }
        .boxed(),
    );
    drop(env);
    go.send(()).unwrap();
    assert_eq!(rx.recv_timeout(Duration::from_secs(10)), Ok(()));
}

#[test]
fn work_offloaded_after_the_shutdown_is_cancelled_not_forgotten() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_time()
        .build()
        .unwrap();
    let env: Arc<dyn Environment> = Arc::new(EnvTokio::from_handle(runtime.handle().clone()));
    runtime.shutdown_background();
    let result = futures::executor::block_on(offload(&env, || ()));
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Cancelled);
}

#[test]
fn random_numbers_differ() {
    let env = EnvTokio::new(1).unwrap();
    assert!((0..4).any(|_| env.random() != env.random()));
}
