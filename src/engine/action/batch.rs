//! The commands of a batch, run on the states of its keys: a pure function, so that a batch can be decided between
//! holding its keys and logging its effects.
//!
//! Invariants: a command is all or nothing, also when it names a key twice; an error in one command undoes none of the
//! others (as in EXEC); every key has at most one effect, the one that leads from its first state to its last.

use std::collections::BTreeMap;

use super::{Action, Command, Fold, Need, is_expired};
use crate::engine::op::{Current, Key, KeyEffect, OpError, Reply};
use crate::limits::BATCH_VALUES_SIZE_MAX;

/// What a key holds, as `Answer::Locked` gives it: a key whose record cannot be read has an error instead.
pub type KeyState = Result<Option<Current>, OpError>;

/// The keys of a batch, sorted, each once: what `Lock` takes.
pub fn keys_of(commands: &[Command]) -> Vec<Key> {
    let mut keys: Vec<Key> =
        commands.iter().flat_map(|c| c.actions.iter().map(|(key, _)| key.clone())).collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// How much of its keys' states a batch must see.
pub fn need_of(commands: &[Command]) -> Need {
    let needs = commands.iter().flat_map(|c| c.actions.iter().map(|(_, action)| action.need()));
    needs.max().unwrap_or(Need::Nothing)
}

/// Runs a batch: the reply of each command, and what is to be logged, one effect per changed key in the order of
/// their first change. `states` holds every key of the batch and is left as the batch leaves it.
pub fn run_commands(
    commands: Vec<Command>,
    states: &mut BTreeMap<Key, KeyState>,
    now_ms: u64,
    size_max: u64,
) -> (Vec<Reply>, Vec<(Key, KeyEffect)>) {
    let states_size = states.values().map(value_size).sum();
    let (first, order) = (BTreeMap::new(), Vec::new());
    let mut run = Run { states, first, order, states_size, replies_size: 0, now_ms, size_max };
    let replies = commands.into_iter().map(|command| run.command(command)).collect();
    let effects = run.effects();
    (replies, effects)
}

/// Bytes of a value that is in memory.
fn value_size(state: &KeyState) -> u64 {
    match state {
        Ok(Some(Current { value: Some(value), .. })) => value.len() as u64,
        _ => 0,
    }
}

/// What the arguments and the values read come to at most. More is only made by growing values (SETRANGE) out of nothing.
const STATES_SIZE_MAX: u64 = 2 * BATCH_VALUES_SIZE_MAX;

struct Run<'a> {
    states: &'a mut BTreeMap<Key, KeyState>,
    /// Whether a changed key was there before the batch; a key that could not be read counts as there.
    first: BTreeMap<Key, bool>,
    order: Vec<Key>,
    /// Bytes of values in the states now.
    states_size: u64,
    /// Bytes of values in the replies so far.
    replies_size: u64,
    now_ms: u64,
    size_max: u64,
}

