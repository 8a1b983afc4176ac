//! The scheduler by itself: shares, deadlines and bounds, and that nothing is lost or stuck whatever comes.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::engine::io_queue::cost::{ASSUMED, DeviceProfile};

/// Commands of a number each, so that their order can be told.
type Numbered = Scheduler<u64>;

fn shares() -> Numbered {
    Scheduler::new(IoPolicy::Shares, Bounds::new(&ASSUMED, 1), Arc::default())
}

fn ticket(class: Class, cost_ns: u64) -> Ticket {
    Ticket { class, cost_ns, size: 4096, is_urgent: false, is_own: false }
}

/// The next command goes, if any may.
fn go(scheduler: &mut Numbered) -> Option<(Ticket, u64)> {
    let pick = scheduler.next()?;
    let (ticket, number) = scheduler.front(pick).map(|(ticket, number)| (ticket, *number)).unwrap();
    assert_eq!(scheduler.take(pick), Some(number));
    Some((ticket, number))
}

/// A device that does one command after the other: what it has done for each class when so much time has passed.
fn serve(scheduler: &mut Numbered, refill: &mut dyn FnMut(&mut Numbered, Class), time_ns: u64) -> [u64; 5] {
    let (mut served, mut now_ns) = ([0; 5], 0);
    while now_ns < time_ns {
        scheduler.set_now(now_ns / 1_000);
        let (ticket, _) = go(scheduler).expect("something waits");
        served[ticket.class as usize] += ticket.cost_ns;
        now_ns += ticket.cost_ns;
        scheduler.done(ticket);
        refill(scheduler, ticket.class);
    }
    served
}

#[test]
fn classes_that_want_everything_get_their_shares() {
    let mut scheduler = shares();
    let mut random = crate::device::sim::random::Random::new(5);
    let mut push = |scheduler: &mut Numbered, class| {
        scheduler.push(ticket(class, 10_000 + random.below(300_000)), 0);
    };
    for class in Class::ALL {
        push(&mut scheduler, class);
        push(&mut scheduler, class);
    }
    let time_ns = 10_000_000_000;
    let served = serve(&mut scheduler, &mut push, time_ns);
    let all: u64 = SHARES.iter().sum();
    for class in Class::ALL {
        let due = time_ns * SHARES[class as usize] / all;
        let got = served[class as usize];
        assert!(got.abs_diff(due) < 10_000_000, "{class:?} had {got} ns of {due}: {served:?}");
    }
}

#[test]
fn a_class_that_was_idle_has_saved_nothing_up() {
    let mut scheduler = shares();
    let mut only = |scheduler: &mut Numbered, _| scheduler.push(ticket(Class::Checkpoint, 100_000), 0);
    only(&mut scheduler, Class::Checkpoint);
    serve(&mut scheduler, &mut only, 1_000_000_000);
    // Scrubbing had nothing of the last second. Now both want everything.
    scheduler.push(ticket(Class::Scrub, 100_000), 0);
    let mut push = |scheduler: &mut Numbered, class| scheduler.push(ticket(class, 100_000), 0);
    let served = serve(&mut scheduler, &mut push, 100_000_000);
    let scrub = served[Class::Scrub as usize];
    assert!((15_000_000..25_000_000).contains(&scrub), "a fifth, and nothing for what is past: {served:?}");

    // Nor anything that would be used up soon: from the first command on it is turn and turn about.
    let mut scheduler = shares();
    only(&mut scheduler, Class::Checkpoint);
    only(&mut scheduler, Class::Checkpoint);
    serve(&mut scheduler, &mut only, 1_000_000_000);
    for number in 0..10 {
        scheduler.push(ticket(Class::Collect, 100_000), number);
    }
    let served = serve(&mut scheduler, &mut only, 1_000_000);
    let collect = served[Class::Collect as usize];
    assert!((400_000..=600_000).contains(&collect), "{served:?}");
}

