//! kill -9 of the real server under concurrent clients, again and again on one image.
//!
//! What this covers: every acknowledged write is there, what was in flight settles to one outcome and stays, no batch is
//! half done, deleted keys stay deleted, counts are exact. What it does not cover: the device's own cache, which survives
//! a killed process; only the simulator and a power cut of a VM lose that.
//!
//! `BASALT_KILLS=300 cargo test --release --test kill9` is the long run; `BASALT_SEED` repeats a run's choices.

#![cfg(test)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::load::{Load, Promise};
use common::{Node, Options, Rng, call, count_from_env, temp_dir};

/// Loads, kills at a random moment, restarts, verifies; every third time also kills the recovery itself.
fn kill_round(options: &Options, load: &mut Load, rng: &mut Rng, node: Node) -> Node {
    let address = node.address;
    let moment = Duration::from_millis(60 + rng.below(700));
    let stop = AtomicBool::new(false);
    load.run(address, &stop, || {
        std::thread::sleep(moment);
        node.kill9();
    });
    load.note_kill();
    if load.coverage.kills % 3 == 1 {
        options.check().expect_code(0, "check of the image that the kill left");
    }
    if load.coverage.kills % 3 == 2 {
        kill_recoveries(options, rng);
    }
    let node = options.start();
    load.verify(&mut node.client());
    node
}

/// Recovery may itself be killed, at any moment and repeatedly, and comes to the same result.
fn kill_recoveries(options: &Options, rng: &mut Rng) {
    for _ in 0..2 {
        let starting = options.spawn().expect("a node can be started");
        std::thread::sleep(Duration::from_millis(rng.below(60)));
        starting.kill9();
    }
}

/// A run under mode `always`, on one image that is small enough for its space to be used again and again.
fn run_always(engine: &'static str, kills: usize) {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("kill9.img")).engine(engine).size("1GiB");
    kill_again_and_again(&options, engine, kills);
}

fn kill_again_and_again(options: &Options, engine: &str, kills: usize) {
    let mut rng = Rng::from_env(engine);
    let mut load = Load::new(&mut rng, Promise::Acknowledged);
    let mut node = options.start();
    for _ in 0..kills {
        node = kill_round(options, &mut load, &mut rng, node);
        // Nothing is written between these: outcomes that settled stay settled.
        if rng.chance(30) {
            node.kill9();
            node = options.start();
            load.verify(&mut node.client());
        }
    }
    node.stop();
    let node = options.start();
    load.verify(&mut node.client());
    node.stop();
    options.check().expect_code(0, "check after the run");
    let seen = &load.coverage;
    println!("{engine}: {seen:?}");
    assert!(seen.acked > 20 * kills, "hardly any load: {seen:?}");
    assert!(seen.kills_with_pending > 0, "no kill met a write in flight: {seen:?}");
    assert!(seen.kills_with_pending_batch > 0, "no kill met a batch in flight: {seen:?}");
    assert!(seen.large_values_verified > 0, "no long value was ever verified: {seen:?}");
    assert!(seen.absent_verified > 0, "no deleted key was ever verified: {seen:?}");
    assert!(seen.pending_that_happened + seen.pending_that_did_not > 0, "no outcome settled: {seen:?}");
}

#[test]
fn always_keeps_every_acknowledged_write_uring() {
    run_always("uring", count_from_env("BASALT_KILLS", 10));
}

#[test]
fn always_keeps_every_acknowledged_write_sync() {
    run_always("sync", count_from_env("BASALT_KILLS", 10).div_ceil(2));
}

#[test]
fn always_keeps_every_acknowledged_write_aio() {
    run_always("aio", count_from_env("BASALT_KILLS", 10).div_ceil(2));
}

#[test]
fn always_keeps_every_acknowledged_write_pool() {
    run_always("pool", count_from_env("BASALT_KILLS", 10).div_ceil(2));
}

