//! Connections over a fake node: order, barriers, bounds, transactions, endings.

#![expect(clippy::unwrap_used, reason = "the helpers of tests fail by panicking")]

mod resp_fake;

use basalt::limits::{REPLY_BUFFER_SIZE_MAX, REPLY_SLOTS_MAX};
use basalt::net::Request;
use bytes::Bytes;
use resp_fake::*;

fn lines(texts: &[&str]) -> Vec<u8> {
    texts.iter().flat_map(|text| line(text)).collect()
}

#[test]
fn replies_leave_in_order_whatever_order_answers_come_in() {
    let (mut fake, mut connection) = (Fake { deferred: true, ..Fake::default() }, connection());
    assert_eq!(send(&mut connection, &mut fake, &lines(&["SET a 1", "PING", "INCR a", "GET a"])), "");
    assert_eq!(fake.pending.len(), 3, "single keys start without waiting");
    fake.deliver(&mut connection, 2);
    assert_eq!(connection.output(), b"");
    fake.deliver(&mut connection, 0);
    assert_eq!(connection.output(), b"+OK\r\n+PONG\r\n");
    fake.deliver(&mut connection, 0);
    assert_eq!(connection.output(), b"+OK\r\n+PONG\r\n:2\r\n$1\r\n2\r\n");
}

#[test]
fn after_a_batch_nothing_starts_until_its_keys_are_held() {
    let (mut fake, mut connection) = (Fake { deferred: true, ..Fake::default() }, connection());
    send(&mut connection, &mut fake, &lines(&["SET a 1", "MSET a 2 b 3", "GET a", "GET b"]));
    assert_eq!(fake.started.len(), 2, "the batch starts beside earlier singles; the rest waits");
    assert!(!connection.wants_input());
    let slot = fake.pending[1].0;
    connection.locked(slot);
    connection.advance(&mut fake);
    assert_eq!(fake.started.len(), 4);
    for _ in 0..4 {
        fake.deliver(&mut connection, 0);
    }
    assert_eq!(connection.output(), b"+OK\r\n+OK\r\n$1\r\n2\r\n$1\r\n3\r\n");
}

#[test]
fn a_batch_that_completes_lets_the_rest_start() {
    let (mut fake, mut connection) = (Fake { deferred: true, ..Fake::default() }, connection());
    send(&mut connection, &mut fake, &lines(&["MSET a 2 b 3", "GET a"]));
    assert_eq!(fake.started.len(), 1);
    fake.deliver(&mut connection, 0);
    assert_eq!(fake.started.len(), 2);
}

#[test]
fn a_global_request_runs_alone() {
    let (mut fake, mut connection) = (Fake { deferred: true, ..Fake::default() }, connection());
    send(&mut connection, &mut fake, &lines(&["SET a 1", "SET b 1", "DBSIZE", "SET c 1"]));
    assert_eq!(fake.started.len(), 2);
    fake.deliver(&mut connection, 1);
    assert_eq!(fake.started.len(), 2, "one earlier reply is still owed");
    fake.deliver(&mut connection, 0);
    assert_eq!(fake.started.last(), Some(&Request::DbSize));
    connection.advance(&mut fake);
    assert_eq!(fake.started.len(), 3, "nothing starts beside it");
    fake.deliver(&mut connection, 0);
    assert_eq!(fake.started.len(), 4);
    fake.deliver(&mut connection, 0);
    assert_eq!(connection.output(), b"+OK\r\n+OK\r\n:2\r\n+OK\r\n");
}

#[test]
fn a_refused_request_is_kept_and_offered_again() {
    let (mut fake, mut connection) = (Fake { refusals: 2, ..Fake::default() }, connection());
    connection.received(&lines(&["SET a 1", "GET a"]));
    connection.advance(&mut fake);
    assert!(connection.is_refused() && !connection.wants_input() && fake.started.is_empty());
    connection.advance(&mut fake);
    assert!(connection.is_refused() && connection.output().is_empty());
    connection.advance(&mut fake);
    assert!(!connection.is_refused() && connection.wants_input());
    assert_eq!(connection.output(), b"+OK\r\n$1\r\n1\r\n");
}

