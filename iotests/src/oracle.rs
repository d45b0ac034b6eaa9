//! The content oracle: what each sector of a disk may hold, given what was asked of it and when.
//!
//! Every request is told to the oracle when it begins and when it ends. Its value for a sector is *superseded* once a
//! later request, begun after this one had ended, has succeeded there; until then the sector may hold it. That is all
//! that overlapping requests without an order among them may be asked for, and it is exact where there is no overlap.
//! *Victims* are ranges with one owner whose bytes must never change once written: nothing else is ever allowed there.
//!
//! The oracle never does I/O and knows no format; it judges buffers that it is given.

use std::{collections::BTreeMap, fmt, ops::Range, sync::Arc};

use parking_lot::Mutex;

use crate::pattern::{SECTOR, Seen, Stamp};

/// What a driver's discard leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterDiscard {
    /// Zeroes, always.
    Zeroes,
    /// Zeroes, what was there, or what the backing file has.
    Anything,
}

/// What a request does to its sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    /// What was there before anything was asked.
    Initial,
    Stamp {
        owner: u32,
        seq: u64,
    },
    Zero,
    /// What is there may become zeroes, or what it was at the beginning.
    Discarded,
    /// What the sector held at one moment: its number.
    Past(u32),
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    id: u64,
    value: Value,
    began: u64,
    /// When it ended, if it did.
    ended: Option<u64>,
    superseded: Option<u64>,
    /// What superseded it was durable when it ended: not even a cut of the power brings this back.
    gone: bool,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It did what it was asked for.
    Done,
    /// The same, and it is durable.
    Durable,
    /// It was refused: it has touched nothing.
    Refused,
    /// It failed or was dropped: it may have happened or not, but it happens no more. Anything that begins later wins.
    Undone,
}

/// A sector that holds what it may not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Where, in bytes.
    pub offset: u64,
    /// How many sectors in a row have the same fault.
    pub sectors: u64,
    /// What is there.
    pub found: Seen,
    /// What would have been allowed, in words.
    pub allowed: String,
    /// It is in a range whose bytes must never change.
    pub victim: bool,
    /// What is there belongs to another place: data of one range came into another.
    pub foreign: bool,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (self.victim, self.foreign) {
            (true, true) => "victim overwritten with another range's data",
            (true, false) => "victim changed",
            (false, true) => "another range's data",
            (false, false) => "wrong content",
        };
        write!(
            f,
            "{what} at {:#x} ({} sectors): found {}, allowed: {}",
            self.offset, self.sectors, self.found, self.allowed
        )
    }
}

/// How strictly content is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Judgement {
    /// What the order of requests allows.
    Exact,
    /// That for victims; elsewhere whatever was ever written to the sector, or zeroes.
    Lenient,
    /// Everywhere whatever was ever written to the sector, or zeroes.
    Known,
    /// What a cut of the power may leave: all that is flushed is there, and of everything since, any.
    AfterCut,
}

#[derive(Default)]
struct State {
    clock: u64,
    next_request: u64,
    /// Per sector. Absent: only what it was at the beginning is allowed.
    sectors: BTreeMap<u64, Vec<Entry>>,
    initial: BTreeMap<u64, Seen>,
    /// Begin times of reads in flight, with their count.
    readers: BTreeMap<u64, u64>,
    victims: Vec<Range<u64>>,
    /// Every request that wrote data: owner, range in sectors.
    wrote: BTreeMap<u64, (u32, Range<u64>)>,
    /// The power may be cut: what isn't superseded durably is kept.
    may_be_cut: bool,
    /// When the last flush that succeeded began.
    flushed: u64,
    /// What the disk was made again.
    past: Vec<Arc<Moment>>,
}

/// The oracle of one disk. Cloning shares it.
#[derive(Clone)]
pub struct Oracle {
    after_discard: AfterDiscard,
    state: Arc<Mutex<State>>,
}

/// A request that the oracle was told of. Dropped without [`Change::end`] it counts as dropped by its producer.
#[must_use = "a change ends when it is dropped"]
pub struct Change {
    oracle: Oracle,
    id: u64,
    seq: u64,
    range: Range<u64>,
    open: bool,
}

