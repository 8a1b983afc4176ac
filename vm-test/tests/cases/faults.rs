//! Errors of the drive, injected below it while the node serves: typed answers, nothing acknowledged lost, no crash.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use vm_test::engine::Engine;
use vm_test::error::Result;
#[cfg(feature = "spdk")]
use vm_test::host::say;
use vm_test::image;
use vm_test::machine::{Controller, Machine, Namespace, namespace_name};
use vm_test::node::{GuestNode, HostNode, PORT, check};
use vm_test::vm::Vm;

use crate::case;
use crate::load::{Load, Promise};
use crate::resp::{Client, Reply};
use crate::rng::Rng;

const KEY_COUNT: usize = 40;

/// More than a few blocks, so that an error in the middle is one of the value and of nothing else.
const VALUE_SIZE: usize = 40_000;

/// A guest with one formatted drive.
struct Rig {
    engine: Engine,
    vm: Vm,
    /// What the node of this rig is started with.
    serve: String,
}

impl Rig {
    fn new(engine: Engine, directory: &Path, removable: bool) -> Result<Rig> {
        let drive = image::create(directory.join("drive.img"), 1 << 30)?;
        let controllers = vec![Controller { namespaces: vec![Namespace::new(drive)], removable }];
        let machine = engine.prepare(Machine { ports: vec![PORT], controllers, ..Machine::default() })?;
        let vm = Vm::boot(&machine)?;
        engine.take_devices(&vm)?;
        let device = engine.device(&machine, 0, 0);
        vm.run(&format!("basalt format --device {device}"))?;
        Ok(Rig { engine, vm, serve: format!("--engine {} --device {device}", engine.name()) })
    }

    fn start(&self) -> Result<GuestNode<'_>> {
        GuestNode::start(&self.vm, PORT, &self.serve)
    }

    fn image(&self) -> &Path {
        &self.vm.machine().controllers[0].namespaces[0].image
    }
}

fn connect(node: &GuestNode) -> Client {
    Client::connect(node.address).expect("a node that is ready can be connected to")
}

fn key(index: usize) -> String {
    format!("key:{index}")
}

fn values() -> Vec<Vec<u8>> {
    let mut rng = Rng::new(7);
    (0..KEY_COUNT).map(|_| rng.bytes(VALUE_SIZE)).collect()
}

fn set(client: &mut Client, key: &str, value: &[u8]) -> Reply {
    client.call(&[b"SET", key.as_bytes(), value])
}

fn get(client: &mut Client, key: &str) -> Reply {
    client.call(&[b"GET", key.as_bytes()])
}

/// Every read of a block fails, or every operation of a kind.
fn error(operation: &str, sector: Option<u64>) -> Value {
    let mut error = json!({"event": "none", "iotype": operation, "errno": 5});
    if let Some(sector) = sector {
        error["sector"] = sector.into();
    }
    json!([error])
}

#[test]
fn uring_answers_an_unreadable_block_with_an_error_of_its_key() -> Result<()> {
    unreadable_block(Engine::Uring)
}

pub fn unreadable_block(engine: Engine) -> Result<()> {
    case(&format!("unreadable-{}", engine.name()), |directory| {
        let rig = Rig::new(engine, directory, false)?;
        let node = rig.start()?;
        let mut client = connect(&node);
        let values = values();
        for (index, value) in values.iter().enumerate() {
            assert_eq!(set(&mut client, &key(index), value), Reply::ok());
        }
        // Whatever is kept in memory of what was just written is gone after a restart.
        node.stop()?;
        let node = rig.start()?;
        let mut client = connect(&node);
        let victim = 7;
        let place = image::find(rig.image(), &values[victim])?;
        let mut monitor = rig.vm.monitor()?;
        let drive = namespace_name(0, 0);
        monitor.inject(&drive, error("read", Some(place / 512 + 40)))?;

        let verify = |client: &mut Client, is_victim_gone: bool| {
            for (index, value) in values.iter().enumerate() {
                let reply = get(client, &key(index));
                if index == victim && is_victim_gone {
                    // Never "not found", never a value.
                    assert!(reply.error().starts_with("IOERR"), "{}", reply.brief());
                } else {
                    assert_eq!(reply, Reply::bulk(value), "{}", key(index));
                }
            }
            assert_eq!(client.call(&[b"DBSIZE"]), Reply::Int(KEY_COUNT as i64));
        };
        verify(&mut client, true);
        // Its neighbours can be written, and so can it.
        assert_eq!(set(&mut client, "another", b"value"), Reply::ok());
        assert_eq!(client.call(&[b"DEL", b"another"]), Reply::Int(1));
        monitor.heal(&drive)?;
        verify(&mut client, false);
        node.stop()?;
        rig.vm.stop()?;
        check(&rig.engine.program()?, &directory.join("drive.img"))
    })
}