#[test]
fn what_a_bound_withheld_is_not_caught_up_with() {
    let mut scheduler = shares();
    // Something of the background never ends, so that none of it may go while clients are there.
    let stuck = ticket(Class::Checkpoint, 10_000_000);
    scheduler.push(stuck, 0);
    assert_eq!(go(&mut scheduler), Some((stuck, 0)));
    let mut push = |scheduler: &mut Numbered, class| scheduler.push(ticket(class, 100_000), 0);
    for class in [Class::Read, Class::Collect] {
        push(&mut scheduler, class);
        push(&mut scheduler, class);
    }
    let served = serve(&mut scheduler, &mut push, 1_000_000_000);
    assert_eq!(served[Class::Collect as usize], 0, "{served:?}");
    scheduler.done(stuck);
    let served = serve(&mut scheduler, &mut push, 100_000_000);
    let collect = served[Class::Collect as usize];
    assert!((10_000_000..25_000_000).contains(&collect), "a sixth, and hardly more: {served:?}");
}

#[test]
fn collection_has_the_share_of_those_who_wait_for_it() {
    let mut scheduler = shares();
    let mut push = |scheduler: &mut Numbered, class| scheduler.push(ticket(class, 100_000), 0);
    push(&mut scheduler, Class::Read);
    push(&mut scheduler, Class::Collect);
    for (is_pressing, due) in [(false, 16_666_666_u64), (true, 50_000_000), (false, 16_666_666)] {
        scheduler.set_pressing(is_pressing);
        let got = serve(&mut scheduler, &mut push, 100_000_000)[Class::Collect as usize];
        assert!(got.abs_diff(due) < 3_000_000, "{got} ns of {due}, pressing: {is_pressing}");
    }
}

#[test]
fn collection_that_writers_wait_for_is_bounded_as_their_writes_are() {
    let mut scheduler = shares();
    let (background_ns, commit_ns) = (scheduler.bounds.background_ns, scheduler.bounds.commit_ns);
    scheduler.push(ticket(Class::Read, 1_000), 0);
    for number in 0..100 {
        scheduler.push(ticket(Class::Collect, background_ns / 2), number);
        scheduler.push(ticket(Class::Scrub, background_ns / 2), number);
    }
    while go(&mut scheduler).is_some() {}
    assert!(background_of(&scheduler) <= background_ns && scheduler.is_bounded(Class::Collect));
    scheduler.set_pressing(true);
    let mut went = Vec::new();
    while let Some((ticket, _)) = go(&mut scheduler) {
        went.push(ticket.class);
    }
    // All of the background counts for what writers wait for; what is not awaited has its own bound.
    assert!(background_of(&scheduler) <= commit_ns + background_ns, "{:?}", scheduler.in_flight_ns);
    let of_scrub = scheduler.in_flight_ns[Class::Scrub as usize];
    assert!(of_scrub > 0 && of_scrub <= background_ns, "{:?}", scheduler.in_flight_ns);
    let of_collection = scheduler.in_flight_ns[Class::Collect as usize];
    assert!(of_collection >= commit_ns - background_ns && of_collection <= commit_ns);
    assert!(!scheduler.is_bounded(Class::Collect) && scheduler.is_bounded(Class::Scrub));
    // Nobody waits for it any more: it drains first.
    scheduler.set_pressing(false);
    assert_eq!(go(&mut scheduler), None);
}

/// Device time of the background that is in flight.
fn background_of<T>(scheduler: &Scheduler<T>) -> u64 {
    BACKGROUND_CLASSES.into_iter().map(|class| scheduler.in_flight_ns[class as usize]).sum()
}

/// A device that does as much as it is given, beside a client's read that never ends, for so many commands: what each class got.
/// There is always another command of each, of its cost.
fn serve_deep(scheduler: &mut Numbered, costs: &[(Class, u64)], count: usize) -> [u64; 5] {
    scheduler.push(ticket(Class::Read, 1_000), 0);
    assert_eq!(go(scheduler).unwrap().0.class, Class::Read);
    for (class, cost_ns) in costs {
        (0..2).for_each(|_| scheduler.push(ticket(*class, *cost_ns), 0));
    }
    let (mut flying, mut served) = (VecDeque::new(), [0; 5]);
    for _ in 0..count {
        while let Some((went, _)) = go(scheduler) {
            flying.push_back(went);
            scheduler.push(went, 0);
        }
        let ended: Ticket = flying.pop_front().expect("something is in flight");
        scheduler.done(ended);
        served[ended.class as usize] += ended.cost_ns;
    }
    served
}

