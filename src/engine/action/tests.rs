//! Every action against the states that matter to it, with the replies that Redis 7.0 gives.

use super::*;

const NOW: u64 = 1_700_000_000_000;
const SIZE_MAX: u64 = 100;

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn state(value: &str, expires_at_ms: u64) -> Option<Current> {
    Some(Current { expires_at_ms, size: value.len() as u64, value: Some(bytes(value)), long: None })
}

fn check(action: Action, current: Option<Current>, effect: Option<KeyEffect>, reply: Reply) {
    let shown = format!("{action:?} on {current:?}");
    // An action gets no more than it asked for.
    let seen = current.map(|c| Current { value: c.value.filter(|_| action.need() == Need::Value), ..c });
    let seen = seen.filter(|_| action.need() != Need::Nothing);
    if effect.is_some() {
        assert!(action.is_write(), "{shown}");
    }
    let outcome = action.apply(seen.as_ref(), NOW, SIZE_MAX);
    assert_eq!(outcome, Ok(Outcome { effect, reply }), "{shown}");
}

fn check_error(action: Action, current: Option<Current>, text: &str) {
    let shown = format!("{action:?} on {current:?}");
    let error = action.apply(current.as_ref(), NOW, SIZE_MAX).expect_err(&shown);
    assert_eq!(error.to_string(), text, "{shown}");
}

fn puts(value: &str, expires_at_ms: u64) -> Option<KeyEffect> {
    Some(KeyEffect::Put { value: bytes(value), expires_at_ms })
}

fn bulk(text: &str) -> Reply {
    Reply::Bulk(bytes(text))
}

const DELETES: Option<KeyEffect> = Some(KeyEffect::Delete);

#[test]
fn readers() {
    check(Action::Get, None, None, Reply::Nil);
    check(Action::Get, state("v", 0), None, bulk("v"));
    check(Action::Exists, None, None, Reply::Int(0));
    check(Action::Exists, state("v", 0), None, Reply::Int(1));
    check(Action::Type, None, None, Reply::Simple("none"));
    check(Action::Type, state("v", 0), None, Reply::Simple("string"));
    check(Action::Strlen, None, None, Reply::Int(0));
    check(Action::Strlen, state("four", 0), None, Reply::Int(4));
}

#[test]
fn times_to_live_are_rounded_to_the_nearest_second() {
    use TtlReply::{Milliseconds, Seconds, UnixMilliseconds, UnixSeconds};
    for unit in [Seconds, Milliseconds, UnixSeconds, UnixMilliseconds] {
        check(Action::Ttl(unit), None, None, Reply::Int(-2));
        check(Action::Ttl(unit), state("v", 0), None, Reply::Int(-1));
    }
    for (left, seconds) in [(1, 0), (499, 0), (500, 1), (1499, 1), (1500, 2), (100_000, 100)] {
        let at = NOW + left;
        check(Action::Ttl(Seconds), state("v", at), None, Reply::Int(seconds));
        check(Action::Ttl(Milliseconds), state("v", at), None, Reply::Int(left as i64));
        check(Action::Ttl(UnixSeconds), state("v", at), None, Reply::Int(1_700_000_000 + seconds));
        check(Action::Ttl(UnixMilliseconds), state("v", at), None, Reply::Int(at as i64));
    }
}

fn set(expiry: Expiry, condition: Option<Presence>, reply: SetReply) -> Action {
    Action::Set { value: bytes("new"), expiry, condition, reply }
}

#[test]
fn set_and_its_conditions() {
    use Presence::{Absent, Present};
    let at = NOW + 5;
    let old = || state("old", at);
    check(set(Expiry::Clear, None, SetReply::Ok), old(), puts("new", 0), Reply::Ok);
    check(set(Expiry::Clear, None, SetReply::Ok), None, puts("new", 0), Reply::Ok);
    check(set(Expiry::At(NOW + 9), None, SetReply::Ok), old(), puts("new", NOW + 9), Reply::Ok);
    check(set(Expiry::Keep, None, SetReply::Ok), old(), puts("new", at), Reply::Ok);
    check(set(Expiry::Keep, None, SetReply::Ok), None, puts("new", 0), Reply::Ok);
    check(set(Expiry::Clear, Some(Absent), SetReply::Ok), None, puts("new", 0), Reply::Ok);
    check(set(Expiry::Clear, Some(Absent), SetReply::Ok), old(), None, Reply::Nil);
    check(set(Expiry::Clear, Some(Present), SetReply::Ok), None, None, Reply::Nil);
    check(set(Expiry::Clear, Some(Present), SetReply::Ok), old(), puts("new", 0), Reply::Ok);
    check(set(Expiry::Clear, Some(Absent), SetReply::Flag), None, puts("new", 0), Reply::Int(1));
    check(set(Expiry::Clear, Some(Absent), SetReply::Flag), old(), None, Reply::Int(0));
    check(set(Expiry::Clear, None, SetReply::Old), old(), puts("new", 0), bulk("old"));
    check(set(Expiry::Clear, None, SetReply::Old), None, puts("new", 0), Reply::Nil);
    check(set(Expiry::Clear, Some(Absent), SetReply::Old), old(), None, bulk("old"));
    check(set(Expiry::Clear, Some(Present), SetReply::Old), None, None, Reply::Nil);
}