/// A read that the oracle was told of.
#[must_use = "a read ends when it is dropped"]
pub struct Reading {
    oracle: Oracle,
    began: u64,
}

fn sectors_of(offset: u64, len: u64) -> Range<u64> {
    debug_assert!(offset % SECTOR == 0, "the oracle judges whole sectors");
    offset / SECTOR..(offset + len).div_ceil(SECTOR)
}

impl Oracle {
    /// An oracle for a disk that reads as zeroes.
    pub fn new(after_discard: AfterDiscard) -> Self {
        Self {
            after_discard,
            state: Arc::default(),
        }
    }

    /// The same books from here on under another rule for discards.
    #[must_use]
    pub fn with_rule(mut self, after_discard: AfterDiscard) -> Self {
        self.after_discard = after_discard;
        self
    }

    /// Tells what the disk holds before anything is done to it (a backing file's content).
    pub fn set_initial(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.state.lock();
        for (at, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            let seen = Seen::of(sector);
            if seen != Seen::Zero {
                state.initial.insert(offset / SECTOR + at as u64, seen);
            }
        }
    }

    /// From now on nothing but what is allowed there already is ever allowed in this range.
    pub fn protect(&self, offset: u64, len: u64) {
        self.state.lock().victims.push(offset..offset + len);
    }

    /// The power may be cut: from now on remembers what [`Self::check_after_cut`] needs.
    pub fn expect_power_cut(&self) {
        self.state.lock().may_be_cut = true;
    }

    /// A flush begins. When it succeeds, tell [`Self::flushed`] what this gave.
    pub fn flush_begins(&self) -> u64 {
        let mut state = self.state.lock();
        state.clock += 1;
        state.clock
    }

    /// The flush that began at `began` has succeeded: what had ended before it began is durable.
    pub fn flushed(&self, began: u64) {
        let mut state = self.state.lock();
        state.flushed = state.flushed.max(began);
    }

    /// The range was cut off: if it comes back, it reads as zeroes.
    pub fn forget(&self, offset: u64, len: u64) {
        let mut state = self.state.lock();
        for sector in sectors_of(offset, len) {
            state.sectors.remove(&sector);
            state.initial.remove(&sector);
        }
    }

    /// The first sector from `offset` on (both in bytes) that anybody ever asked to be changed, or that held something at
    /// the beginning.
    pub fn next_known(&self, offset: u64) -> Option<u64> {
        let state = self.state.lock();
        let from = offset.div_ceil(SECTOR)..;
        let asked = state.sectors.range(from.clone()).next().map(|(at, _)| *at);
        let initial = state.initial.range(from).next().map(|(at, _)| *at);
        let first = match (asked, initial) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        first.map(|sector| sector * SECTOR)
    }

    fn begin(&self, range: Range<u64>, owner: Option<u32>, value: Option<Value>) -> Change {
        let mut state = self.state.lock();
        state.clock += 1;
        state.next_request += 1;
        let (id, began) = (state.next_request, state.clock);
        let value = match (value, owner) {
            (Some(value), _) => value,
            (None, owner) => Value::Stamp {
                owner: owner.unwrap_or(0),
                seq: id,
            },
        };
        if let Value::Stamp { owner, seq } = value {
            state.wrote.insert(seq, (owner, range.clone()));
        }
        for sector in range.clone() {
            let entries = state.sectors.entry(sector).or_insert_with(|| {
                vec![Entry {
                    id: 0,
                    value: Value::Initial,
                    began: 0,
                    ended: Some(0),
                    superseded: None,
                    gone: false,
                }]
            });
            entries.push(Entry {
                id,
                value,
                began,
                ended: None,
                superseded: None,
                gone: false,
            });
        }
        Change {
            oracle: self.clone(),
            id,
            seq: id,
            range,
            open: true,
        }
    }

    /// A write of stamped data begins. The stamp's request number is [`Change::seq`].
    pub fn write(&self, owner: u32, offset: u64, len: u64) -> Change {
        self.begin(sectors_of(offset, len), Some(owner), None)
    }

    /// A zero write begins.
    pub fn zero(&self, offset: u64, len: u64) -> Change {
        self.begin(sectors_of(offset, len), None, Some(Value::Zero))
    }

