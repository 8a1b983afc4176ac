//! Which command goes to the device next: shares by class, deadlines for commits, bounds for what nobody waits for.
//!
//! Classes share the device by *virtual time* (start-time fair queueing): each command moves its class forward by its cost over the
//! class's share, and the class that is furthest behind goes next. A class that had nothing to do begins where the others are: it
//! saves nothing up.
//!
//! Shares alone order what waits here; what the device has taken, nobody overtakes. So the background has a bound, in device time,
//! on what it has in flight while clients use the device, and the writes of groups a larger one while reads do.
//!
//! Invariants:
//! - Within a class commands leave in the order in which they came. Between classes there is no order: what must follow something is
//!   submitted when that has completed, as the device demands as well.
//! - A class that has something to do gets its share within a bounded time, whatever the others want: deadlines are a loan.
//! - There is always something in flight while anything waits: no bound holds the only command back. So time need not move for
//!   the queue to be emptied.
//! - Nothing here allocates for a command, and a single class in use costs a look at a bit mask.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::cost::Bounds;
use super::{ClassStats, IoPolicy};

/// Who wants a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Clients' reads.
    Read,
    /// Writes and flushes of groups.
    Commit,
    /// Writes of checkpoints.
    Checkpoint,
    /// Reads of extents that are collected, writes of what is kept, deallocations.
    Collect,
    /// What is read again to find damage.
    Scrub,
}

impl Class {
    /// All of them, in the order in which figures of them stand.
    pub const ALL: [Class; 5] = [Class::Read, Class::Commit, Class::Checkpoint, Class::Collect, Class::Scrub];

    const fn bit(self) -> u8 {
        1 << self as u8
    }

    /// Whether nobody waits for it: it has a bound while clients use the device.
    pub(super) const fn is_background(self) -> bool {
        BACKGROUND & self.bit() != 0
    }
}

const BACKGROUND: u8 = Class::Checkpoint.bit() | Class::Collect.bit() | Class::Scrub.bit();

/// The same as a list.
const BACKGROUND_CLASSES: [Class; 3] = [Class::Checkpoint, Class::Collect, Class::Scrub];

/// Parts of the device by class, of those that have something to do.
const SHARES: [u64; 5] = [1_000, 1_000, 200, 200, 50];

/// The share of collection while writers wait for what it frees: it is their work then.
const SHARE_PRESSING: u64 = 1_000;

/// Virtual time is device time for a class of this share.
const SHARE_UNIT: u64 = 1_000;

/// How far a class may be behind, in virtual time: what a bound withheld longer ago is not caught up with.
const LAG_MAX: u64 = 4_000_000;

/// How long after a client's last command the background may have the whole device.
const QUIET_US: u64 = 10_000;

/// How exact the moment of that command need be: other reactors look at it.
const NOTE_INTERVAL_US: u64 = 500;

/// When clients last used a device, through whichever of its queues; what engines do by themselves does not count. Shared by the
/// engines of a node.
#[derive(Debug, Default)]
pub struct Activity {
    last_us: AtomicU64,
}

impl Activity {
    fn note(&self, now_us: u64) {
        // A store for each command would have the cores fight for the line.
        if now_us >= self.last_us.load(Ordering::Relaxed) + NOTE_INTERVAL_US {
            self.last_us.store(now_us, Ordering::Relaxed);
        }
    }

    /// Whether no client has used the device for a while: `now_us` is microseconds on the monotonic clock.
    pub fn is_quiet(&self, now_us: u64) -> bool {
        now_us >= self.last_us.load(Ordering::Relaxed) + QUIET_US
    }
}

/// What a command is to the scheduler, whatever it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) class: Class,
    /// Device time.
    pub(super) cost_ns: u64,
    /// Bytes that it moves.
    pub(super) size: u32,
    /// It goes before everything else.
    pub(super) is_urgent: bool,
    /// No client waits for it, whatever its class: it is part of a group that holds the engine's own records alone.
    pub(super) is_own: bool,
}

impl Ticket {
    /// Whether clients are there while it is.
    const fn is_of_client(self) -> bool {
        !self.class.is_background() && !self.is_own
    }
}

struct Waiting<T> {
    ticket: Ticket,
    since_us: u64,
    item: T,
}

struct Queue<T> {
    waiting: VecDeque<Waiting<T>>,
    /// What the class has had, in virtual time.
    virtual_ns: u64,
    share: u64,
}

/// The command that goes next, until something else is put in or taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pick {
    queue: usize,
    /// It goes although it is not its turn.
    is_loan: bool,
}

