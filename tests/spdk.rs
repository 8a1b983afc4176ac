//! The real node on an NVMe controller that it drives through SPDK: nvmf_tgt over TCP on loopback.

#![cfg(test)]
#![cfg(feature = "spdk")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::load::{Load, Promise};
use common::node::run;
use common::nvmf_target::{Backing, Target};
use common::rng::Rng;
use common::tools::tool;
use common::{Node, Options, Reply, call, temp_dir};

const MALLOC: Backing = Backing::Malloc { size_mib: 256, block_size: 512 };

/// A file that a target exports, of zeros.
fn file(directory: &tempfile::TempDir, size: u64) -> std::path::PathBuf {
    let path = directory.path().join("target.bin");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

#[test]
fn serve_format_and_check_take_a_transport_id() {
    let target = Target::start(&[MALLOC]);
    let options = Options::controller(&target.transport_id(0));
    let failure = options.try_start().unwrap_err();
    assert!(failure.stderr.contains("basalt format"), "{failure}");
    let formatted = options.format(&["--label", "loop"]).expect_code(0, "format");
    assert!(formatted.stdout.contains("(spdk)"), "{}", formatted.stdout);
    assert!(formatted.stderr.contains("has a volatile write cache"), "{}", formatted.stderr);
    // What is there now is somebody's: forcing takes the serial number.
    for more in [&[][..], &["--force"], &["--force", "--serial", "BASALT9"]] {
        let refused = options.format(more).expect_code(3, "format of a formatted device");
        assert!(refused.stderr.contains("--force --serial BASALT00000000000000"), "{}", refused.stderr);
    }
    let node = options.clone().arg("--cores").arg("0").start();
    assert!(node.ready_line.contains("spdk"), "{}", node.ready_line);
    let mut client = node.client();
    assert_eq!(call!(client, "SET", "greeting", "hello"), Reply::ok());
    let info = call!(client, "INFO", "device").bytes().expect("INFO is a string");
    let info = String::from_utf8(info).unwrap();
    assert!(info.contains("health_critical_warning:0x00\r\n"), "{info}");
    // Two nodes on one namespace would destroy it.
    let second = options.try_start().unwrap_err();
    assert!(second.stderr.contains("in use by another process"), "{second}");
    node.kill9();
    let node = options.start();
    assert_eq!(call!(node.client(), "GET", "greeting"), Reply::bulk("hello"));
    node.stop();
    options.check().expect_code(0, "check");
    options.format(&["--force", "--serial", "BASALT00000000000000"]).expect_code(0, "a forced format");
}

#[test]
fn a_foreign_file_system_is_found_through_spdk() {
    let directory = temp_dir();
    let path = file(&directory, 64 << 20);
    let mut mkfs = tool("mkfs.ext4");
    mkfs.args(["-q", "-F"]).arg(&path);
    run(mkfs, None).expect_code(0, "mkfs.ext4");
    let before = std::fs::read(&path).unwrap();
    let target = Target::start(&[Backing::File { path: path.clone(), block_size: 512 }]);
    let options = Options::controller(&target.transport_id(0));
    let refused = options.format(&[]).expect_code(3, "format of an ext4 file system");
    assert!(refused.stderr.contains("an ext4 file system"), "{}", refused.stderr);
    assert!(std::fs::read(&path).unwrap() == before, "a refused format changed something");
}

/// One image, whichever engine wrote it.
#[test]
fn an_image_of_spdk_opens_through_io_uring_and_back() {
    let directory = temp_dir();
    let path = file(&directory, 512 << 20);
    let target = Target::start(&[Backing::File { path: path.clone(), block_size: 4096 }]);
    let options = Options::controller(&target.transport_id(0));
    options.format(&[]).expect_code(0, "format");
    let large = "x".repeat(1 << 20);
    let node = options.start();
    let mut client = node.client();
    for (key, value) in [("small", "of spdk"), ("large", &large)] {
        assert_eq!(call!(client, "SET", key, value), Reply::ok());
    }
    node.stop();
    drop(target);
    let node = Options::new(&path).engine("uring").start();
    let mut client = node.client();
    assert_eq!(call!(client, "GET", "small"), Reply::bulk("of spdk"));
    assert!(call!(client, "GET", "large") == Reply::bulk(&large));
    assert_eq!(call!(client, "SET", "small", "of uring"), Reply::ok());
    node.stop();
    let target = Target::start(&[Backing::File { path, block_size: 4096 }]);
    let options = Options::controller(&target.transport_id(0));
    options.check().expect_code(0, "check");
    let node = options.start();
    assert_eq!(call!(node.client(), "GET", "small"), Reply::bulk("of uring"));
    node.stop();
}

#[test]
fn redis_benchmark_runs_on_memory_of_the_target() {
    redis_benchmark(MALLOC);
}

#[test]
fn redis_benchmark_runs_on_a_file_of_the_target() {
    let directory = temp_dir();
    redis_benchmark(Backing::File { path: file(&directory, 256 << 20), block_size: 4096 });
}

fn redis_benchmark(backing: Backing) {
    let target = Target::start(&[backing]);
    let options = Options::controller(&target.transport_id(0));
    options.format(&[]).expect_code(0, "format");
    let node = options.start();
    let mut benchmark = tool("redis-benchmark");
    let port = node.port().to_string();
    benchmark.args([
        "-p",
        &port,
        "-t",
        "set,get,incr",
        "-n",
        "3000",
        "-r",
        "1000",
        "-c",
        "32",
        "-P",
        "4",
        "-q",
    ]);
    let ended = run(benchmark, None).expect_code(0, "redis-benchmark");
    // A node that answers errors is served as gladly: what was written must be there.
    assert!(ended.stdout.contains("SET") && ended.stdout.contains("GET"), "{}", ended.stdout);
    let count = call!(node.client(), "DBSIZE");
    assert!(matches!(count, Reply::Int(900..)), "{count:?}");
    node.stop();
    options.check().expect_code(0, "check");
}

/// An idle node on SPDK does not burn a core unless cores were given to it.
#[test]
fn an_idle_node_sleeps() {
    let target = Target::start(&[MALLOC]);
    let options = Options::controller(&target.transport_id(0));
    options.format(&[]).expect_code(0, "format");
    let node = options.start();
    let busy = cpu_of_two_idle_seconds(&node);
    assert!(busy < Duration::from_millis(500), "{busy:?} of processor time in two idle seconds");
    node.stop();
}

fn cpu_of_two_idle_seconds(node: &Node) -> Duration {
    let before = node.cpu_time();
    std::thread::sleep(Duration::from_secs(2));
    node.cpu_time() - before
}

/// The target is killed under a running node, and started again on the same file: what was acknowledged is there, what was
/// not is an error, and nothing in between.
#[test]
fn a_target_that_dies_under_load_loses_nothing_acknowledged() {
    let directory = temp_dir();
    let path = file(&directory, 1 << 30);
    let mut target = Target::start(&[Backing::File { path, block_size: 4096 }]);
    let options = Options::controller(&target.transport_id(0));
    options.format(&[]).expect_code(0, "format");
    let mut load = Load::new(&mut Rng::from_env("target"), Promise::Acknowledged);
    load.device_may_fail = true;
    // The load knows of no other keys.
    let remove_early = |node: &Node| assert!(!call!(node.client(), "DEL", "early").is_error());
    for _ in 0..2 {
        let node = options.start();
        remove_early(&node);
        load.verify(&mut node.client());
        assert_eq!(call!(node.client(), "SET", "early", "value"), Reply::ok());
        node.stop();
        // Nothing is in its cache.
        let node = options.start();
        let stop = AtomicBool::new(false);
        let mut read = Reply::Nil;
        load.run(node.address, &stop, || {
            std::thread::sleep(Duration::from_millis(300));
            target.kill();
            std::thread::sleep(Duration::from_millis(200));
            target.restart();
            let begun = Instant::now();
            while !node.stderr().contains("back after") && begun.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(50));
            }
            read = call!(node.client(), "GET", "early");
            stop.store(true, Ordering::Relaxed);
        });
        load.note_kill();
        let said = node.stderr();
        assert!(said.contains("resetting the controller") && said.contains("back after"), "{said}");
        assert_eq!(read, Reply::bulk("value"), "reads go on\n{said}");
        node.kill9();
    }
    let node = options.start();
    remove_early(&node);
    load.verify(&mut node.client());
    node.stop();
    options.check().expect_code(0, "check");
    let seen = &load.coverage;
    println!("{seen:?}");
    assert!(seen.acked > 10, "hardly any load: {seen:?}");
}