#[test]
fn reading_stops_while_too_many_replies_are_owed() {
    let (mut fake, mut connection) = (Fake { deferred: true, ..Fake::default() }, connection());
    // A new connection's replies might be long: only a few are asked for until some have been seen.
    connection.received(&line("GET a").repeat(200));
    connection.advance(&mut fake);
    assert!((2..8).contains(&fake.started.len()), "{} reads at once", fake.started.len());
    for _ in 0..200 {
        fake.deliver(&mut connection, 0);
        connection.advance(&mut fake);
    }
    assert_eq!(take_output(&mut connection, &mut fake), b"$-1\r\n".repeat(200));
    fake.started.clear();
    connection.received(&line("GET a").repeat(REPLY_SLOTS_MAX + 10));
    connection.advance(&mut fake);
    assert_eq!(fake.started.len(), REPLY_SLOTS_MAX);
    assert!(!connection.wants_input());
    for _ in 0..REPLY_SLOTS_MAX + 10 {
        fake.deliver(&mut connection, 0);
    }
    assert_eq!(connection.output(), b"$-1\r\n".repeat(REPLY_SLOTS_MAX + 10));
    assert!(connection.wants_input());
}

#[test]
fn a_client_that_never_reads_costs_bounded_memory() {
    let (mut fake, mut connection) = (Fake::default(), connection());
    let value = vec![b'v'; 100_000];
    send(&mut connection, &mut fake, &encode(&[b"SET", b"a", &value]));
    let mut sent = 0;
    for _ in 0..1000 {
        if connection.wants_input() {
            connection.received(&line("GET a").repeat(100));
            sent += 100;
        }
        connection.advance(&mut fake);
    }
    assert!(sent < 1000 && !connection.wants_input(), "{sent} commands taken");
    assert!(connection.size() < 3 * REPLY_BUFFER_SIZE_MAX, "{} bytes", connection.size());
    // And everything comes once it reads.
    let one = 9 + value.len() + 2;
    assert_eq!(take_output(&mut connection, &mut fake).len(), sent * one);
}

#[test]
fn values_under_way_are_bounded() {
    let (mut fake, mut connection) = (Fake { deferred: true, ..Fake::default() }, connection());
    let value = vec![b'v'; 1 << 20];
    for _ in 0..20 {
        if connection.wants_input() {
            connection.received(&encode(&[b"SET", b"a", &value]));
            connection.advance(&mut fake);
        }
    }
    assert_eq!(fake.started.len(), 4);
}

#[test]
fn fewer_large_replies_are_asked_for_at_once() {
    let (mut fake, mut connection) = (Fake::default(), connection());
    send(&mut connection, &mut fake, &encode(&[b"SET", b"a", &vec![b'v'; 1 << 20]]));
    send(&mut connection, &mut fake, &line("GET a"));
    fake.deferred = true;
    fake.started.clear();
    connection.received(&line("GET a").repeat(500));
    connection.advance(&mut fake);
    assert!((2..8).contains(&fake.started.len()), "{} reads at once", fake.started.len());
    // Every one of them comes all the same.
    let mut size = 0;
    while !fake.pending.is_empty() {
        fake.deliver(&mut connection, 0);
        size += take_output(&mut connection, &mut fake).len();
    }
    assert_eq!(size, 500 * (1 + 7 + 2 + (1 << 20) + 2));
}

#[test]
fn an_idle_connection_is_small() {
    let (mut fake, mut connection) = (Fake::default(), connection());
    send(&mut connection, &mut fake, &line("SET a 1").repeat(3000));
    assert!(connection.size() < 2048, "{} bytes", connection.size());
}

#[test]
fn an_oversized_value_is_refused_and_nothing_else_is_lost() {
    let (mut fake, mut connection) = (Fake::default(), connection());
    let long = vec![b'v'; SIZE_MAX as usize + 1];
    let stream = [line("SET a 1"), encode(&[b"SET", b"a", &long]), line("GET a")].concat();
    let mut replies = String::new();
    for piece in stream.chunks(10_000) {
        replies += &send(&mut connection, &mut fake, piece);
        assert!(connection.size() < 100_000, "{} bytes", connection.size());
    }
    assert_eq!(
        replies,
        "+OK\r\n-ERR value of 1048577 bytes is longer than the 1048576 bytes that this node takes in one piece\r\n\
         $1\r\n1\r\n"
    );
}

