//! The records of a trace, to bytes and back. No file is opened here.
//!
//! A trace is a header of 16 bytes and then records one after the other, in the order in which things happened. Numbers
//! are little-endian.
//!
//! | bytes | header |
//! | --- | --- |
//! | 0–7 | `BLKTRACE` |
//! | 8–11 | version, 1 |
//! | 12–15 | 0 |
//!
//! | bytes | record (64 bytes) |
//! | --- | --- |
//! | 0 | event: 0 node, 1 arrived, 2 admitted, 3 ended |
//! | 1 | kind of request (arrived); 1 if it succeeded (ended) |
//! | 2–3 | number of the node in this trace |
//! | 4–7 | flags (arrived): bit 31 says that it has to wait at the gate |
//! | 8–15 | nanoseconds since the trace began |
//! | 16–23 | ticket |
//! | 24–31 | offset in bytes; for truncates the new length |
//! | 32–39 | length in bytes |
//! | 40–47 | producer |
//! | 48–55 | hash of the data (XXH3-64), 0 where there is none |
//! | 56–63 | 0 |
//!
//! A node record's bytes 32–39 give the length of a JSON text that follows it, padded with spaces to a multiple of 64.
//! A trace whose end is missing (the program was killed) is read up to its last whole record.

use block_core::{RequestFlags, tracked::RequestKind};
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"BLKTRACE";
const VERSION: u32 = 1;
const HEADER: usize = 16;
const RECORD: usize = 64;
const WAITS: u32 = 1 << 31;
/// A node's description is no longer than this.
const MAX_TEXT: u64 = 1 << 20;

/// What there is to know of a node in order to make one like it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its driver.
    pub driver: String,
    /// The file that a user knows it by.
    pub filename: Option<String>,
    /// Bytes, when the trace began.
    pub length: u64,
    /// The granularity of its allocation in bytes, if it has one.
    pub cluster_size: u64,
    /// The request alignment in bytes.
    pub alignment: u64,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// From here on there are requests of this node.
    Node(NodeInfo),
    /// A request took its ticket.
    Arrived {
        /// What it does.
        kind: RequestKind,
        /// How.
        flags: RequestFlags,
        /// It had to wait.
        waits: bool,
        /// Offset in bytes; for truncates the new length.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whose it is.
        producer: u64,
        /// The hash of what it writes.
        hash: Option<u64>,
    },
    /// A request that had to wait was let in.
    Admitted,
    /// A request ended.
    Ended {
        /// It succeeded.
        ok: bool,
    },
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Which node.
    pub node: u16,
    /// Nanoseconds since the trace began.
    pub at: u64,
    /// The request's number at its node.
    pub ticket: u64,
    /// What happened.
    pub event: Event,
}

/// The bytes at the start of every trace.
pub fn header() -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes
}

/// Whether a file that begins like this is a trace.
pub fn is_trace(start: &[u8]) -> bool {
    start.starts_with(MAGIC)
}

fn kind_code(kind: RequestKind) -> u8 {
    RequestKind::ALL
        .iter()
        .position(|other| *other == kind)
        .map_or(u8::MAX, |at| at as u8)
}

/// What is in a record's fields, in their order.
#[derive(Default)]
struct Fields {
    event: u8,
    code: u8,
    flags: u32,
    offset: u64,
    len: u64,
    producer: u64,
    hash: u64,
}

impl Record {
    /// Appends the record to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut text = String::new();
        let fields = match &self.event {
            Event::Node(info) => {
                // Strings and numbers: there is nothing in it that JSON can't hold.
                text = serde_json::to_string(info).unwrap_or_default();
                Fields {
                    event: 0,
                    len: text.len() as u64,
                    ..Fields::default()
                }
            }
            Event::Arrived {
                kind,
                flags,
                waits,
                offset,
                len,
                producer,
                hash,
            } => Fields {
                event: 1,
                code: kind_code(*kind),
                flags: flags.bits() | if *waits { WAITS } else { 0 },
                offset: *offset,
                len: *len,
                producer: *producer,
                hash: hash.unwrap_or(0),
            },
            Event::Admitted => Fields {
                event: 2,
                ..Fields::default()
            },
            Event::Ended { ok } => Fields {
                event: 3,
                code: u8::from(*ok),
                ..Fields::default()
            },
        };
        out.extend_from_slice(&[fields.event, fields.code]);
        out.extend_from_slice(&self.node.to_le_bytes());
        out.extend_from_slice(&fields.flags.to_le_bytes());
        for word in [
            self.at,
            self.ticket,
            fields.offset,
            fields.len,
            fields.producer,
            fields.hash,
            0,
        ] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        if !text.is_empty() {
            let padded = text.len().next_multiple_of(RECORD);
            out.extend_from_slice(text.as_bytes());
            out.resize(out.len() + padded - text.len(), b' ');
        }
    }
}

/// A trace that was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    /// Everything that happened, in order.
    pub records: Vec<Record>,
    /// Bytes at the end that were no whole record.
    pub cut_off: u64,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