#[test]
fn collection_that_writers_wait_for_leaves_the_others_their_share() {
    let mut scheduler = shares();
    scheduler.set_pressing(true);
    let costs = [(Class::Checkpoint, 100_000), (Class::Collect, 1_000_000), (Class::Scrub, 100_000)];
    let served = serve_deep(&mut scheduler, &costs, 20_000);
    let all: u64 = served.iter().sum();
    let shares = [0, 0, SHARES[Class::Checkpoint as usize], SHARE_PRESSING, SHARES[Class::Scrub as usize]];
    for class in BACKGROUND_CLASSES {
        let due = all * shares[class as usize] / shares.iter().sum::<u64>();
        let got = served[class as usize];
        assert!(got > due / 2 && got < due * 2, "{class:?} had {got} ns of {due}: {served:?}");
    }
}

#[test]
fn short_commands_do_not_take_the_room_that_a_long_one_waits_for() {
    let mut scheduler = shares();
    let bound = scheduler.bounds.background_ns;
    let costs = [(Class::Checkpoint, bound / 10), (Class::Scrub, bound - bound / 10 + 1)];
    let served = serve_deep(&mut scheduler, &costs, 20_000);
    let (checkpoint, scrub) = (served[Class::Checkpoint as usize], served[Class::Scrub as usize]);
    assert!(scrub > checkpoint / 8 && scrub < checkpoint / 2, "{served:?}");
}

#[test]
fn groups_of_the_engines_own_are_no_clients() {
    let mut scheduler = shares();
    scheduler.set_now(1_000_000);
    let bound = scheduler.bounds.background_ns;
    for number in 0..8 {
        scheduler.push(ticket(Class::Collect, bound), number);
    }
    let own = |is_urgent| Ticket { is_urgent, is_own: true, ..ticket(Class::Commit, 1_000) };
    scheduler.push(own(false), 100);
    scheduler.push(own(true), 101);
    let mut flying = Vec::new();
    while let Some((ticket, _)) = go(&mut scheduler) {
        flying.push(ticket);
    }
    assert!(scheduler.is_empty(), "the whole device is the background's");
    for ticket in flying {
        scheduler.done(ticket);
    }
    assert!(scheduler.activity.is_quiet(1_000_000));
    // A write that waits for the group under way is a client's, although no command is there for it.
    scheduler.note_client();
    scheduler.push(ticket(Class::Collect, bound), 0);
    scheduler.push(ticket(Class::Collect, bound), 1);
    assert!(go(&mut scheduler).is_some() && go(&mut scheduler).is_none());
}

#[test]
fn what_the_device_refuses_for_good_counts_for_nothing() {
    let mut scheduler = shares();
    for class in [Class::Read, Class::Collect] {
        scheduler.push(ticket(class, 1_000_000), 0);
        let pick = scheduler.next().unwrap();
        scheduler.refuse(pick);
        assert_eq!(scheduler.stats(), [ClassStats::default(); 5]);
        assert_eq!((scheduler.in_flight_count, scheduler.of_clients), (0, 0));
        assert_eq!(scheduler.queues[class as usize].virtual_ns, 0);
    }
    assert!(scheduler.is_empty());
}

#[test]
fn a_commit_that_has_waited_goes_first_but_cannot_starve_reads() {
    let mut scheduler = shares();
    // The group has had its turn, so that it is the reads'.
    scheduler.push(ticket(Class::Commit, 1_000_000), 0);
    let first = go(&mut scheduler).unwrap().0;
    scheduler.done(first);
    scheduler.push(ticket(Class::Commit, 1_000), 1);
    scheduler.push(ticket(Class::Read, 1_000), 2);
    assert_eq!(scheduler.next(), Some(Pick { queue: Class::Read as usize, is_loan: false }));
    scheduler.set_now(scheduler.bounds.commit_deadline_us - 1);
    assert_eq!(scheduler.next().unwrap().queue, Class::Read as usize);
    scheduler.set_now(scheduler.bounds.commit_deadline_us);
    assert_eq!(scheduler.next(), Some(Pick { queue: Class::Commit as usize, is_loan: true }));

    // Writes that are all late: what they are ahead is bounded, and then it is turn and turn about.
    let mut scheduler = shares();
    for number in 0..20_000 {
        scheduler.push(ticket(Class::Commit, 10_000), number);
        scheduler.push(ticket(Class::Read, 10_000), number);
    }
    scheduler.set_now(1_000_000);
    let mut balance = 0_i64;
    for _ in 0..20_000 {
        let (ticket, _) = go(&mut scheduler).unwrap();
        balance += if ticket.class == Class::Commit { 10_000 } else { -10_000 };
        assert!(balance <= scheduler.bounds.commit_ns as i64 + 30_000, "{balance} ns ahead");
        scheduler.done(ticket);
    }
    assert!(balance >= scheduler.bounds.commit_ns as i64 - 30_000, "{balance} ns ahead, no loan");
}