#[test]
fn a_protocol_error_is_said_after_what_came_before() {
    let (mut fake, mut connection) = (Fake { deferred: true, ..Fake::default() }, connection());
    connection.received(&[line("SET a 1"), b"*1\r\nx\r\n".to_vec(), line("PING")].concat());
    connection.advance(&mut fake);
    assert!(!connection.is_finished());
    fake.deliver(&mut connection, 0);
    assert_eq!(connection.output(), b"+OK\r\n-ERR Protocol error: expected '$', got 'x'\r\n");
    let size = connection.output().len();
    connection.sent(size);
    assert!(connection.is_finished());
}

#[test]
fn quit_flushes_and_ignores_the_rest() {
    let (mut fake, mut connection) = (Fake::default(), connection());
    assert_eq!(send(&mut connection, &mut fake, &lines(&["SET a 1", "QUIT", "SET a 2"])), "+OK\r\n+OK\r\n");
    assert!(connection.is_finished());
    assert_eq!(fake.get("a"), Some(Bytes::from("1")));
}

#[test]
fn a_client_that_ends_its_side_still_gets_its_replies() {
    let (mut fake, mut connection) = (Fake { deferred: true, ..Fake::default() }, connection());
    connection.received(&lines(&["SET a 1", "DBSIZE"]));
    connection.received_end();
    connection.advance(&mut fake);
    fake.deliver(&mut connection, 0);
    fake.deliver(&mut connection, 0);
    assert_eq!(connection.output(), b"+OK\r\n:1\r\n");
    connection.sent(9);
    assert!(connection.is_finished());
}

#[test]
fn transactions_see_watched_changes_and_leave_no_watch_behind() {
    let (mut fake, mut one, mut two) = (Fake::default(), connection(), connection());
    assert_eq!(
        send(&mut one, &mut fake, &lines(&["WATCH a b a", "WATCH a", "MULTI", "SET a 1"])),
        "+OK\r\n+OK\r\n+OK\r\n+QUEUED\r\n"
    );
    assert_eq!(fake.watch_count, 2);
    send(&mut two, &mut fake, &line("SET b 2"));
    assert_eq!(send(&mut one, &mut fake, &line("EXEC")), "*-1\r\n");
    assert_eq!((fake.get("a"), fake.watch_count), (None, 0));
    // Each of these ends the watches.
    for ending in [
        vec!["MULTI", "EXEC"],
        vec!["UNWATCH"],
        vec!["MULTI", "DISCARD"],
        vec!["MULTI", "NOSUCH", "EXEC"],
        vec!["RESET"],
    ] {
        send(&mut one, &mut fake, &line("WATCH a b c"));
        assert_eq!(fake.watch_count, 3);
        send(&mut one, &mut fake, &lines(&ending));
        assert_eq!(fake.watch_count, 0, "{ending:?}");
    }
    send(&mut one, &mut fake, &line("WATCH a"));
    assert_eq!(one.close(), Some(Request::Unwatch { keys: vec![Bytes::from("a")] }));
    assert_eq!(one.close(), None);
}

#[test]
fn a_transaction_refuses_what_it_cannot_hold() {
    let (mut fake, mut connection) = (Fake::default(), connection());
    for command in ["DBSIZE", "SCAN 0", "KEYS *", "FLUSHALL", "SAVE", "SHUTDOWN"] {
        let replies = send(&mut connection, &mut fake, &lines(&["MULTI", "SET a 1", command, "EXEC"]));
        assert!(replies.contains("is not allowed inside a transaction"), "{replies}");
        assert!(
            replies.ends_with("-EXECABORT Transaction discarded because of previous errors.\r\n"),
            "{replies}"
        );
    }
    assert_eq!(fake.get("a"), None);
}

#[test]
fn answers_for_a_closed_connection_are_ignored() {
    let (mut fake, mut connection) = (Fake { deferred: true, ..Fake::default() }, connection());
    send(&mut connection, &mut fake, &lines(&["SET a 1", "GET a"]));
    assert_eq!(connection.close(), None);
    fake.deliver(&mut connection, 0);
    fake.deliver(&mut connection, 0);
    assert!(connection.output().is_empty());
}

