//! What a node promises, by name. A simulation that finds one broken says which, so that it can be told from any other panic.

/// A promise, or a kind of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    /// Every request is answered, once.
    Answered,
    /// The answer is the one that follows from what the client was told before.
    Answers,
    /// What was acknowledged is there after a crash; in the modes that acknowledge at once, a prefix of it.
    Acknowledged,
    /// A request that was open at a crash happened as a whole or not at all.
    WholeOrNot,
    /// What anybody has seen before a crash is there after it.
    Observed,
    /// Requests of several clients for one key have one order.
    OneOrder,
    /// Scans list every key, and no other.
    Scans,
    /// The keys that are counted are those that are there.
    Counts,
    /// A dump is of one moment.
    Dumps,
    /// A write is refused only where there is no room for it.
    Refusals,
    /// A crash or a failing device is not damage, and a node that met one starts again.
    Undamaged,
    /// A checkpoint says what the log says.
    Checkpoints,
    /// Extents that nothing needs are free.
    Space,
    /// Damage costs errors, never wrong answers, and is reported.
    NoWrongAnswer,
}

impl Promise {
    /// A few words for it.
    pub fn name(self) -> &'static str {
        match self {
            Promise::Answered => "every request is answered",
            Promise::Answers => "answers are right",
            Promise::Acknowledged => "the acknowledged survives",
            Promise::WholeOrNot => "whole or not at all",
            Promise::Observed => "the observed survives",
            Promise::OneOrder => "one order per key",
            Promise::Scans => "scans are complete",
            Promise::Counts => "counts are right",
            Promise::Dumps => "a dump is of one moment",
            Promise::Refusals => "no refusal without need",
            Promise::Undamaged => "a crash is no damage",
            Promise::Checkpoints => "checkpoint and log agree",
            Promise::Space => "no extent is lost",
            Promise::NoWrongAnswer => "damage is never answered wrong",
        }
    }
}

const BEGINNING: &str = "promise broken: ";

/// Ends a simulation over a broken promise.
#[track_caller]
#[expect(clippy::panic, reason = "a broken promise ends the simulation")]
pub fn broken(promise: Promise, what: &str) -> ! {
    panic!("{BEGINNING}{}: {what}", promise.name())
}

/// The name of the promise, and the rest, when a panic says that one is broken.
pub fn parse(message: &str) -> Option<(&str, &str)> {
    message.strip_prefix(BEGINNING)?.split_once(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_promise_is_told_from_other_panics() {
        let caught = std::panic::catch_unwind(|| broken(Promise::Counts, "3: not 4")).unwrap_err();
        let message = caught.downcast_ref::<String>().unwrap();
        assert_eq!(parse(message), Some((Promise::Counts.name(), "3: not 4")));
        assert_eq!(parse("index out of bounds: the len is 3"), None);
    }
}
