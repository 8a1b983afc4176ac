//! The coordinator of KV.RANGE: the keys of every shard in one order, and their values.
//!
//! ```text
//! List on every shard, again where one has run out -> the least heads, one after the other -> values, some of them ahead
//! ```
//!
//! What comes of it: every key that was there throughout is there, up to the limits, with a value that it had at some moment
//! meanwhile. A key that was deleted or has expired since it was listed is left out.
//!
//! Invariants:
//! - A key is taken only while the next one of every shard is known.
//! - Values that are read ahead are short, so that what is held is bounded; a longer one is read when it is its turn.
//! - Nothing is told before everything that was sent is answered.

use std::collections::VecDeque;

use super::action::Action;
use super::op::{Answer, Key, KeyRange, OpError, Order, RangeQuery, Reply, ShardId, ShardOp, Value};
use crate::format::slot::shard_of;
use crate::limits::{RANGE_AHEAD_COUNT, RANGE_AHEAD_SIZE, RANGE_SIZE_MAX, SCAN_STEP_MAX};

/// Bytes of keys in one step of one shard.
const STEP_SIZE: usize = 64 << 10;

/// Keys that are asked of a shard at least: they are not spread evenly.
const STEP_COUNT_MIN: usize = 16;

/// What came of it: keys in order, with their values where those are wanted. None only where the range has no more keys.
pub type Found = Vec<(Key, Option<Value>)>;

/// One operation, with the part that its answer is to come back with.
pub type Sent = (u16, ShardId, ShardOp);

/// Keys of one shard.
#[derive(Debug)]
struct Lane {
    keys: VecDeque<Key>,
    /// What of the range is still to be listed; none at its end.
    rest: Option<KeyRange>,
    is_waiting: bool,
}

/// A key whose value is wanted.
#[derive(Debug)]
struct Slot {
    key: Key,
    state: SlotState,
}

#[derive(Debug)]
enum SlotState {
    /// Nobody was asked.
    Listed,
    Waiting,
    Read(Reply),
}

/// One KV.RANGE under way.
#[derive(Debug)]
pub struct RangeRead {
    query: RangeQuery,
    shard_count: u16,
    lanes: Vec<Lane>,
    /// Keys that were taken and whose value has not been given yet. Their parts count from `first` on.
    slots: VecDeque<Slot>,
    first: u16,
    /// How many of them were asked for.
    asked: usize,
    found: Found,
    size: usize,
    in_flight: usize,
    /// Nothing more is sent.
    is_ending: bool,
    error: Option<OpError>,
}

impl RangeRead {
    /// Sends the first operations.
    pub fn start(query: RangeQuery, shard_count: u16, send: &mut impl FnMut(Sent)) -> RangeRead {
        let lane = || Lane { keys: VecDeque::new(), rest: Some(query.range.clone()), is_waiting: false };
        let mut read = RangeRead {
            lanes: std::iter::repeat_with(lane).take(usize::from(shard_count)).collect(),
            query,
            shard_count,
            slots: VecDeque::new(),
            first: 0,
            asked: 0,
            found: Vec::new(),
            size: 0,
            in_flight: 0,
            is_ending: false,
            error: None,
        };
        for shard in 0..shard_count {
            read.ask_for_keys(shard, send);
        }
        read
    }

    /// Takes an answer; gives the outcome with the last one.
    pub fn on_answer(
        &mut self,
        part: u16,
        answer: Answer,
        send: &mut impl FnMut(Sent),
    ) -> Option<Result<Found, OpError>> {
        self.in_flight -= 1;
        match answer {
            Answer::Listed { keys, next } => self.on_listed(part, keys, next),
            Answer::Reply(reply) => {
                let at = usize::from(part.wrapping_sub(self.first));
                if let Some(slot) = self.slots.get_mut(at) {
                    slot.state = SlotState::Read(reply);
                }
            }
            Answer::Failed(error) => self.fail(error),
            _ => {}
        }
        self.go_on(send);
        if self.in_flight > 0 {
            return None;
        }
        Some(self.error.take().map_or_else(|| Ok(std::mem::take(&mut self.found)), Err))
    }

    /// Nobody wants the outcome any more: nothing more is sent, and what was found goes now.
    pub fn abandon(&mut self) {
        self.is_ending = true;
        (self.found, self.slots, self.lanes) = (Vec::new(), VecDeque::new(), Vec::new());
    }

    fn fail(&mut self, error: OpError) {
        self.error.get_or_insert(error);
        self.is_ending = true;
    }