#[test]
fn uring_acknowledges_nothing_after_a_write_fault() -> Result<()> {
    failing(Engine::Uring, "write")
}

#[test]
fn uring_acknowledges_nothing_after_a_flush_error() -> Result<()> {
    failing(Engine::Uring, "flush")
}

/// Writes or flushes fail: what was acknowledged before is there, then and after a restart; nothing else is acknowledged.
pub fn failing(engine: Engine, operation: &str) -> Result<()> {
    case(&format!("failing-{operation}-{}", engine.name()), |directory| {
        let rig = Rig::new(engine, directory, false)?;
        let node = rig.start()?;
        let mut client = connect(&node);
        let values = values();
        let (before, after) = values.split_at(KEY_COUNT / 2);
        for (index, value) in before.iter().enumerate() {
            assert_eq!(set(&mut client, &key(index), value), Reply::ok());
        }
        let mut monitor = rig.vm.monitor()?;
        let drive = namespace_name(0, 0);
        monitor.inject(&drive, error(operation, None))?;
        for (index, value) in after.iter().enumerate() {
            let reply = set(&mut client, &key(before.len() + index), value);
            assert!(reply.is_error(), "acknowledged although every {operation} fails: {}", reply.brief());
        }
        let overwritten = set(&mut client, &key(0), &after[0]);
        assert!(overwritten.is_error(), "{}", overwritten.brief());
        for (index, value) in before.iter().enumerate().skip(1) {
            assert_eq!(get(&mut client, &key(index)), Reply::bulk(value), "reads go on: {}", key(index));
        }
        assert!(node.is_running()?, "{}", node.said()?);
        monitor.heal(&drive)?;
        // A drive that works again changes nothing for this node: what it has not said is durable is unknown.
        let reply = set(&mut client, "after the fault", b"value");
        assert!(reply.is_error(), "acknowledged again without a restart: {}", reply.brief());
        node.kill9()?;

        let node = rig.start()?;
        let mut client = connect(&node);
        for (index, value) in before.iter().enumerate().skip(1) {
            assert_eq!(
                get(&mut client, &key(index)),
                Reply::bulk(value),
                "acknowledged before: {}",
                key(index)
            );
        }
        let settled = get(&mut client, &key(0));
        assert!(
            settled == Reply::bulk(&before[0]) || settled == Reply::bulk(&after[0]),
            "{}",
            settled.brief()
        );
        for (index, value) in after.iter().enumerate() {
            let reply = get(&mut client, &key(before.len() + index));
            assert!(
                reply == Reply::Nil || reply == Reply::bulk(value),
                "neither there nor absent: {}",
                reply.brief()
            );
        }
        assert_eq!(set(&mut client, &key(0), &after[1]), Reply::ok());
        node.stop()?;
        rig.vm.stop()?;
        check(&rig.engine.program()?, &directory.join("drive.img"))
    })
}

/// The kernel resets the controller and issues again what was in flight: no client notices.
#[test]
fn uring_survives_controller_resets_under_load() -> Result<()> {
    case("reset-uring", |directory| {
        let rig = Rig::new(Engine::Uring, directory, false)?;
        let node = rig.start()?;
        let mut load = Load::new(&mut Rng::from_env("reset"), Promise::Acknowledged);
        let stop = AtomicBool::new(false);
        let mut resets = Vec::new();
        load.run(node.address, &stop, || {
            for _ in 0..5 {
                std::thread::sleep(Duration::from_millis(300));
                resets.push(rig.vm.run("echo 1 >/sys/class/nvme/nvme0/reset_controller"));
            }
            stop.store(true, Ordering::Relaxed);
        });
        resets.into_iter().collect::<Result<Vec<String>>>()?;
        assert!(load.is_answered() && load.coverage.acked > 10, "{:?}\n{}", load.coverage, node.said()?);
        load.verify(&mut connect(&node));
        node.kill9()?;
        let node = rig.start()?;
        load.verify(&mut connect(&node));
        node.stop()?;
        rig.vm.stop()
    })
}