/// Commands that wait, and what is in flight of those that went.
pub(super) struct Scheduler<T> {
    policy: IoPolicy,
    bounds: Bounds,
    activity: Arc<Activity>,
    queues: [Queue<T>; 5],
    /// Queues with something in them, by [`Class::bit`].
    waiting: u8,
    /// Where the class that went last was, in virtual time.
    virtual_ns: u64,
    now_us: u64,
    /// Writers wait for what collection frees.
    is_pressing: bool,
    in_flight: [usize; 5],
    in_flight_count: usize,
    /// Device time of what is in flight, by class.
    in_flight_ns: [u64; 5],
    /// Commands of clients that wait or are in flight.
    of_clients: usize,
    stats: [ClassStats; 5],
}

impl<T> Scheduler<T> {
    pub(super) fn new(policy: IoPolicy, bounds: Bounds, activity: Arc<Activity>) -> Scheduler<T> {
        Scheduler {
            policy,
            bounds,
            activity,
            queues: SHARES.map(|share| Queue { waiting: VecDeque::new(), virtual_ns: 0, share }),
            waiting: 0,
            virtual_ns: 0,
            now_us: 0,
            is_pressing: false,
            in_flight: [0; 5],
            in_flight_count: 0,
            in_flight_ns: [0; 5],
            of_clients: 0,
            stats: [ClassStats::default(); 5],
        }
    }

    pub(super) fn bounds(&self) -> &Bounds {
        &self.bounds
    }

    /// Whether it has a bound while clients use the device, so that its commands are better short.
    pub(super) fn is_bounded(&self, class: Class) -> bool {
        let is_awaited = class == Class::Collect && self.is_pressing;
        self.policy == IoPolicy::Shares && class.is_background() && !is_awaited
    }

    /// Says what time it is, in microseconds on the monotonic clock.
    pub(super) fn set_now(&mut self, now_us: u64) {
        self.now_us = now_us;
    }