#[test]
fn a_flush_waits_for_nothing_here() {
    let profile = DeviceProfile { read_depth: 10, ..ASSUMED };
    let mut scheduler = Numbered::new(IoPolicy::Shares, Bounds::new(&profile, 1), Arc::<Activity>::default());
    for number in 0..100 {
        scheduler.push(ticket(Class::Collect, 100_000), number);
        scheduler.push(ticket(Class::Read, 100_000), number);
    }
    // As deep as it gets.
    while go(&mut scheduler).is_some() {}
    scheduler
        .push(Ticket { class: Class::Commit, cost_ns: 10_000, size: 0, is_urgent: true, is_own: false }, 777);
    assert_eq!(go(&mut scheduler).map(|(_, number)| number), Some(777));
    // It paid for it, and nobody else did.
    assert!(scheduler.queues[Class::Commit as usize].virtual_ns > 0);
}

#[test]
fn the_background_is_bounded_while_clients_are_there() {
    let mut scheduler = shares();
    let bound = scheduler.bounds.background_ns;
    scheduler.push(ticket(Class::Read, 10_000), 0);
    for class in [Class::Scrub, Class::Collect, Class::Checkpoint] {
        for number in 0..10 {
            scheduler.push(ticket(class, bound / 4), number);
        }
    }
    let mut flying = Vec::new();
    while let Some((ticket, _)) = go(&mut scheduler) {
        flying.push(ticket);
    }
    let background = |flying: &[Ticket]| flying.iter().filter(|one| one.class.is_background()).count();
    assert_eq!((flying.len(), background(&flying)), (5, 4), "a read, and what the bound allows");
    // No time passes, and there is room for one when one has ended.
    scheduler.done(flying.pop().unwrap());
    assert!(go(&mut scheduler).is_some() && go(&mut scheduler).is_none());
    // The last read has ended, and a moment has passed.
    let at = flying.iter().position(|one| one.class == Class::Read).unwrap();
    scheduler.done(flying.remove(at));
    assert!(go(&mut scheduler).is_none(), "the next client may come at once");
    scheduler.set_now(QUIET_US);
    while let Some((ticket, _)) = go(&mut scheduler) {
        flying.push(ticket);
    }
    assert!(scheduler.is_empty(), "the whole device is theirs");
    // One command is always let through, however long it is.
    let mut scheduler = shares();
    scheduler.push(ticket(Class::Read, 10_000), 0);
    scheduler.push(ticket(Class::Checkpoint, 50 * bound), 1);
    scheduler.push(ticket(Class::Checkpoint, 1), 2);
    assert!(go(&mut scheduler).is_some() && go(&mut scheduler).is_some() && go(&mut scheduler).is_none());
}

#[test]
fn clients_of_another_queue_count() {
    let activity = Arc::<Activity>::default();
    let queue = || Numbered::new(IoPolicy::Shares, Bounds::new(&ASSUMED, 2), Arc::clone(&activity));
    let (mut here, mut there) = (queue(), queue());
    for scheduler in [&mut here, &mut there] {
        scheduler.set_now(1_000_000);
    }
    let bound = here.bounds.background_ns;
    for number in 0..9 {
        here.push(ticket(Class::Collect, bound), number);
    }
    assert!(go(&mut here).is_some() && go(&mut here).is_some(), "nobody is there");
    there.push(ticket(Class::Read, 1_000), 0);
    assert!(go(&mut here).is_none());
    here.set_now(1_000_000 + QUIET_US);
    assert!(go(&mut here).is_some());
}