/// Over NVMe/TCP on loopback: what a killed node had sent, the target may still do after the next one has connected.
#[cfg(feature = "spdk")]
#[test]
fn always_keeps_every_acknowledged_write_spdk() {
    use common::nvmf_target::{Backing, Target};
    let directory = temp_dir();
    let path = directory.path().join("target.bin");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(4 << 30).unwrap();
    let target = Target::start(&[Backing::File { path, block_size: 4096 }]);
    let options = Options::controller(&target.transport_id(0));
    options.format(&[]).expect_code(0, "format");
    kill_again_and_again(&options, "spdk", count_from_env("BASALT_KILLS", 10).div_ceil(2));
}

/// Under the other modes a kill may lose what was acknowledged within the window, and nothing before it; `close` ends the
/// window in quiet. What a kill leaves is never half of a batch.
fn run_window(mode: &str, close: impl Fn(&Node)) {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("window.img")).durability(mode).size("1GiB");
    let mut rng = Rng::from_env(mode);
    let mut load = Load::new(&mut rng, Promise::Window);
    for kill in 0..count_from_env("BASALT_KILLS", 4).min(20) {
        let node = options.start();
        load.verify(&mut node.client());
        let address = node.address;
        let stop = AtomicBool::new(false);
        load.run(address, &stop, || {
            std::thread::sleep(Duration::from_millis(100 + rng.below(300)));
            stop.store(true, Ordering::Relaxed);
        });
        close(&node);
        load.forget_window();
        // Every other kill falls into the quiet after the window: then nothing at all may be missing.
        if kill % 2 == 0 {
            node.kill9();
            load.coverage.kills += 1;
        } else {
            let stop = AtomicBool::new(false);
            load.run(address, &stop, || {
                std::thread::sleep(Duration::from_millis(50 + rng.below(300)));
                node.kill9();
            });
            load.note_kill();
        }
    }
    let node = options.start();
    load.verify(&mut node.client());
    node.stop();
    options.check().expect_code(0, "check after the run");
    let seen = &load.coverage;
    println!("{mode}: {seen:?}");
    assert!(seen.kills >= 2 && seen.kills_with_pending > 0, "no kill under load: {seen:?}");
    assert!(seen.acked > 100, "hardly any load: {seen:?}");
}

fn save(node: &Node) {
    assert_eq!(call!(node.client(), "SAVE"), common::Reply::ok(), "SAVE makes everything so far durable");
}

#[test]
fn interval_loses_nothing_older_than_two_windows() {
    // Far more than two windows: a slow disk must not fail the test, a node that never syncs must.
    run_window("interval=100", |_| std::thread::sleep(Duration::from_millis(1_000)));
}

#[test]
fn interval_loses_nothing_after_save() {
    run_window("interval=60000", save);
}

#[test]
fn bytes_loses_nothing_after_save() {
    run_window("bytes=1048576", save);
}

#[test]
fn never_loses_nothing_after_save() {
    run_window("never", save);
}

/// A clean stop loses nothing in any mode, and the next start finds exactly what was there.
#[test]
fn a_clean_stop_under_load_loses_nothing_that_was_acknowledged() {
    for mode in ["always", "interval=60000", "bytes=1073741824", "never"] {
        let directory = temp_dir();
        let options = Options::new(directory.path().join("stop.img")).durability(mode).size("1GiB");
        let mut rng = Rng::from_env(mode);
        let mut load = Load::new(&mut rng, Promise::Acknowledged);
        for _ in 0..2 {
            let node = options.start();
            load.verify(&mut node.client());
            let address = node.address;
            let stop = AtomicBool::new(false);
            load.run(address, &stop, || {
                std::thread::sleep(Duration::from_millis(200 + rng.below(300)));
                node.stop();
            });
        }
        let node = options.start();
        load.verify(&mut node.client());
        assert!(load.coverage.acked > 50, "{mode}: hardly any load: {:?}", load.coverage);
        node.stop();
        common::node::check(&options.device).expect_code(0, mode);
    }
}