impl Trace {
    /// Reads a trace.
    ///
    /// # Errors
    /// What is wrong, with the record and the field.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < HEADER || !is_trace(bytes) {
            return Err("not a trace: it doesn't begin with 'BLKTRACE'".into());
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if version != VERSION {
            return Err(format!(
                "header: version {version} isn't known (known: {VERSION})"
            ));
        }
        let mut trace = Self::default();
        let mut rest = &bytes[HEADER..];
        while rest.len() >= RECORD {
            let (head, after) = rest.split_at(RECORD);
            let number = trace.records.len();
            let mut taken = after;
            let event = match head[0] {
                0 => {
                    let len = word(head, 32);
                    if len > MAX_TEXT {
                        return Err(format!("record {number}: a description of {len} bytes"));
                    }
                    let padded = (len as usize).next_multiple_of(RECORD);
                    if after.len() < padded {
                        break;
                    }
                    taken = &after[padded..];
                    let info = serde_json::from_slice(&after[..len as usize])
                        .map_err(|error| format!("record {number}: node: {error}"))?;
                    Event::Node(info)
                }
                1 => {
                    let kind = *RequestKind::ALL
                        .get(usize::from(head[1]))
                        .ok_or_else(|| format!("record {number}: kind of request {}", head[1]))?;
                    let flags = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
                    Event::Arrived {
                        kind,
                        flags: RequestFlags::from_bits(flags & !WAITS).ok_or_else(|| {
                            format!("record {number}: flags {flags:#x} aren't known")
                        })?,
                        waits: flags & WAITS != 0,
                        offset: word(head, 24),
                        len: word(head, 32),
                        producer: word(head, 40),
                        hash: Some(word(head, 48)).filter(|hash| *hash != 0),
                    }
                }
                2 => Event::Admitted,
                3 => Event::Ended { ok: head[1] != 0 },
                other => return Err(format!("record {number}: event {other} isn't known")),
            };
            trace.records.push(Record {
                node: u16::from_le_bytes([head[2], head[3]]),
                at: word(head, 8),
                ticket: word(head, 16),
                event,
            });
            rest = taken;
        }
        trace.cut_off = rest.len() as u64;
        Ok(trace)
    }

    /// The nodes, with their numbers and how many requests each has.
    pub fn nodes(&self) -> Vec<(u16, NodeInfo, u64)> {
        let mut nodes: Vec<(u16, NodeInfo, u64)> = Vec::new();
        for record in &self.records {
            match &record.event {
                Event::Node(info) => nodes.push((record.node, info.clone(), 0)),
                Event::Arrived { .. } => {
                    if let Some(node) = nodes.iter_mut().find(|node| node.0 == record.node) {
                        node.2 += 1;
                    }
                }
                Event::Admitted | Event::Ended { .. } => {}
            }
        }
        nodes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        let info = NodeInfo {
            name: "disk".into(),
            driver: "qcow2".into(),
            filename: Some("/a/b.qcow2".into()),
            length: 1 << 30,
            cluster_size: 65536,
            alignment: 1,
        };
        let events = [
            Event::Node(info),
            Event::Arrived {
                kind: RequestKind::Write,
                flags: RequestFlags::FUA,
                waits: true,
                offset: 4096,
                len: 512,
                producer: 7,
                hash: Some(42),
            },
            Event::Admitted,
            Event::Ended { ok: true },
            Event::Arrived {
                kind: RequestKind::Truncate,
                flags: RequestFlags::empty(),
                waits: false,
                offset: 1 << 40,
                len: 0,
                producer: 1,
                hash: None,
            },
            Event::Ended { ok: false },
        ];
        let number = |(at, event)| Record {
            node: 3,
            at: at as u64 * 10,
            ticket: 5,
            event,
        };
        events.into_iter().enumerate().map(number).collect()
    }

    fn encoded() -> Vec<u8> {
        let mut bytes = header();
        for record in records() {
            record.encode(&mut bytes);
        }
        bytes
    }

    #[test]
    fn a_trace_comes_back_as_it_was_written() {
        let trace = Trace::decode(&encoded()).expect("a trace");
        assert_eq!(trace.records, records());
        assert_eq!(trace.cut_off, 0);
        assert_eq!(trace.nodes()[0].2, 2);
    }

    #[test]
    fn a_trace_that_was_cut_off_is_read_up_to_its_last_whole_record() {
        let whole = encoded();
        for len in HEADER..whole.len() {
            let trace = Trace::decode(&whole[..len]).expect("a part of a trace");
            assert!(trace.records.len() <= records().len());
            assert_eq!(trace.records[..], records()[..trace.records.len()]);
        }
    }

    #[test]
    fn what_is_no_trace_is_refused_with_the_record_and_the_field() {
        assert!(Trace::decode(b"QFI\xfb").is_err());
        let mut bytes = encoded();
        bytes[8] = 9;
        assert!(Trace::decode(&bytes).is_err_and(|text| text.contains("version 9")));
        let mut bytes = encoded();
        let last = bytes.len() - RECORD;
        bytes[last] = 77;
        assert!(Trace::decode(&bytes).is_err_and(|text| text.contains("record 5: event 77")));
        let mut bytes = encoded();
        bytes[HEADER + 32..HEADER + 40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(Trace::decode(&bytes).is_err_and(|text| text.contains("description")));
    }
}