#[test]
fn a_whole_session_is_the_same_when_cut_at_every_byte() {
    let session = lines(&[
        "SET a 1",
        "INCR a",
        "MSET b 2 c 3",
        "MGET a b c",
        "WATCH a",
        "MULTI",
        "PING",
        "INCR a",
        "SET a x EX 0",
        "GET b",
        "EXEC",
        "HELLO 3",
        "GET none",
        "NOSUCH x",
        "DBSIZE",
        "APPEND a xyz",
        "QUIT",
    ]);
    let whole = send(&mut connection(), &mut Fake::default(), &session);
    assert!(whole.ends_with(":4\r\n+OK\r\n"), "{whole}");
    for cut in 0..=session.len() {
        let (mut fake, mut connection) = (Fake::default(), connection());
        let replies = send(&mut connection, &mut fake, &session[..cut])
            + &send(&mut connection, &mut fake, &session[cut..]);
        assert_eq!(replies, whole, "cut at {cut}");
    }
    let (mut fake, mut connection) = (Fake::default(), connection());
    let replies: String = session.chunks(1).map(|byte| send(&mut connection, &mut fake, byte)).collect();
    assert_eq!(replies, whole);
}

fn arrays(commands: &[&str]) -> Vec<u8> {
    let parts = |command: &&str| encode(&command.split(' ').map(str::as_bytes).collect::<Vec<_>>());
    commands.iter().flat_map(parts).collect()
}

fn direct() -> Fake {
    Fake { direct: true, ..Fake::default() }
}

#[test]
fn what_is_answered_at_once_is_what_would_have_been_answered() {
    let long = "v".repeat(9_000);
    let session = [
        "SET a 1",
        "GET a",
        "GET none",
        "INCR a",
        "GET a",
        "SET a 5 EX 100",
        "GET a",
        "HELLO 3",
        "GET none",
        "MULTI",
        "SET b 1",
        "GET b",
        "EXEC",
        "GET b",
        "PING",
        &format!("SET c {long}"),
        "GET c",
        "get c",
    ];
    let session = [arrays(&session), arrays(&["GET c"]).repeat(200)].concat();
    let whole = send(&mut connection(), &mut Fake::default(), &session);
    for step in [1, 7, 100, 9_001, session.len()] {
        let (mut fake, mut connection) = (direct(), connection());
        let replies: String =
            session.chunks(step).map(|some| send(&mut connection, &mut fake, some)).collect();
        assert!(replies == whole, "pieces of {step}");
        // A request that comes in pieces is the parser's.
        assert!(step < session.len() || fake.direct_count == 10 + 200, "{} at once", fake.direct_count);
        assert_eq!(connection.take_command_count(), 18 + 200);
    }
}

#[test]
fn nothing_is_answered_at_once_behind_what_is_owed() {
    let (mut fake, mut connection) = (Fake { deferred: true, ..direct() }, connection());
    let input = arrays(&["GET a", "SET a 1", "INCR a", "SET a 5", "GET a", "SET b 1"]);
    assert_eq!(send(&mut connection, &mut fake, &input), "$-1\r\n+OK\r\n");
    assert_eq!((fake.direct_count, fake.started.len()), (2, 4));
    for _ in 0..4 {
        fake.deliver(&mut connection, 0);
    }
    assert_eq!(connection.output(), b":2\r\n+OK\r\n$1\r\n5\r\n+OK\r\n");
    assert_eq!(
        send(&mut connection, &mut fake, &arrays(&["GET b"])),
        ":2\r\n+OK\r\n$1\r\n5\r\n+OK\r\n$1\r\n1\r\n"
    );
}

#[test]
fn long_replies_at_once_are_bounded_and_none_is_lost() {
    for size in [100, 20_000, 64 << 10, 300_000] {
        let (mut fake, mut connection) = (direct(), connection());
        let value = vec![b'v'; size];
        take_output(&mut connection, &mut fake);
        connection.received(&encode(&[b"SET", b"a", &value]));
        connection.advance(&mut fake);
        take_output(&mut connection, &mut fake);
        connection.received(&arrays(&["GET a"]).repeat(500));
        connection.advance(&mut fake);
        assert!(connection.output().len() <= REPLY_BUFFER_SIZE_MAX + size + 16);
        assert!(connection.size() < 3 * REPLY_BUFFER_SIZE_MAX, "{} bytes", connection.size());
        let one = [format!("${size}\r\n").as_bytes(), &value, b"\r\n"].concat();
        assert!(take_output(&mut connection, &mut fake) == one.repeat(500), "values of {size} bytes");
    }
}
