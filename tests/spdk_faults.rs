//! The real node when what is behind its NVMe controller fails: single errors, errors that stay, connections that end under
//! load, a namespace that is taken away. The target's own error device and its listener are the means.

#![cfg(test)]
#![cfg(feature = "spdk")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::load::{Load, Promise};
use common::nvmf_target::{Backing, Target};
use common::{Client, Node, Options, Reply, Rng, call, wait_until};

const FAULTY: Backing = Backing::Faulty { size_mib: 256, block_size: 4096 };

fn formatted(target: &Target) -> Options {
    let options = Options::controller(&target.transport_id(0));
    options.format(&[]).expect_code(0, "format");
    options
}

/// With one reactor: another one would hear of a failure only by failing itself.
fn formatted_for_one(target: &Target) -> Options {
    formatted(target).arg("--cores").arg("0")
}

fn set(client: &mut Client, number: u64) -> Reply {
    call!(client, "SET", format!("key:{number}"), number.to_string())
}

#[track_caller]
fn expect_all(client: &mut Client, numbers: impl IntoIterator<Item = u64>) {
    for number in numbers {
        assert_eq!(call!(client, "GET", format!("key:{number}")), Reply::bulk(number.to_string()));
    }
}

#[track_caller]
fn expect_error(reply: &Reply, prefix: &str) {
    assert!(matches!(reply, Reply::Error(text) if text.starts_with(prefix)), "{reply:?} is no {prefix}");
}

fn figure(node: &Node, name: &str) -> u64 {
    let info = call!(node.client(), "INFO").bytes().expect("INFO is a string");
    let info = String::from_utf8(info).expect("INFO is text");
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or_else(|| panic!("INFO has no {name}:\n{info}"))
}

#[test]
fn after_a_write_fault_writes_go_on_in_another_extent() {
    let target = Target::start(&[FAULTY]);
    let options = formatted(&target);
    let node = options.start();
    let mut client = node.client();
    for number in 0..20 {
        assert_eq!(set(&mut client, number), Reply::ok());
    }
    assert_eq!(figure(&node, "extents_left"), 0);
    for fault in 0..3 {
        target.inject_failures(0, "write", 1);
        // The client hears nothing of it.
        for number in 20 + fault * 20..40 + fault * 20 {
            assert_eq!(set(&mut client, number), Reply::ok());
        }
        assert_eq!(figure(&node, "extents_left"), fault + 1, "{}", node.stderr());
    }
    expect_all(&mut client, 0..80);
    node.kill9();
    let node = options.start();
    expect_all(&mut node.client(), 0..80);
    node.stop();
    options.check().expect_code(0, "check");
}

#[test]
fn when_every_write_fails_reads_go_on_and_nothing_more_is_acknowledged() {
    let target = Target::start(&[FAULTY]);
    let options = formatted_for_one(&target);
    let node = options.start();
    let mut client = node.client();
    for number in 0..20 {
        assert_eq!(set(&mut client, number), Reply::ok());
    }
    target.inject_failures(0, "write", 1_000);
    expect_error(&set(&mut client, 20), "IOERR outcome unknown");
    expect_error(&set(&mut client, 21), "READONLY");
    target.clear_failures(0);
    // For good, until recovery has settled what is there.
    expect_error(&set(&mut client, 22), "READONLY");
    expect_error(&call!(client, "GET", "key:20"), "IOERR outcome unknown");
    expect_all(&mut client, 0..20);
    node.kill9();
    let node = options.start();
    let mut client = node.client();
    expect_all(&mut client, 0..20);
    assert_eq!(call!(client, "GET", "key:21"), Reply::Nil);
    let unknown = call!(client, "GET", "key:20");
    assert!(unknown == Reply::Nil || unknown == Reply::bulk("20"), "{unknown:?}");
    assert_eq!(set(&mut client, 23), Reply::ok());
    node.stop();
    options.check().expect_code(0, "check");
}