#[test]
fn the_writes_of_groups_are_bounded_while_reads_are_there() {
    let mut scheduler = shares();
    let bound = scheduler.bounds.commit_ns;
    for number in 0..10 {
        scheduler.push(ticket(Class::Commit, bound / 2), number);
    }
    let mut flying = vec![go(&mut scheduler).unwrap().0, go(&mut scheduler).unwrap().0];
    scheduler.push(ticket(Class::Read, 1_000), 0);
    assert_eq!(go(&mut scheduler).map(|(one, _)| one.class), Some(Class::Read));
    assert!(go(&mut scheduler).is_none());
    // Late or not: what it stands behind are others of its kind.
    scheduler.set_now(1_000_000);
    assert!(go(&mut scheduler).is_none());
    scheduler.done(flying.pop().unwrap());
    assert!(go(&mut scheduler).is_some());
    scheduler.done(ticket(Class::Read, 1_000));
    while go(&mut scheduler).is_some() {}
    assert!(scheduler.is_empty());
}

#[test]
fn no_more_is_in_flight_than_the_device_needs() {
    let profile = DeviceProfile { read_depth: 10, ..ASSUMED };
    let mut scheduler = Numbered::new(IoPolicy::Shares, Bounds::new(&profile, 1), Arc::<Activity>::default());
    for number in 0..100 {
        scheduler.push(ticket(Class::Read, 1_000), number);
    }
    let mut count = 0;
    while go(&mut scheduler).is_some() {
        count += 1;
    }
    assert_eq!(count, 20);
    assert_eq!(scheduler.stats()[Class::Read as usize].waiting, 80);
}

#[test]
fn figures_say_what_became_of_each_class() {
    let mut scheduler = shares();
    scheduler.set_now(1_000);
    scheduler.push(ticket(Class::Collect, 1_000), 0);
    scheduler.push(ticket(Class::Read, 1_000), 1);
    scheduler.push(ticket(Class::Read, 1_000), 2);
    scheduler.set_now(1_700);
    let first = go(&mut scheduler).unwrap().0;
    assert_eq!(first.class, Class::Read);
    let of_reads = ClassStats { commands: 1, bytes: 4096, waiting: 1, wait_us_max: 700 };
    assert_eq!(scheduler.stats()[Class::Read as usize], of_reads);
    let of_collection = ClassStats { waiting: 1, ..ClassStats::default() };
    assert_eq!(scheduler.stats()[Class::Collect as usize], of_collection);
    assert_eq!(scheduler.stats()[Class::Scrub as usize], ClassStats::default());
}