    /// A discard begins.
    pub fn discard(&self, offset: u64, len: u64) -> Change {
        let value = match self.after_discard {
            AfterDiscard::Zeroes => Value::Zero,
            AfterDiscard::Anything => Value::Discarded,
        };
        self.begin(sectors_of(offset, len), None, Some(value))
    }

    /// A discard of what a driver may keep, though it discards else (a cluster that is covered in part) begins.
    pub fn discard_perhaps(&self, offset: u64, len: u64) -> Change {
        self.begin(sectors_of(offset, len), None, Some(Value::Discarded))
    }

    /// The disk, `len` bytes of it at most, begins to be made what it was at a moment.
    pub fn restore(&self, moment: &Arc<Moment>, len: u64) -> Change {
        let number = {
            let mut state = self.state.lock();
            state.past.push(moment.clone());
            state.past.len() as u32 - 1
        };
        self.begin(sectors_of(0, len), None, Some(Value::Past(number)))
    }

    /// A read begins.
    pub fn read(&self) -> Reading {
        let mut state = self.state.lock();
        state.clock += 1;
        let began = state.clock;
        *state.readers.entry(began).or_default() += 1;
        Reading {
            oracle: self.clone(),
            began,
        }
    }

    fn end(&self, id: u64, range: Range<u64>, how: Ended) {
        let mut state = self.state.lock();
        state.clock += 1;
        let now = state.clock;
        let state = &mut *state;
        let oldest_reader = state.readers.keys().next().copied();
        if how == Ended::Refused {
            for (_, entries) in state.sectors.range_mut(range) {
                entries.retain(|entry| entry.id != id);
            }
            return;
        }
        for (_, entries) in state.sectors.range_mut(range) {
            let Some(this) = entries.iter_mut().find(|entry| entry.id == id) else {
                continue;
            };
            this.ended = Some(now);
            let began = this.began;
            let replaces = how != Ended::Undone && this.value != Value::Discarded;
            if replaces {
                for entry in entries.iter_mut() {
                    if entry.ended.is_some_and(|end| end < began) {
                        entry.superseded.get_or_insert(now);
                        entry.gone |= how == Ended::Durable;
                    }
                }
            }
            let (may_be_cut, flushed) = (state.may_be_cut, state.flushed);
            entries.retain(|entry| {
                let Some(at) = entry.superseded else {
                    return true;
                };
                let may_come_back = may_be_cut && !entry.gone && at >= flushed;
                may_come_back || oldest_reader.is_some_and(|reader| at > reader)
            });
        }
    }

    /// Calls `look` with each value that a sector may show to a read that began at `began`, until it says true; says
    /// whether it did.
    fn any_allowed(
        state: &State,
        sector: u64,
        began: u64,
        how: Judgement,
        mut look: impl FnMut(Seen) -> bool,
    ) -> bool {
        let initial = || state.initial.get(&sector).copied().unwrap_or(Seen::Zero);
        let Some(entries) = state.sectors.get(&sector) else {
            return look(initial());
        };
        let after_cut = how == Judgement::AfterCut;
        entries
            .iter()
            .filter(|entry| match entry.superseded {
                None => true,
                Some(at) if after_cut => !entry.gone && at >= state.flushed,
                Some(at) => at > began,
            })
            .any(|entry| match entry.value {
                Value::Initial => look(initial()),
                Value::Zero => look(Seen::Zero),
                Value::Discarded => look(Seen::Zero) || look(initial()),
                Value::Stamp { owner, seq } => look(Seen::Stamp(Stamp { owner, seq, sector })),
                Value::Past(number) => match Self::past(state, number, sector) {
                    [] => look(Seen::Zero),
                    seen => seen.iter().any(|seen| look(*seen)),
                },
            })
    }

    /// What a sector held at a moment that the disk was brought back to; nothing beyond the end that it had then.
    fn past(state: &State, number: u32, sector: u64) -> &[Seen] {
        let moment = state.past.get(number as usize);
        let seen = moment.and_then(|moment| moment.0.get(sector as usize));
        seen.map_or(&[], Vec::as_slice)
    }