#[test]
fn after_a_failed_flush_nothing_more_is_acknowledged() {
    let target = Target::start(&[FAULTY]);
    let options = formatted_for_one(&target);
    let node = options.start();
    let mut client = node.client();
    for number in 0..20 {
        assert_eq!(set(&mut client, number), Reply::ok());
    }
    target.inject_failures(0, "flush", 1);
    expect_error(&set(&mut client, 20), "IOERR outcome unknown");
    // The device would flush again, and what the failed one lost would stay lost.
    for number in 21..30 {
        expect_error(&set(&mut client, number), "READONLY");
    }
    expect_all(&mut client, 0..20);
    node.kill9();
    let node = options.start();
    let mut client = node.client();
    expect_all(&mut client, 0..20);
    for number in 21..30 {
        assert_eq!(call!(client, "GET", format!("key:{number}")), Reply::Nil);
    }
    node.stop();
}

#[test]
fn an_unrecovered_read_is_tried_again_then_an_error_and_never_nil() {
    let target = Target::start(&[FAULTY]);
    let options = formatted(&target);
    let node = options.start();
    let mut client = node.client();
    for number in 1..=3 {
        assert_eq!(set(&mut client, number), Reply::ok());
    }
    node.stop();
    // Nothing is in its cache.
    let node = options.start();
    let mut client = node.client();
    target.inject_failures(0, "read", 1);
    expect_all(&mut client, [1]);
    target.inject_failures(0, "read", 1_000);
    expect_error(&call!(client, "GET", "key:2"), "IOERR");
    expect_error(&call!(client, "INCR", "key:3"), "IOERR");
    // Neither writes nor what is cached or not there need the medium.
    assert_eq!(set(&mut client, 4), Reply::ok());
    assert_eq!(call!(client, "GET", "absent"), Reply::Nil);
    expect_all(&mut client, [1]);
    target.clear_failures(0);
    expect_all(&mut client, 1..=4);
    node.stop();
}

/// Every connection of the controller ends, under load and again and again; whatever was in flight settles to one outcome.
#[test]
fn connections_that_end_under_load_lose_nothing_acknowledged() {
    let target = Target::start(&[Backing::Malloc { size_mib: 1024, block_size: 4096 }]);
    let options = formatted(&target);
    let mut load = Load::new(&mut Rng::from_env("connections"), Promise::Acknowledged);
    load.device_may_fail = true;
    for _ in 0..4 {
        let node = options.start();
        load.verify(&mut node.client());
        let stop = AtomicBool::new(false);
        load.run(node.address, &stop, || {
            std::thread::sleep(Duration::from_millis(300));
            target.drop_connections(0);
            std::thread::sleep(Duration::from_millis(700));
            stop.store(true, Ordering::Relaxed);
        });
        load.note_kill();
        let said = node.stderr();
        assert!(said.contains("resetting the controller") && said.contains("back after"), "{said}");
        node.kill9();
    }
    let node = options.start();
    load.verify(&mut node.client());
    node.stop();
    options.check().expect_code(0, "check after the run");
    let seen = &load.coverage;
    println!("{seen:?}");
    assert!(seen.acked > 80 && seen.kills_with_pending > 0, "no load when a connection ended: {seen:?}");
}

#[test]
fn a_namespace_that_is_taken_away_under_load_is_an_error_and_no_crash() {
    let target = Target::start(&[FAULTY]);
    let options = formatted_for_one(&target);
    let node = options.start();
    let mut client = node.client();
    for number in 0..200 {
        assert_eq!(set(&mut client, number), Reply::ok());
    }
    node.stop();
    // Nothing is in its cache.
    let mut node = options.start();
    let mut client = node.client();
    let mut number = 200;
    target.remove_namespace(0);
    wait_until("a write fails", 60, || {
        number += 1;
        let reply = set(&mut client, number);
        assert!(reply == Reply::ok() || reply.is_error(), "{reply:?}");
        reply.is_error()
    });
    expect_error(&set(&mut client, number + 1), "READONLY");
    expect_error(&call!(client, "GET", "key:1"), "IOERR");
    assert_eq!(call!(client, "PING"), Reply::Simple("PONG".into()));
    assert!(node.is_running());
    node.kill9();
}