#[test]
fn what_each_form_of_set_must_see() {
    use Presence::Absent;
    for (action, need) in [
        (set(Expiry::Clear, None, SetReply::Ok), Need::Nothing),
        (set(Expiry::At(1), None, SetReply::Ok), Need::Nothing),
        (set(Expiry::Keep, None, SetReply::Ok), Need::Meta),
        (set(Expiry::Clear, Some(Absent), SetReply::Ok), Need::Meta),
        (set(Expiry::Clear, Some(Absent), SetReply::Flag), Need::Meta),
        (set(Expiry::Clear, None, SetReply::Old), Need::Value),
        (Action::Delete, Need::Meta),
        (Action::Get, Need::Value),
        (Action::Strlen, Need::Length),
    ] {
        assert_eq!(action.need(), need, "{action:?}");
    }
}

#[test]
fn deletes() {
    check(Action::Delete, None, None, Reply::Int(0));
    check(Action::Delete, state("v", 0), DELETES, Reply::Int(1));
    check(Action::GetDelete, None, None, Reply::Nil);
    check(Action::GetDelete, state("v", 0), DELETES, bulk("v"));
}

#[test]
fn get_expire() {
    let at = NOW + 5;
    check(Action::GetExpire(Expiry::At(at)), None, None, Reply::Nil);
    check(Action::GetExpire(Expiry::Keep), state("v", at), None, bulk("v"));
    check(Action::GetExpire(Expiry::Clear), state("v", at), puts("v", 0), bulk("v"));
    check(Action::GetExpire(Expiry::Clear), state("v", 0), None, bulk("v"));
    check(Action::GetExpire(Expiry::At(at)), state("v", 0), puts("v", at), bulk("v"));
    check(Action::GetExpire(Expiry::At(NOW)), state("v", 0), DELETES, bulk("v"));
}

#[test]
fn append() {
    check(Action::Append(bytes("xy")), None, puts("xy", 0), Reply::Int(2));
    check(Action::Append(bytes("")), None, puts("", 0), Reply::Int(0));
    check(Action::Append(bytes("xy")), state("ab", NOW + 5), puts("abxy", NOW + 5), Reply::Int(4));
    let full = "f".repeat(99);
    check(Action::Append(bytes("x")), state(&full, 0), puts(&(full.clone() + "x"), 0), Reply::Int(100));
    check_error(
        Action::Append(bytes("xy")),
        state(&full, 0),
        "ERR value of 101 bytes is longer than the 100 bytes that this node keeps in one value",
    );
}

#[test]
fn increment() {
    check(Action::Increment(1), None, puts("1", 0), Reply::Int(1));
    check(Action::Increment(-3), state("1", NOW + 5), puts("-2", NOW + 5), Reply::Int(-2));
    check(
        Action::Increment(1),
        state("9223372036854775806", 0),
        puts("9223372036854775807", 0),
        Reply::Int(i64::MAX),
    );
    for (old, by) in [("9223372036854775807", 1), ("-9223372036854775808", -1), ("-1", i64::MIN)] {
        check_error(Action::Increment(by), state(old, 0), "ERR increment or decrement would overflow");
    }
    for old in ["", " 1", "1 ", "01", "+1", "-0", "1.0", "x", "9223372036854775808"] {
        check_error(Action::Increment(1), state(old, 0), "ERR value is not an integer or out of range");
    }
}