impl Run<'_> {
    fn command(&mut self, command: Command) -> Reply {
        let Command { actions, fold } = command;
        if let Fold::Constant(reply) = fold {
            return reply;
        }
        if fold == Fold::AllAbsent {
            for (key, _) in &actions {
                match self.state(key) {
                    Ok(None) => {}
                    Ok(Some(_)) => return Reply::Int(0),
                    Err(error) => return Reply::Error(error),
                }
            }
        }
        let mut undo: Vec<(Key, KeyState)> = Vec::new();
        let states_size = self.states_size;
        let mut replies = Vec::with_capacity(actions.len());
        for (key, action) in actions {
            match self.action(&key, action, &mut undo) {
                Ok(reply) => replies.push(reply),
                Err(error) => {
                    for (key, state) in undo.into_iter().rev() {
                        self.states.insert(key, state);
                    }
                    self.states_size = states_size;
                    return Reply::Error(error);
                }
            }
        }
        for (key, state) in undo {
            self.first.entry(key).or_insert_with_key(|key| {
                self.order.push(key.clone());
                !matches!(state, Ok(None))
            });
        }
        fold_replies(replies, &fold)
    }

    fn action(
        &mut self,
        key: &Key,
        action: Action,
        undo: &mut Vec<(Key, KeyState)>,
    ) -> Result<Reply, OpError> {
        let state = self.state(key);
        let current = match &state {
            Ok(current) => current.as_ref(),
            // What is there does not matter to an action that replaces it.
            Err(_) if action.need() == Need::Nothing => None,
            Err(error) => return Err(error.clone()),
        };
        let outcome = action.apply(current, self.now_ms, self.size_max)?;
        // A value is held once however often it is named; its replies are not.
        if let Reply::Bulk(value) = &outcome.reply {
            let size = self.replies_size + value.len() as u64;
            if size > BATCH_VALUES_SIZE_MAX {
                return Err(OpError::ValuesTooLarge { size_max: BATCH_VALUES_SIZE_MAX });
            }
            self.replies_size = size;
        }
        if let Some(effect) = outcome.effect {
            let next = match effect {
                KeyEffect::Delete => None,
                KeyEffect::Put { value, expires_at_ms } => {
                    Some(Current { expires_at_ms, size: value.len() as u64, value: Some(value), long: None })
                }
                // The same value with another expiry.
                KeyEffect::Long { value, expires_at_ms } => Some(Current {
                    expires_at_ms,
                    size: value.size(),
                    value: current.and_then(|current| current.value.clone()),
                    long: Some(value),
                }),
            };
            let next = Ok(next);
            // The state may be shown as absent because it has expired; what is in memory counts.
            let before = self.states.get(key).map_or(0, value_size);
            let states_size = self.states_size - before + value_size(&next);
            if states_size > STATES_SIZE_MAX {
                return Err(OpError::ValuesTooLarge { size_max: STATES_SIZE_MAX });
            }
            self.states_size = states_size;
            undo.push((key.clone(), state));
            self.states.insert(key.clone(), next);
        }
        Ok(outcome.reply)
    }

    /// A key's state now; a key that the caller did not hand in is absent, and so is an expired one.
    fn state(&self, key: &Key) -> KeyState {
        match self.states.get(key) {
            Some(Ok(Some(current))) if is_expired(current.expires_at_ms, self.now_ms) => Ok(None),
            Some(state) => state.clone(),
            None => Ok(None),
        }
    }

    fn effects(&self) -> Vec<(Key, KeyEffect)> {
        let effect_of = |key: &Key| match self.state(key) {
            Ok(Some(Current { expires_at_ms, long: Some(value), .. })) => {
                Some((key.clone(), KeyEffect::Long { value, expires_at_ms }))
            }
            Ok(Some(Current { expires_at_ms, value: Some(value), .. })) => {
                Some((key.clone(), KeyEffect::Put { value, expires_at_ms }))
            }
            Ok(_) => self.first[key].then(|| (key.clone(), KeyEffect::Delete)),
            Err(_) => None,
        };
        self.order.iter().filter_map(effect_of).collect()
    }
}