    /// Says whether writers wait for what collection frees.
    pub(super) fn set_pressing(&mut self, is_pressing: bool) {
        self.is_pressing = is_pressing;
        let share = if is_pressing { SHARE_PRESSING } else { SHARES[Class::Collect as usize] };
        self.queues[Class::Collect as usize].share = share;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// Figures of each class, in the order of [`Class::ALL`].
    pub(super) fn stats(&self) -> [ClassStats; 5] {
        self.stats
    }

    pub(super) fn push(&mut self, ticket: Ticket, item: T) {
        let class = ticket.class as usize;
        let at = if self.policy == IoPolicy::Fifo { 0 } else { class };
        let queue = &mut self.queues[at];
        if queue.waiting.is_empty() {
            self.waiting |= 1 << at;
            queue.virtual_ns = queue.virtual_ns.max(self.virtual_ns);
        }
        queue.waiting.push_back(Waiting { ticket, since_us: self.now_us, item });
        self.stats[class].waiting += 1;
        if ticket.is_of_client() {
            self.of_clients += 1;
            self.activity.note(self.now_us);
        }
    }

    /// Says that a client wants something that no command is there for yet: its write waits for the next group.
    pub(super) fn note_client(&self) {
        self.activity.note(self.now_us);
    }

    /// Which command goes next; `None` when nothing waits, or has to.
    pub(super) fn next(&self) -> Option<Pick> {
        if self.waiting == 0 {
            return None;
        }
        if self.policy == IoPolicy::Fifo {
            return Some(Pick { queue: 0, is_loan: false });
        }
        let commit = self.queues[Class::Commit as usize].waiting.front();
        if commit.is_some_and(|front| front.ticket.is_urgent) {
            return Some(Pick { queue: Class::Commit as usize, is_loan: true });
        }
        if self.in_flight_count >= self.bounds.depth {
            return None;
        }
        let open = self.waiting & !self.held_back();
        if open == 0 {
            return None;
        }
        if let Some(front) = commit
            && open & Class::Commit.bit() != 0
            && self.now_us >= front.since_us + self.bounds.commit_deadline_us
        {
            let ahead = self.queues[Class::Commit as usize].virtual_ns.saturating_sub(self.virtual_ns);
            if ahead <= self.bounds.commit_ns {
                return Some(Pick { queue: Class::Commit as usize, is_loan: true });
            }
        }
        let mut rest = open;
        let mut queue = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        while rest != 0 {
            let other = rest.trailing_zeros() as usize;
            if self.queues[other].virtual_ns < self.queues[queue].virtual_ns {
                queue = other;
            }
            rest &= rest - 1;
        }
        Some(Pick { queue, is_loan: false })
    }

    /// The classes whose next command would go beyond a bound.
    fn held_back(&self) -> u8 {
        let mut held = 0;
        let commit_ns = self.in_flight_ns[Class::Commit as usize];
        if commit_ns > 0
            && self.waiting & Class::Commit.bit() != 0
            && (self.waiting & Class::Read.bit() != 0 || self.in_flight[Class::Read as usize] > 0)
            && self.is_over(Class::Commit, commit_ns, self.bounds.commit_ns)
        {
            held |= Class::Commit.bit();
        }
        if self.waiting & BACKGROUND != 0 && self.is_foreground_active() {
            held |= self.held_back_beside_clients();
        }
        held
    }

    /// The same of the background.
    ///
    /// Those that share a bound take turns at it: while the command of the one that is furthest behind does not fit, none of them
    /// goes. Shorter ones of another class would take the room that it waits for, again and again.
    fn held_back_beside_clients(&self) -> u8 {
        let [_, _, checkpoint_ns, collect_ns, scrub_ns] = self.in_flight_ns;
        let (mut bounded, mut bounded_ns, mut held) = (BACKGROUND, checkpoint_ns + collect_ns + scrub_ns, 0);
        if self.is_pressing {
            // What writers wait for is bounded as their own writes are, and leaves the others their own bound.
            if collect_ns > 0 && self.is_over(Class::Collect, bounded_ns, self.bounds.commit_ns) {
                held |= Class::Collect.bit();
            }
            bounded &= !Class::Collect.bit();
            bounded_ns -= collect_ns;
        }
        if bounded_ns > 0 {
            let waiting =
                BACKGROUND_CLASSES.into_iter().filter(|class| self.waiting & bounded & class.bit() != 0);
            let next = waiting.min_by_key(|class| self.queues[*class as usize].virtual_ns);
            if next.is_some_and(|next| self.is_over(next, bounded_ns, self.bounds.background_ns)) {
                held |= bounded;
            }
        }
        held
    }

    /// Whether the next command of a class would go beyond a bound on what is in flight.
    fn is_over(&self, class: Class, in_flight_ns: u64, bound_ns: u64) -> bool {
        let front = self.queues[class as usize].waiting.front();
        front.is_some_and(|front| in_flight_ns + front.ticket.cost_ns > bound_ns)
    }

    fn is_foreground_active(&self) -> bool {
        self.of_clients > 0 || !self.activity.is_quiet(self.now_us)
    }

    /// The command that [`next`](Scheduler::next) named.
    pub(super) fn front(&self, pick: Pick) -> Option<(Ticket, &T)> {
        self.queues[pick.queue].waiting.front().map(|front| (front.ticket, &front.item))
    }

    fn pop(&mut self, pick: Pick) -> Option<Waiting<T>> {
        let queue = &mut self.queues[pick.queue];
        let waiting = queue.waiting.pop_front()?;
        if queue.waiting.is_empty() {
            self.waiting &= !(1 << pick.queue);
        }
        self.stats[waiting.ticket.class as usize].waiting -= 1;
        Some(waiting)
    }

    /// Takes it out because the device will never do it: it was not its class's turn, and it counts for nothing.
    pub(super) fn refuse(&mut self, pick: Pick) {
        if self.pop(pick).is_some_and(|waiting| waiting.ticket.is_of_client()) {
            self.of_clients -= 1;
        }
    }

    /// Takes it out: the device has it, and it is in flight until [`done`](Scheduler::done).
    pub(super) fn take(&mut self, pick: Pick) -> Option<T> {
        let Waiting { ticket, since_us, item } = self.pop(pick)?;
        let queue = &mut self.queues[pick.queue];
        let start = queue.virtual_ns.max(self.virtual_ns.saturating_sub(LAG_MAX));
        queue.virtual_ns = start + ticket.cost_ns * SHARE_UNIT / queue.share;
        if !pick.is_loan {
            self.virtual_ns = self.virtual_ns.max(start);
        }
        self.in_flight[ticket.class as usize] += 1;
        self.in_flight_count += 1;
        self.in_flight_ns[ticket.class as usize] += ticket.cost_ns;
        let stats = &mut self.stats[ticket.class as usize];
        stats.commands += 1;
        stats.bytes += u64::from(ticket.size);
        stats.wait_us_max = stats.wait_us_max.max(self.now_us.saturating_sub(since_us));
        Some(item)
    }

    /// A command has ended.
    pub(super) fn done(&mut self, ticket: Ticket) {
        self.in_flight[ticket.class as usize] -= 1;
        self.in_flight_count -= 1;
        self.in_flight_ns[ticket.class as usize] -= ticket.cost_ns;
        if ticket.is_of_client() {
            self.of_clients -= 1;
            // One that took long was there all the time.
            self.activity.note(self.now_us);
        }
    }
}

#[cfg(test)]
mod tests;