/// SPDK's controller is reset twice while clients write: once from outside, which only a command's timeout tells of, and once
/// by the node itself, since the drive stalls and QEMU's controller aborts nothing. What was in flight has one outcome, nothing
/// acknowledged is lost, and clients are served on.
#[cfg(feature = "spdk")]
pub fn resets_under_load(cores: &str) -> Result<()> {
    case(&format!("reset-spdk-{}", cores.replace(',', "-")), |directory| {
        let rig = Rig::new(Engine::Spdk, directory, false)?;
        let serve = format!("{} --cores {cores} --command-timeout 2", rig.serve);
        let node = GuestNode::start(&rig.vm, PORT, &serve)?;
        let mut monitor = rig.vm.monitor()?;
        let drive = namespace_name(0, 0);
        let address = rig.vm.machine().address(0);
        let mut load = Load::new(&mut Rng::from_env("reset"), Promise::Acknowledged);
        let mut acked = 0;
        for (round, cause) in ["from outside", "after a stall"].into_iter().enumerate() {
            let stop = AtomicBool::new(false);
            let mut result = Ok(());
            load.run(node.address, &stop, || {
                result = (|| {
                    std::thread::sleep(Duration::from_secs(1));
                    if round == 0 {
                        rig.vm.run(&format!("echo 1 >/sys/bus/pci/devices/{address}/reset"))?;
                    } else {
                        monitor.stall(&drive)?;
                        node.wait_for("resetting the controller", round + 1)?;
                        monitor.heal(&drive)?;
                    }
                    node.wait_for("back after", round + 1)?;
                    std::thread::sleep(Duration::from_secs(2));
                    Ok(())
                })();
                stop.store(true, Ordering::Relaxed);
            });
            result?;
            assert!(load.is_answered(), "a connection broke in the reset {cause}: {}", node.said()?);
            assert!(
                load.coverage.acked > acked + 10,
                "no load {cause}: {:?}\n{}",
                load.coverage,
                node.said()?
            );
            acked = load.coverage.acked;
            load.verify(&mut connect(&node));
        }
        say(format!("reset-spdk: {acked} writes acknowledged around 2 resets: {}", node.said()?));
        node.kill9()?;
        let node = rig.start()?;
        load.verify(&mut connect(&node));
        node.stop()?;
        rig.vm.stop()?;
        check(&rig.engine.program()?, &directory.join("drive.img"))
    })
}

/// A drive warns of itself while it serves: the node says so in its log, and INFO has the drive's figures.
#[cfg(feature = "spdk")]
pub fn warning(engine: Engine) -> Result<()> {
    case(&format!("warning-{}", engine.name()), |directory| {
        let rig = Rig::new(engine, directory, false)?;
        let node = rig.start()?;
        let mut client = connect(&node);
        let mut health = |name: &str| {
            let info = client.call(&[b"INFO", b"device"]).bytes().expect("INFO is a string");
            let info = String::from_utf8(info).expect("INFO is text");
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_else(|| panic!("no {name} in {info}")).to_owned()
        };
        assert_eq!(health("health_critical_warning"), "0x00");
        // QEMU's own figure, 323 K.
        assert_eq!(health("health_temperature_celsius"), "50");
        let spare_below_threshold = 1;
        let arguments = json!({
            "path": "/machine/peripheral/nvme0",
            "property": "smart_critical_warning",
            "value": spare_below_threshold,
        });
        rig.vm.monitor()?.execute("qom-set", arguments)?;
        node.wait_for("the drive warns of itself", 1)?;
        assert_eq!(health("health_critical_warning"), "0x01");
        assert_eq!(health("health_media_errors"), "0");
        node.stop()?;
        rig.vm.stop()
    })
}

#[test]
fn uring_serves_errors_after_its_drive_was_removed() -> Result<()> {
    removal(Engine::Uring)
}

/// The drive is taken out while clients are served: the node goes on and says so, key by key. The drive has everything.
pub fn removal(engine: Engine) -> Result<()> {
    case(&format!("removal-{}", engine.name()), |directory| {
        let rig = Rig::new(engine, directory, true)?;
        let node = rig.start()?;
        let mut client = connect(&node);
        let values = values();
        for (index, value) in values.iter().enumerate() {
            assert_eq!(set(&mut client, &key(index), value), Reply::ok());
        }
        // What was just written may be answered from memory; after a restart every answer is the drive's.
        node.stop()?;
        let node = rig.start()?;
        let mut client = connect(&node);
        let mut monitor = rig.vm.monitor()?;
        monitor.remove("nvme0")?;
        for index in 0..KEY_COUNT {
            let reply = get(&mut client, &key(index));
            assert!(reply.error().starts_with("IOERR"), "{}: {}", key(index), reply.brief());
        }
        let reply = set(&mut client, "late", b"value");
        assert!(reply.is_error(), "acknowledged without a drive: {}", reply.brief());
        assert_eq!(client.call(&[b"PING"]), Reply::Simple("PONG".into()));
        assert!(node.is_running()?, "{}", node.said()?);
        node.kill9()?;

        rig.vm.stop()?;
        let (program, image) = (engine.program()?, directory.join("drive.img"));
        check(&program, &image)?;
        let node = HostNode::start(&program, &image)?;
        let mut client = Client::connect(node.address).expect("a node that is ready can be connected to");
        for (index, value) in values.iter().enumerate() {
            assert_eq!(get(&mut client, &key(index)), Reply::bulk(value));
        }
        assert_eq!(get(&mut client, "late"), Reply::Nil);
        Ok(())
    })
}