    fn allowed(state: &State, sector: u64, began: u64, how: Judgement) -> Vec<Seen> {
        let mut allowed = Vec::new();
        Self::any_allowed(state, sector, began, how, |seen| {
            allowed.push(seen);
            false
        });
        allowed
    }

    fn judge(&self, offset: u64, bytes: &[u8], began: u64, how: Judgement) -> Vec<Mismatch> {
        let state = self.state.lock();
        let mut mismatches: Vec<Mismatch> = Vec::new();
        for (at, bytes) in bytes.chunks(SECTOR as usize).enumerate() {
            let sector = offset / SECTOR + at as u64;
            let found = Seen::of(bytes);
            if Self::any_allowed(&state, sector, began, how, |seen| seen == found) {
                continue;
            }
            let allowed = Self::allowed(&state, sector, began, how);
            let place = sector * SECTOR;
            let victim = state.victims.iter().any(|range| range.contains(&place));
            let foreign = matches!(found, Seen::Stamp(stamp) if stamp.sector != sector);
            let lenient = match how {
                Judgement::Exact | Judgement::AfterCut => false,
                Judgement::Lenient => !victim,
                Judgement::Known => true,
            };
            if lenient && !foreign {
                let known = match found {
                    Seen::Zero => true,
                    Seen::Stamp(stamp) => {
                        state.wrote.get(&stamp.seq).is_some_and(|(owner, range)| {
                            *owner == stamp.owner && range.contains(&sector)
                        }) || state.initial.get(&sector) == Some(&found)
                            || state.past.iter().any(|moment| {
                                let seen = moment.0.get(sector as usize);
                                seen.is_some_and(|seen| seen.contains(&found))
                            })
                    }
                    Seen::Garbage(_) => false,
                };
                if known {
                    continue;
                }
            }
            if let Some(last) = mismatches.last_mut()
                && last.offset + last.sectors * SECTOR == place
                && (last.victim, last.foreign) == (victim, foreign)
                && std::mem::discriminant(&last.found) == std::mem::discriminant(&found)
            {
                last.sectors += 1;
                continue;
            }
            let mut words: Vec<String> = allowed.iter().map(ToString::to_string).collect();
            words.dedup();
            mismatches.push(Mismatch {
                offset: place,
                sectors: 1,
                found,
                allowed: words.join(" or "),
                victim,
                foreign,
            });
        }
        mismatches
    }

    /// Judges what a disk at rest holds at `offset`: nothing is in flight.
    pub fn check(&self, offset: u64, bytes: &[u8]) -> Vec<Mismatch> {
        self.judge(offset, bytes, u64::MAX, Judgement::Exact)
    }

    /// The same, but outside of victims a sector may hold anything that somebody ever wrote to it, or zeroes: what a
    /// disk without a gate owes.
    pub fn check_lenient(&self, offset: u64, bytes: &[u8]) -> Vec<Mismatch> {
        self.judge(offset, bytes, u64::MAX, Judgement::Lenient)
    }

    /// Everywhere, also in victims, a sector may hold anything that somebody ever wrote to it, or zeroes: what a disk
    /// owes after a power cut where nothing was flushed.
    pub fn check_known(&self, offset: u64, bytes: &[u8]) -> Vec<Mismatch> {
        self.judge(offset, bytes, u64::MAX, Judgement::Known)
    }
}

impl Oracle {
    /// Judges what is left after a cut of the power: a sector holds what was flushed, or anything that was sent to it
    /// since. [`Self::expect_power_cut`] must have been called before.
    pub fn check_after_cut(&self, offset: u64, bytes: &[u8]) -> Vec<Mismatch> {
        self.judge(offset, bytes, u64::MAX, Judgement::AfterCut)
    }
}

/// What each sector of a disk could have held at one moment, or shortly before.
#[derive(Default)]
pub struct Moment(Vec<Vec<Seen>>);

impl Moment {
    /// A disk that holds these bytes, and nothing else.
    pub fn exactly(bytes: &[u8]) -> Self {
        let sectors = bytes.chunks(SECTOR as usize);
        Self(sectors.map(|sector| vec![Seen::of(sector)]).collect())
    }

