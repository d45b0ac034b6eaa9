//! A run as something to read: who held what, who waited for whom, which await let the other in. It prints what the
//! recorder kept, and watches gates and jobs while events are kept; it changes nothing of what happens.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{Arc, Weak},
};

use block_core::{
    Graph,
    tracked::{InFlight, TrackedRange},
};
use jobs::JobEvent;

use super::record::{Event, Recorder};

type Key = (u64, bool, u32);

/// A request that is tracked at some node.
struct Known {
    entry: InFlight,
    owner: Arc<str>,
    /// Orders of those who were seen waiting for it.
    waiting: Vec<(u64, TrackedRange)>,
}

/// After each poll, looks at what every node of `graph` tracks, and tells what is new and what is gone.
pub(crate) fn watch_gates(recorder: &Arc<Recorder>, graph: &Arc<Graph>) {
    let graph: Weak<Graph> = Arc::downgrade(graph);
    let weak = Arc::downgrade(recorder);
    let mut known: BTreeMap<Key, Known> = BTreeMap::new();
    recorder.env().after_each_poll(move |task| {
        let (Some(graph), Some(recorder)) = (graph.upgrade(), weak.upgrade()) else {
            return;
        };
        let task: Arc<str> = Arc::from(task);
        for event in recorder.job_events() {
            let text = match &event {
                JobEvent::StatusChange { id, status } => format!("{id} is {status}"),
                other => format!("{}: {other:?}", other.id()),
            };
            recorder.say(task.clone(), text);
        }
        let mut now = BTreeMap::new();
        let mut names = BTreeMap::new();
        for node in graph.nodes() {
            // Storage is told of by the disks.
            if node.edges().iter().next().is_none() {
                continue;
            }
            let name = node.filename().unwrap_or_default();
            names.insert(node.id(), format!("{} {name}", node.driver().name()));
            for entry in node.tracker().list() {
                now.insert((node.id(), entry.serialising, entry.slot), entry);
            }
        }
        let same = |a: &InFlight, b: &InFlight| (a.order, a.range) == (b.order, b.range);
        let gone: Vec<Key> = known
            .iter()
            .filter(|(key, old)| !now.get(key).is_some_and(|new| same(new, &old.entry)))
            .map(|(key, _)| *key)
            .collect();
        for key in gone {
            if let Some(old) = known.remove(&key) {
                let node = names.get(&key.0).map_or("?", String::as_str);
                let who = &old.owner;
                recorder.say(
                    task.clone(),
                    format!("gate of {node}: {who} lets {} go", old.entry.range),
                );
            }
        }
        for (key, entry) in now {
            let node = names.get(&key.0).map_or("?", String::as_str);
            let old = known.entry(key).or_insert_with(|| {
                let how = if entry.serialising { " alone" } else { "" };
                let text = format!("gate of {node}: {task} takes {}{how}", entry.range);
                recorder.say(task.clone(), text);
                Known {
                    entry: entry.clone(),
                    owner: task.clone(),
                    waiting: Vec::new(),
                }
            });
            for waiting in &entry.watched_by {
                if !old.waiting.contains(waiting) {
                    old.waiting.push(*waiting);
                    let who = &old.owner;
                    recorder.say(
                        task.clone(),
                        format!(
                            "gate of {node}: {} WAITS for {who}, who holds {}",
                            waiting.1, entry.range
                        ),
                    );
                }
            }
        }
    });
}

/// The last `most` events as text, one line each, with a mark wherever another task goes on.
pub fn print(events: &[Event], most: usize) -> String {
    let mut text = String::new();
    let skipped = events.len().saturating_sub(most);
    if skipped > 0 {
        let _ = writeln!(text, "({skipped} earlier events are left out)");
    }
    let mut last: Option<&Arc<str>> = None;
    for event in &events[skipped..] {
        let switched = last.is_some_and(|task| *task != event.task);
        let mark = if switched { ">" } else { " " };
        let _ = writeln!(
            text,
            "{:>6} {mark} {:<16} {}",
            event.poll, event.task, event.text
        );
        last = Some(&event.task);
    }
    text
}
