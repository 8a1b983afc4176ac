//! A linearizability checker for one key at a time, after Wing and Gong with Lowe's memory of visited states.
//!
//! A history is linearizable when every operation can be given a moment between its call and its return such that, one
//! after the other at those moments, they explain every result. Linearizability is local: keys are checked apart.
//!
//! An operation without an answer (the node was killed) may have happened at a moment up to the end of that node, or not
//! at all. Its interval ends with the restart: taking effect later would be an outcome that did not stay settled.

use std::collections::HashSet;

/// What was asked. Values are integers, so that INCR works on every key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Get,
    Set(i64),
    Delete,
    Increment,
    /// WATCH, GET, then MULTI SET EXEC: writes `new` when the value is still `read`.
    Swap {
        read: Option<i64>,
        new: i64,
    },
}

/// What was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// None came: it may or may not have happened.
    Unknown,
    Ok,
    Value(Option<i64>),
    Count(i64),
}

/// One operation of a history. Times come from one clock.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    pub call: u64,
    /// Of the answer, or of the restart that followed when none came.
    pub end: u64,
    pub op: Op,
    pub answer: Answer,
}

type State = Option<i64>;

/// The state after `op`, if its answer is explained by the state before.
fn apply(state: State, op: Op, answer: Answer) -> Option<State> {
    let (next, right) = match op {
        Op::Get => (state, Answer::Value(state)),
        Op::Set(value) => (Some(value), Answer::Ok),
        Op::Delete => (None, Answer::Count(i64::from(state.is_some()))),
        Op::Increment => {
            let sum = state.unwrap_or(0).checked_add(1)?;
            (Some(sum), Answer::Count(sum))
        }
        // A swap that was told "done" needs the state that it read; one without an answer does nothing otherwise.
        Op::Swap { read, new } if state == read => (Some(new), Answer::Ok),
        Op::Swap { .. } if answer == Answer::Unknown => (state, Answer::Unknown),
        Op::Swap { .. } => return None,
    };
    (answer == Answer::Unknown || answer == right).then_some(next)
}

/// A point of the search: the events before `base` and those in `beyond` are placed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Placed {
    base: usize,
    /// Sorted; all above `base`.
    beyond: Vec<u32>,
    state: State,
}

impl Placed {
    fn with(&self, index: usize, state: State) -> Placed {
        let mut next = Placed { base: self.base, beyond: self.beyond.clone(), state };
        if index == next.base {
            next.base += 1;
            let mut run = 0;
            while next.beyond.get(run).is_some_and(|&i| i as usize == next.base) {
                next.base += 1;
                run += 1;
            }
            next.beyond.drain(..run);
        } else {
            let at = next.beyond.partition_point(|&i| (i as usize) < index);
            next.beyond.insert(at, index as u32);
        }
        next
    }
}

/// Explains a history of one key, or says how far that went.
pub fn check(events: &[Event]) -> Result<(), String> {
    let mut events = events.to_vec();
    events.sort_by_key(|event| event.call);
    let first = Placed { base: 0, beyond: Vec::new(), state: None };
    let mut seen = HashSet::from([first.clone()]);
    let mut stack = vec![first.clone()];
    let mut furthest = first;
    while let Some(placed) = stack.pop() {
        if placed.base == events.len() {
            return Ok(());
        }
        if placed.base > furthest.base {
            furthest = placed.clone();
        }
        for next in successors(&events, &placed) {
            if seen.insert(next.clone()) {
                stack.push(next);
            }
        }
    }
    Err(story(&events, &furthest))
}

/// Every event that may come next is called before any unplaced event has ended.
fn successors(events: &[Event], placed: &Placed) -> Vec<Placed> {
    let unplaced = |from: usize| {
        let beyond = &placed.beyond;
        (from..events.len()).filter(move |i| beyond.binary_search(&(*i as u32)).is_err())
    };
    // Events are sorted by call: once one is called after the earliest end so far, none later can end earlier.
    let mut earliest_end = u64::MAX;
    for index in unplaced(placed.base) {
        if events[index].call > earliest_end {
            break;
        }
        earliest_end = earliest_end.min(events[index].end);
    }
    let mut next = Vec::new();
    for index in unplaced(placed.base) {
        let event = events[index];
        if event.call > earliest_end {
            break;
        }
        if event.answer == Answer::Unknown {
            next.push(placed.with(index, placed.state));
        }
        if let Some(state) = apply(placed.state, event.op, event.answer) {
            next.push(placed.with(index, state));
        }
    }
    next
}

fn story(events: &[Event], furthest: &Placed) -> String {
    let from = furthest.base.saturating_sub(5);
    let mut text = format!(
        "no order explains this key: {} of {} events placed, the state then was {:?}; around there:\n",
        furthest.base,
        events.len(),
        furthest.state
    );
    for (index, event) in events.iter().enumerate().skip(from).take(20) {
        let mark = if index < furthest.base || furthest.beyond.contains(&(index as u32)) { " " } else { ">" };
        text +=
            &format!("{mark} {:>14}..{:<14} {:?} -> {:?}\n", event.call, event.end, event.op, event.answer);
    }
    text
}