#[derive(Debug, Clone)]
enum Step {
    Push { class: usize, cost_ns: u64, is_urgent: bool, is_own: bool },
    Go,
    Done(prop::sample::Index),
    Pass(u64),
    Pressing(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..5_usize, 1..2_000_000_u64, prop::bool::weighted(0.1), any::<bool>())
            .prop_map(|(class, cost_ns, is_urgent, is_own)| Step::Push { class, cost_ns, is_urgent, is_own }),
        6 => Just(Step::Go),
        3 => any::<prop::sample::Index>().prop_map(Step::Done),
        2 => (0..5_000_u64).prop_map(Step::Pass),
        1 => any::<bool>().prop_map(Step::Pressing),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes in which order: nothing is lost, each class keeps its order, something may always go when nothing is in
    /// flight, bounds hold, and what is counted as in flight is.
    #[test]
    fn nothing_is_lost_or_out_of_order_or_stuck(steps in prop::collection::vec(step(), 1..400), fifo: bool) {
        let policy = if fifo { IoPolicy::Fifo } else { IoPolicy::Shares };
        let mut scheduler = Numbered::new(policy, Bounds::new(&ASSUMED, 1), Arc::<Activity>::default());
        let mut waiting: BTreeMap<usize, VecDeque<u64>> = BTreeMap::new();
        let (mut flying, mut next, mut now_us) = (Vec::<Ticket>::new(), 0, 0);
        for step in steps {
            match step {
                Step::Push { class, cost_ns, is_urgent, is_own } => {
                    let class = Class::ALL[class];
                    let (is_urgent, is_own) =
                        (is_urgent && class == Class::Commit, is_own && class == Class::Commit);
                    scheduler.push(Ticket { class, cost_ns, size: 1, is_urgent, is_own }, next);
                    waiting.entry(class as usize).or_default().push_back(next);
                    next += 1;
                }
                Step::Go => {
                    let went = go(&mut scheduler);
                    let anything = waiting.values().any(|queue| !queue.is_empty());
                    prop_assert!(went.is_some() || !anything || !flying.is_empty(), "stuck");
                    if let Some((ticket, number)) = went {
                        let queue = waiting.get_mut(&(ticket.class as usize)).unwrap();
                        prop_assert_eq!(queue.pop_front(), Some(number));
                        if fifo {
                            let oldest = waiting.values().filter_map(|queue| queue.front()).min();
                            prop_assert!(oldest.is_none_or(|oldest| *oldest > number));
                        }
                        let is_active = flying.iter().any(|one| one.is_of_client());
                        let is_bounded = scheduler.is_bounded(ticket.class);
                        let bounds = &scheduler.bounds;
                        let bound = if is_bounded { bounds.background_ns } else { bounds.commit_ns };
                        let shares_it = |one: &&Ticket| {
                            one.class.is_background() && (!is_bounded || scheduler.is_bounded(one.class))
                        };
                        // One of each kind is always let through.
                        let is_first = !flying.iter().any(|one| {
                            one.class.is_background() && scheduler.is_bounded(one.class) == is_bounded
                        });
                        flying.push(ticket);
                        if !fifo && ticket.class.is_background() && !is_first && is_active {
                            let sum: u64 = flying.iter().filter(shares_it).map(|one| one.cost_ns).sum();
                            prop_assert!(sum <= bound);
                        }
                    }
                }
                Step::Done(index) if !flying.is_empty() => {
                    let at = index.index(flying.len());
                    scheduler.done(flying.swap_remove(at));
                }
                Step::Done(_) => {}
                Step::Pass(us) => {
                    now_us += us;
                    scheduler.set_now(now_us);
                }
                Step::Pressing(is_pressing) => scheduler.set_pressing(is_pressing),
            }
            prop_assert_eq!(scheduler.is_empty(), waiting.values().all(VecDeque::is_empty));
            for class in Class::ALL {
                let count = waiting.get(&(class as usize)).map_or(0, VecDeque::len) as u64;
                prop_assert_eq!(scheduler.stats()[class as usize].waiting, count);
                let of_class = flying.iter().filter(|one| one.class == class);
                prop_assert_eq!(scheduler.in_flight[class as usize], of_class.clone().count());
                let ns: u64 = of_class.map(|one| one.cost_ns).sum();
                prop_assert_eq!(scheduler.in_flight_ns[class as usize], ns);
            }
        }
        // Without any time passing, everything goes.
        while !scheduler.is_empty() {
            match go(&mut scheduler) {
                Some((ticket, _)) => flying.push(ticket),
                None => scheduler.done(flying.pop().expect("nothing is in flight and nothing may go")),
            }
        }
        for ticket in flying {
            scheduler.done(ticket);
        }
        prop_assert_eq!((scheduler.in_flight_count, scheduler.of_clients, scheduler.in_flight_ns), (0, 0, [0; 5]));
    }

    /// Over any stretch in which a class always wants something, it gets its share of what the device did, but for a bound.
    #[test]
    fn a_class_with_work_gets_its_share_over_any_stretch(
        costs in prop::collection::vec(1_000..500_000_u64, 50..200),
        wanting in 1..32_u8,
        from in 0..40_usize,
    ) {
        let mut scheduler = shares();
        let wanting: Vec<Class> =
            Class::ALL.into_iter().filter(|class| wanting & class.bit() != 0).collect();
        let (mut costs, costs_max) = (costs.iter().cycle(), *costs.iter().max().unwrap());
        let mut push = |scheduler: &mut Numbered, class| scheduler.push(ticket(class, *costs.next().unwrap()), 0);
        for class in &wanting {
            push(&mut scheduler, *class);
            push(&mut scheduler, *class);
        }
        let (mut served, mut all) = ([0_u64; 5], 0);
        for nth in 0..600 {
            // Everything happens at one moment, so that nothing is late.
            let (ticket, _) = go(&mut scheduler).unwrap();
            scheduler.done(ticket);
            push(&mut scheduler, ticket.class);
            if nth < from {
                continue;
            }
            served[ticket.class as usize] += ticket.cost_ns;
            all += ticket.cost_ns;
            let shares: u64 = wanting.iter().map(|class| SHARES[*class as usize]).sum();
            for class in &wanting {
                let due = all * SHARES[*class as usize] / shares;
                let short = due.saturating_sub(served[*class as usize]);
                // A command of each class, as start-time fair queueing has it.
                let bound = costs_max * (wanting.len() as u64 + 1);
                prop_assert!(short <= bound, "{class:?} is {short} ns short of {due} after {nth}");
            }
        }
    }
}