#[test]
fn increment_float() {
    for (old, by, new) in [
        ("10.50", 0.1, "10.6"),
        ("5.0e3", 2.0e2, "5200"),
        ("3", -3.0, "0"),
        ("-1", 1e-7, "-0.9999999"),
        ("0", -0.0, "0"),
    ] {
        check(Action::IncrementFloat(by), state(old, NOW + 5), puts(new, NOW + 5), bulk(new));
    }
    check(Action::IncrementFloat(1.5), None, puts("1.5", 0), bulk("1.5"));
    for old in ["", " 1", "1 ", "abc", "nan"] {
        check_error(Action::IncrementFloat(1.0), state(old, 0), "ERR value is not a valid float");
    }
    check_error(Action::IncrementFloat(f64::INFINITY), None, "ERR increment would produce NaN or Infinity");
    check_error(Action::IncrementFloat(1.0), state("inf", 0), "ERR increment would produce NaN or Infinity");
}

#[test]
fn expire_under_each_condition() {
    use ExpireWhen::{Always, Earlier, Later, None as Without, Some as With, SomeEarlier, SomeLater};
    let (early, at, late) = (NOW + 100, NOW + 200, NOW + 300);
    for when in [Always, Without, With, Later, Earlier, SomeLater, SomeEarlier] {
        check(Action::Expire { at_ms: at, when }, None, None, Reply::Int(0));
    }
    for (old, at_ms, when, applies) in [
        (0, at, Always, true),
        (at, late, Always, true),
        (0, at, Without, true),
        (at, late, Without, false),
        (0, at, With, false),
        (at, late, With, true),
        (0, at, Later, false),
        (at, late, Later, true),
        (at, at, Later, false),
        (at, early, Later, false),
        (0, at, Earlier, true),
        (at, early, Earlier, true),
        (at, at, Earlier, false),
        (at, late, Earlier, false),
        (0, at, SomeLater, false),
        (at, late, SomeLater, true),
        (0, at, SomeEarlier, false),
        (at, early, SomeEarlier, true),
    ] {
        let (effect, reply) = if applies { (puts("v", at_ms), 1) } else { (None, 0) };
        check(Action::Expire { at_ms, when }, state("v", old), effect, Reply::Int(reply));
    }
    for past in [0, NOW - 1, NOW] {
        check(Action::Expire { at_ms: past, when: Always }, state("v", 0), DELETES, Reply::Int(1));
    }
    check(Action::Expire { at_ms: 0, when: Later }, state("v", at), None, Reply::Int(0));
    check(Action::Persist, None, None, Reply::Int(0));
    check(Action::Persist, state("v", 0), None, Reply::Int(0));
    check(Action::Persist, state("v", at), puts("v", 0), Reply::Int(1));
    assert!(!is_expired(0, NOW) && !is_expired(NOW, NOW) && is_expired(NOW - 1, NOW));
}

#[test]
fn ranges() {
    for (start, end, expected) in [
        (0, -1, "This is a string"),
        (0, 3, "This"),
        (-3, -1, "ing"),
        (-6, -4, "str"),
        (10, 100, "string"),
        (5, 3, ""),
        (-1, -5, ""),
        (-100, 3, "This"),
        (-100, -100, "T"),
        (100, 200, ""),
        (0, i64::MIN, "T"),
        (i64::MIN, i64::MAX, "This is a string"),
    ] {
        check(Action::GetRange { start, end }, state("This is a string", 0), None, bulk(expected));
    }
    check(Action::GetRange { start: 0, end: -1 }, None, None, bulk(""));
    check(Action::GetRange { start: 0, end: 0 }, state("", 0), None, bulk(""));
}

#[test]
fn set_range() {
    let patch = |offset, value: &str| Action::SetRange { offset, value: bytes(value) };
    check(patch(6, "Redis"), state("Hello World", NOW + 5), puts("Hello Redis", NOW + 5), Reply::Int(11));
    check(patch(2, "x"), None, puts("\0\0x", 0), Reply::Int(3));
    check(patch(4, "yz"), state("ab", 0), puts("ab\0\0yz", 0), Reply::Int(6));
    check(patch(u64::MAX, ""), None, None, Reply::Int(0));
    check(patch(0, ""), state("ab", 0), None, Reply::Int(2));
    check(patch(99, "x"), None, puts(&("\0".repeat(99) + "x"), 0), Reply::Int(100));
    check_error(
        patch(100, "x"),
        None,
        "ERR value of 101 bytes is longer than the 100 bytes that this node keeps in one value",
    );
    check_error(
        patch(u64::MAX, "x"),
        state("a", 0),
        "ERR value of 18446744073709551615 bytes is longer than the 100 bytes that this node keeps in one value",
    );
}
