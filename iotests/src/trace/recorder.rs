//! Records what nodes are asked. It observes, collects records in memory and hands them on in pieces; where they go, and on
//! which thread they are written, is its owner's choice.

use std::sync::{
    Arc,
    atomic::{AtomicU16, Ordering},
};

use block_core::{
    Node,
    env::Environment,
    observe::{Arrival, Observer},
};
use parking_lot::Mutex;
use xxhash_rust::xxh3::Xxh3;

use super::format::{Event, NodeInfo, Record, header};

/// So many bytes are collected before they are handed on.
const PIECE: usize = 256 << 10;

type Sink = Box<dyn Fn(Vec<u8>) + Send + Sync>;

/// Records requests.
pub struct Recorder {
    env: Arc<dyn Environment>,
    began: std::time::Duration,
    hashes: bool,
    nodes: AtomicU16,
    pending: Mutex<Vec<u8>>,
    sink: Sink,
}

impl Recorder {
    /// A recorder that hands on what it collects, in order, in pieces, by calling `sink`, which must not block for long:
    /// it is called by whoever makes a request. With `hashes`, what is written is hashed.
    pub fn new(
        env: &Arc<dyn Environment>,
        hashes: bool,
        sink: impl Fn(Vec<u8>) + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            env: env.clone(),
            began: env.now(),
            hashes,
            nodes: AtomicU16::new(0),
            pending: Mutex::new(header()),
            sink: Box::new(sink),
        })
    }

    /// Records the requests of `node` from now on.
    pub fn attach(self: &Arc<Self>, node: &Arc<Node>) {
        let number = self.nodes.fetch_add(1, Ordering::Relaxed);
        let limits = node.limits();
        let info = NodeInfo {
            name: node.name().to_owned(),
            driver: node.driver().name().to_owned(),
            filename: node.filename(),
            length: node.length(),
            cluster_size: limits.serialising_granularity,
            alignment: limits.request_alignment,
        };
        self.record(number, 0, Event::Node(info));
        node.observe(Some(Box::new(OfNode {
            recorder: self.clone(),
            number,
        })));
    }

    /// Hands on what is left. To be called when no request comes any more.
    pub fn finish(&self) {
        let mut pending = self.pending.lock();
        if !pending.is_empty() {
            (self.sink)(std::mem::take(&mut *pending));
        }
    }

    fn record(&self, node: u16, ticket: u64, event: Event) {
        let at = self.env.now().saturating_sub(self.began).as_nanos() as u64;
        let record = Record {
            node,
            at,
            ticket,
            event,
        };
        let mut pending = self.pending.lock();
        record.encode(&mut pending);
        if pending.len() >= PIECE {
            let piece = std::mem::replace(&mut *pending, Vec::with_capacity(PIECE + 4096));
            // With the lock held, or pieces could change places.
            (self.sink)(piece);
        }
    }
}

struct OfNode {
    recorder: Arc<Recorder>,
    number: u16,
}

impl Observer for OfNode {
    fn arrived(&self, arrival: &Arrival<'_>) {
        let hash = arrival
            .data
            .filter(|_| self.recorder.hashes)
            .and_then(|data| {
                let mut hash = Xxh3::new();
                // Memory that a guest shares can't be looked at.
                for chunk in data.chunks()? {
                    hash.update(chunk);
                }
                Some(hash.digest().max(1))
            });
        let event = Event::Arrived {
            kind: arrival.kind,
            flags: arrival.flags,
            waits: arrival.waits,
            offset: arrival.offset,
            len: arrival.len,
            producer: arrival.producer.number(),
            hash,
        };
        self.recorder.record(self.number, arrival.ticket, event);
    }

    fn admitted(&self, ticket: u64) {
        self.recorder.record(self.number, ticket, Event::Admitted);
    }

    fn ended(&self, ticket: u64, ok: bool) {
        self.recorder
            .record(self.number, ticket, Event::Ended { ok });
    }
}