    fn ask_for_keys(&mut self, shard: u16, send: &mut impl FnMut(Sent)) {
        let left = self.query.limit - self.found.len();
        let count = (left / self.lanes.len()).saturating_mul(2).clamp(STEP_COUNT_MIN, SCAN_STEP_MAX);
        let lane = &mut self.lanes[usize::from(shard)];
        let Some(range) = lane.rest.clone().filter(|_| !lane.is_waiting) else { return };
        lane.is_waiting = true;
        self.in_flight += 1;
        let order = self.query.order;
        send((shard, ShardId(shard), ShardOp::List { range, order, count, size_max: STEP_SIZE }));
    }

    fn on_listed(&mut self, shard: u16, keys: Vec<Key>, next: Option<Key>) {
        let order = self.query.order;
        let Some(lane) = self.lanes.get_mut(usize::from(shard)) else { return };
        lane.is_waiting = false;
        lane.rest = lane.rest.take().zip(next).map(|(rest, next)| rest.after(next, order));
        lane.keys.extend(keys);
    }

    /// Whether as many keys as are wanted have been taken, or as many bytes of them.
    fn has_enough_keys(&self) -> bool {
        self.found.len() + self.slots.len() >= self.query.limit
            || (!self.query.with_values && self.size >= RANGE_SIZE_MAX)
    }

    /// Takes keys in order, as long as the next one of every shard is known.
    fn take_keys(&mut self, send: &mut impl FnMut(Sent)) {
        while !self.has_enough_keys() {
            let mut is_known = true;
            for shard in 0..self.shard_count {
                let lane = &self.lanes[usize::from(shard)];
                if lane.keys.is_empty() && lane.rest.is_some() {
                    is_known = false;
                    self.ask_for_keys(shard, send);
                }
            }
            // What values are read ahead for is enough for now.
            if !is_known || self.slots.len() >= 2 * RANGE_AHEAD_COUNT {
                return;
            }
            let heads = self.lanes.iter().enumerate().filter_map(|(at, lane)| Some((lane.keys.front()?, at)));
            let best = match self.query.order {
                Order::Ascending => heads.min(),
                Order::Descending => heads.max(),
            };
            let Some(at) = best.map(|(_, at)| at) else { return };
            let Some(key) = self.lanes[at].keys.pop_front() else { return };
            if self.query.with_values {
                self.slots.push_back(Slot { key, state: SlotState::Listed });
            } else {
                self.size += key.len();
                self.found.push((key, None));
            }
        }
    }

    /// Gives values in order as far as they are there, takes keys in their places, and asks for some values more.
    fn go_on(&mut self, send: &mut impl FnMut(Sent)) {
        while !self.is_ending && matches!(self.slots.front(), Some(Slot { state: SlotState::Read(_), .. })) {
            self.give_first(send);
        }
        if self.is_ending {
            return;
        }
        self.take_keys(send);
        while self.asked < RANGE_AHEAD_COUNT.min(self.slots.len()) {
            self.ask_for_value(self.asked, Action::GetWithin(RANGE_AHEAD_SIZE as u64), send);
            self.asked += 1;
        }
    }

    fn ask_for_value(&mut self, at: usize, action: Action, send: &mut impl FnMut(Sent)) {
        let slot = &mut self.slots[at];
        slot.state = SlotState::Waiting;
        let key = slot.key.clone();
        self.in_flight += 1;
        let part = self.first.wrapping_add(at as u16);
        send((part, shard_of(&key, self.shard_count), ShardOp::Key { key, action }));
    }

    /// Gives the value of the first key, which was read; asks for it again where it is long.
    fn give_first(&mut self, send: &mut impl FnMut(Sent)) {
        let Some(Slot { key, state: SlotState::Read(reply) }) = self.slots.front_mut() else { return };
        let is_first = self.found.is_empty();
        let Some(left) = RANGE_SIZE_MAX.checked_sub(self.size + key.len()) else {
            self.is_ending = true;
            return;
        };
        match std::mem::replace(reply, Reply::Nil) {
            Reply::Bulk(value) if value.len() <= left || is_first => {
                self.size += key.len() + value.len();
                self.found.push((std::mem::take(key), Some(value)));
            }
            Reply::Int(size) if usize::try_from(size).is_ok_and(|size| size <= left) => {
                return self.ask_for_value(0, Action::GetWithin(left as u64), send);
            }
            Reply::Int(_) if is_first => return self.ask_for_value(0, Action::Get, send),
            Reply::Bulk(_) | Reply::Int(_) => self.is_ending = true,
            // It went after it was listed.
            Reply::Nil => {}
            Reply::Error(error) if is_first => {
                let (error, key) = (Box::new(error), key.escape_ascii().to_string());
                self.fail(OpError::UnreadableValue { error, key });
            }
            // What is before it is told first.
            _ => self.is_ending = true,
        }
        if !self.is_ending {
            self.slots.pop_front();
            self.asked -= 1;
            self.first = self.first.wrapping_add(1);
        }
    }
}