    /// Judges a copy of the disk as it was then. With `or_zero`, what wasn't copied reads as zeroes.
    pub fn check(&self, bytes: &[u8], or_zero: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        for (sector, bytes) in bytes.chunks(SECTOR as usize).enumerate() {
            let found = Seen::of(bytes);
            let allowed = self.0.get(sector).map_or(&[][..], Vec::as_slice);
            if !(allowed.contains(&found) || or_zero && found == Seen::Zero) {
                let words: Vec<String> = allowed.iter().map(ToString::to_string).collect();
                let at = sector as u64 * SECTOR;
                wrong.push(format!(
                    "at {at:#x}: found {found}, allowed: {}",
                    words.join(" or ")
                ));
            }
        }
        wrong
    }
}

impl Change {
    /// The request number to stamp the data with.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// The request has ended.
    pub fn end(mut self, how: Ended) {
        self.open = false;
        self.oracle.end(self.id, self.range.clone(), how);
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        if self.open {
            self.oracle.end(self.id, self.range.clone(), Ended::Undone);
        }
    }
}

impl Reading {
    /// The read has ended with these bytes from `offset`.
    pub fn check(self, offset: u64, bytes: &[u8]) -> Vec<Mismatch> {
        self.oracle
            .judge(offset, bytes, self.began, Judgement::Exact)
    }

    /// What each sector of a disk of `len` bytes may have held at some time from the beginning of this read until now.
    pub fn moment(self, len: u64) -> Moment {
        let state = self.oracle.state.lock();
        let sectors = 0..len.div_ceil(SECTOR);
        let how = Judgement::Exact;
        let moment = sectors.map(|sector| Oracle::allowed(&state, sector, self.began, how));
        let moment = Moment(moment.collect());
        drop(state);
        moment
    }