fn fold_replies(mut replies: Vec<Reply>, fold: &Fold) -> Reply {
    match fold {
        Fold::One => replies.pop().unwrap_or(Reply::Nil),
        Fold::Array => Reply::Array(replies),
        Fold::Sum => Reply::Int(
            replies.iter().map(|reply| if let Reply::Int(number) = reply { *number } else { 0 }).sum(),
        ),
        Fold::Ok => Reply::Ok,
        Fold::AllAbsent => Reply::Int(1),
        Fold::Constant(reply) => reply.clone(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::{Expiry, SetReply};
    use super::*;

    const NOW: u64 = 1_000_000;

    fn key(name: &str) -> Key {
        Bytes::copy_from_slice(name.as_bytes())
    }

    fn set(value: &str) -> Action {
        Action::Set { value: key(value), expiry: Expiry::Clear, condition: None, reply: SetReply::Ok }
    }

    fn one(name: &str, action: Action) -> Command {
        Command { actions: vec![(key(name), action)], fold: Fold::One }
    }

    fn many(fold: Fold, actions: Vec<(&str, Action)>) -> Command {
        Command { actions: actions.into_iter().map(|(name, action)| (key(name), action)).collect(), fold }
    }

    fn put(name: &str, value: &str) -> (Key, KeyEffect) {
        (key(name), KeyEffect::Put { value: key(value), expires_at_ms: 0 })
    }

    fn present(value: &str) -> KeyState {
        Ok(Some(Current { expires_at_ms: 0, size: value.len() as u64, value: Some(key(value)), long: None }))
    }

    fn run(states: &[(&str, KeyState)], commands: Vec<Command>) -> (Vec<Reply>, Vec<(Key, KeyEffect)>) {
        let mut states = states.iter().map(|(name, state)| (key(name), state.clone())).collect();
        run_commands(commands, &mut states, NOW, 64)
    }

    #[test]
    fn later_commands_see_earlier_ones_and_the_last_state_wins() {
        let (replies, effects) = run(
            &[("a", Ok(None)), ("b", present("7"))],
            vec![
                one("a", set("1")),
                one("a", Action::Increment(1)),
                one("b", Action::Increment(1)),
                one("a", Action::Get),
                many(Fold::Array, vec![("a", Action::Get), ("b", Action::Get), ("c", Action::Get)]),
            ],
        );
        let bulk = |text: &str| Reply::Bulk(key(text));
        assert_eq!(
            replies,
            [
                Reply::Ok,
                Reply::Int(2),
                Reply::Int(8),
                bulk("2"),
                Reply::Array(vec![bulk("2"), bulk("8"), Reply::Nil])
            ]
        );
        assert_eq!(effects, [put("a", "2"), put("b", "8")]);
    }

    #[test]
    fn a_key_that_was_absent_and_ends_absent_has_no_effect() {
        let delete = |name| one(name, Action::Delete);
        let (replies, effects) =
            run(&[("a", Ok(None)), ("b", present("x"))], vec![one("a", set("1")), delete("a"), delete("b")]);
        assert_eq!(replies, [Reply::Ok, Reply::Int(1), Reply::Int(1)]);
        assert_eq!(effects, [(key("b"), KeyEffect::Delete)]);
    }

    #[test]
    fn an_error_undoes_its_command_and_no_other() {
        let long = "x".repeat(65);
        let (replies, effects) = run(
            &[("a", present("old"))],
            vec![
                many(Fold::Ok, vec![("a", set("new")), ("b", set("1")), ("c", set(&long))]),
                one("a", Action::Increment(1)),
                many(Fold::Array, vec![("a", Action::Get), ("b", Action::Get)]),
                one("d", set("2")),
            ],
        );
        assert_eq!(
            replies,
            [
                Reply::Error(OpError::ValueTooLarge { size: 65, size_max: 64 }),
                Reply::Error(OpError::NotAnInteger),
                Reply::Array(vec![Reply::Bulk(key("old")), Reply::Nil]),
                Reply::Ok
            ]
        );
        assert_eq!(effects, [put("d", "2")]);
    }

    #[test]
    fn all_absent_looks_at_the_state_before_itself() {
        let msetnx = |pairs: Vec<(&'static str, &str)>| {
            many(Fold::AllAbsent, pairs.into_iter().map(|(name, value)| (name, set(value))).collect())
        };
        let (replies, effects) = run(&[], vec![msetnx(vec![("a", "1"), ("a", "2"), ("b", "3")])]);
        assert_eq!((replies, effects), (vec![Reply::Int(1)], vec![put("a", "2"), put("b", "3")]));
        let (replies, effects) = run(&[("b", present("x"))], vec![msetnx(vec![("a", "1"), ("b", "3")])]);
        assert_eq!((replies, effects), (vec![Reply::Int(0)], vec![]));
    }

    #[test]
    fn sums_count_a_key_named_twice_as_redis_does() {
        let (replies, effects) = run(
            &[("a", present("x"))],
            vec![
                many(Fold::Sum, vec![("a", Action::Exists), ("a", Action::Exists), ("b", Action::Exists)]),
                many(Fold::Sum, vec![("a", Action::Delete), ("a", Action::Delete)]),
                Command { actions: vec![], fold: Fold::Constant(Reply::Simple("PONG")) },
            ],
        );
        assert_eq!(replies, [Reply::Int(2), Reply::Int(1), Reply::Simple("PONG")]);
        assert_eq!(effects, [(key("a"), KeyEffect::Delete)]);
    }

    #[test]
    fn replies_and_values_made_out_of_nothing_are_bounded() {
        const SIZE: usize = 16 << 20;
        let mut states = BTreeMap::new();
        states.insert(
            key("long"),
            Ok(Some(Current {
                expires_at_ms: 0,
                size: SIZE as u64,
                value: Some(vec![0; SIZE].into()),
                long: None,
            })),
        );
        let (replies, _) =
            run_commands(vec![one("long", Action::Get); 6], &mut states.clone(), NOW, SIZE as u64);
        let refused = |reply: &Reply| matches!(reply, Reply::Error(OpError::ValuesTooLarge { .. }));
        assert_eq!(replies.iter().map(refused).collect::<Vec<_>>(), [false, false, false, false, true, true]);
        let grow = |at: usize| {
            let patch = Action::SetRange { offset: SIZE as u64 - 1, value: key("x") };
            one(&format!("grown:{at}"), patch)
        };
        let commands = (0..20).map(grow).chain([one("long", Action::Delete), grow(20)]).collect();
        let (replies, effects) = run_commands(commands, &mut states, NOW, SIZE as u64);
        assert_eq!(
            replies.iter().filter(|reply| refused(reply)).count(),
            13,
            "7 beside the one that is there"
        );
        assert!(!refused(&replies[21]), "a deleted value makes room");
        assert_eq!(effects.len(), 7 + 1 + 1);
    }

    #[test]
    fn a_damaged_key_fails_readers_and_can_be_replaced() {
        let damaged = OpError::Damaged { detail: "here".into() };
        let (replies, effects) = run(
            &[("a", Err(damaged.clone()))],
            vec![one("a", Action::Get), one("a", set("1")), one("a", Action::Get)],
        );
        assert_eq!(replies, [Reply::Error(damaged), Reply::Ok, Reply::Bulk(key("1"))]);
        assert_eq!(effects, [put("a", "1")]);
    }

    #[test]
    fn a_key_that_expires_within_the_batch_is_absent_to_what_follows() {
        let past =
            Action::Set { value: key("v"), expiry: Expiry::At(1), condition: None, reply: SetReply::Ok };
        let (replies, effects) = run(
            &[("a", Ok(None)), ("b", present("x"))],
            vec![one("a", past.clone()), one("a", Action::Exists), one("b", past)],
        );
        assert_eq!(replies, [Reply::Ok, Reply::Int(0), Reply::Ok]);
        assert_eq!(effects, [(key("b"), KeyEffect::Delete)]);
    }

    #[test]
    fn what_a_batch_asks_of_its_keys() {
        let commands = vec![one("b", set("1")), one("a", Action::Delete), one("b", Action::Exists)];
        assert_eq!(keys_of(&commands), [key("a"), key("b")]);
        assert!(need_of(&commands) < Need::Length);
        assert_eq!(need_of(&[one("a", Action::Get), one("b", Action::Strlen)]), Need::Value);
        assert_eq!(need_of(&[one("b", Action::Strlen), one("c", Action::Exists)]), Need::Length);
    }
}