    /// The same as [`Oracle::check_lenient`] does.
    pub fn check_lenient(self, offset: u64, bytes: &[u8]) -> Vec<Mismatch> {
        self.oracle
            .judge(offset, bytes, self.began, Judgement::Lenient)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut state = self.oracle.state.lock();
        if let Some(count) = state.readers.get_mut(&self.began) {
            *count -= 1;
            if *count == 0 {
                state.readers.remove(&self.began);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern::stamped;

    fn oracle() -> Oracle {
        Oracle::new(AfterDiscard::Zeroes)
    }

    fn data(seq: u64) -> Vec<u8> {
        stamped(1, seq, 0, 512).to_vec()
    }

    #[test]
    fn only_the_last_of_ordered_writes_is_allowed() {
        let oracle = oracle();
        let first = oracle.write(1, 0, 512);
        let old = data(first.seq());
        first.end(Ended::Done);
        let second = oracle.write(1, 0, 512);
        let new = data(second.seq());
        assert!(oracle.check(0, &old).is_empty() && oracle.check(0, &new).is_empty());
        second.end(Ended::Done);
        assert!(!oracle.check(0, &old).is_empty());
        assert!(!oracle.check(0, &[0; 512]).is_empty());
        assert!(oracle.check(0, &new).is_empty());
    }

    #[test]
    fn either_of_two_overlapping_writes_is_allowed_but_nothing_before_them() {
        let oracle = oracle();
        let (a, b) = (oracle.write(1, 0, 512), oracle.write(2, 0, 512));
        let (seen_a, seen_b) = (data(a.seq()), stamped(2, b.seq(), 0, 512).to_vec());
        b.end(Ended::Done);
        a.end(Ended::Done);
        assert!(oracle.check(0, &seen_a).is_empty() && oracle.check(0, &seen_b).is_empty());
        assert!(!oracle.check(0, &[0; 512]).is_empty());
    }

    #[test]
    fn a_dropped_write_may_show_until_a_newer_one_is_acknowledged() {
        let oracle = oracle();
        let dropped = oracle.write(1, 0, 512);
        let late = data(dropped.seq());
        drop(dropped);
        assert!(oracle.check(0, &late).is_empty() && oracle.check(0, &[0; 512]).is_empty());
        oracle.write(1, 0, 512).end(Ended::Done);
        assert!(!oracle.check(0, &late).is_empty());
    }

    #[test]
    fn after_a_power_cut_all_since_the_last_flush_is_allowed_and_nothing_before() {
        let oracle = oracle();
        oracle.expect_power_cut();
        let write = || {
            let change = oracle.write(1, 0, 512);
            let bytes = data(change.seq());
            change.end(Ended::Done);
            bytes
        };
        let first = write();
        let second = write();
        let flush = oracle.flush_begins();
        let third = write();
        oracle.flushed(flush);
        assert!(!oracle.check_after_cut(0, &[0; 512]).is_empty());
        assert!(!oracle.check_after_cut(0, &first).is_empty());
        assert!(oracle.check_after_cut(0, &second).is_empty());
        assert!(oracle.check_after_cut(0, &third).is_empty());
        assert!(!oracle.check(0, &second).is_empty());
        let durable = oracle.write(1, 0, 512);
        let fourth = data(durable.seq());
        durable.end(Ended::Durable);
        assert!(!oracle.check_after_cut(0, &third).is_empty());
        assert!(oracle.check_after_cut(0, &fourth).is_empty());
    }

    #[test]
    fn a_copy_of_one_moment_may_not_hold_what_came_later() {
        let oracle = oracle();
        let reading = oracle.read();
        let write = oracle.write(1, 0, 512);
        let seen = data(write.seq());
        write.end(Ended::Done);
        let moment = reading.moment(512);
        let later = oracle.write(1, 0, 512);
        let late = data(later.seq());
        later.end(Ended::Done);
        assert!(moment.check(&seen, false).is_empty() && moment.check(&[0; 512], false).is_empty());
        assert!(!moment.check(&late, false).is_empty());
    }

    #[test]
    fn a_disk_that_is_made_what_it_was_holds_that_and_nothing_that_came_between() {
        let oracle = oracle();
        let first = oracle.write(1, 0, 512);
        let then = data(first.seq());
        first.end(Ended::Done);
        let moment = Arc::new(oracle.read().moment(512));
        let between = oracle.write(1, 0, 1024);
        let seen = stamped(1, between.seq(), 0, 1024).to_vec();
        between.end(Ended::Done);
        let refused = oracle.restore(&moment, 4096);
        refused.end(Ended::Refused);
        assert!(oracle.check(0, &seen).is_empty() && !oracle.check(0, &then).is_empty());
        let restored = oracle.restore(&moment, 4096);
        assert!(oracle.check(0, &seen).is_empty() && oracle.check(0, &then).is_empty());
        restored.end(Ended::Done);
        assert!(oracle.check(0, &then).is_empty() && !oracle.check(0, &seen).is_empty());
        assert!(oracle.check(512, &[0; 512]).is_empty());
    }

    #[test]
    fn a_read_may_see_what_was_there_when_it_began() {
        let oracle = oracle();
        let reading = oracle.read();
        oracle.write(1, 0, 512).end(Ended::Done);
        oracle.write(1, 0, 512).end(Ended::Done);
        assert!(reading.check(0, &[0; 512]).is_empty());
        assert!(!oracle.read().check(0, &[0; 512]).is_empty());
    }

    #[test]
    fn another_ranges_data_in_a_victim_is_named_even_when_leniently_judged() {
        let oracle = oracle();
        let victim = oracle.write(7, 0, 512);
        victim.end(Ended::Done);
        oracle.protect(0, 512);
        let write = oracle.write(1, 4096, 512);
        let foreign = stamped(1, write.seq(), 4096, 512);
        write.end(Ended::Done);
        let found = oracle.check_lenient(0, &foreign);
        assert_eq!(found.len(), 1);
        assert!(found[0].victim && found[0].foreign, "{}", found[0]);
        // Outside of a victim, what was once written there is no fault, but foreign data is.
        assert!(oracle.check_lenient(4096, &[0; 512]).is_empty());
        assert!(!oracle.check_lenient(8192, &foreign).is_empty());
    }

    #[test]
    fn a_discard_that_promises_nothing_leaves_old_new_and_zero_allowed() {
        let oracle = Oracle::new(AfterDiscard::Anything);
        let write = oracle.write(1, 0, 512);
        let old = data(write.seq());
        write.end(Ended::Done);
        oracle.discard(0, 512).end(Ended::Done);
        assert!(oracle.check(0, &old).is_empty() && oracle.check(0, &[0; 512]).is_empty());
    }
}
