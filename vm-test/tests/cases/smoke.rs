//! The node in a guest, on an NVMe drive of its own, for clients on the host.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vm_test::engine::Engine;
use vm_test::error::Result;
use vm_test::host::output;
use vm_test::image;
use vm_test::machine::{Machine, Namespace};
use vm_test::node::{GuestNode, PORT, check};
use vm_test::vm::Vm;

use crate::case;
use crate::load::{Load, Promise};
use crate::resp::Client;
use crate::rng::Rng;

const LIMIT: Duration = Duration::from_secs(300);

#[test]
fn uring_serves_and_restarts() -> Result<()> {
    serves_and_restarts(Engine::Uring)
}

/// Serve, write from the host, restart the node, restart the guest: everything is still there, and the image is clean.
pub fn serves_and_restarts(engine: Engine) -> Result<()> {
    case(&format!("smoke-{}", engine.name()), |directory| {
        let drive = image::create(directory.join("drive.img"), 1 << 30)?;
        let machine = Machine { ports: vec![PORT], ..Machine::with_namespaces(vec![Namespace::new(&drive)]) };
        let machine = engine.prepare(machine)?;
        let vm = Vm::boot(&machine)?;
        engine.take_devices(&vm)?;
        let device = engine.device(&machine, 0, 0);
        let serve = format!("--engine {} --device {device}", engine.name());
        vm.run(&format!("basalt format --device {device} --label smoke"))?;
        let again = vm.expect(3, &format!("basalt format --device {device}"), LIMIT)?;
        assert!(again.contains("'smoke'"), "a refusal names what was found: {again}");

        let node = GuestNode::start(&vm, PORT, &serve)?;
        assert!(node.ready_line.contains(engine.name()), "{}", node.ready_line);
        let port = node.address.port().to_string();
        let redis_cli =
            |arguments: &[&str]| output(Command::new("redis-cli").args(["-p", &port]).args(arguments), LIMIT);
        assert_eq!(redis_cli(&["SET", "greeting", "hello"])?, "OK\n");
        assert_eq!(redis_cli(&["GET", "greeting"])?, "hello\n");
        assert_eq!(redis_cli(&["DEL", "greeting"])?, "1\n");

        let mut load = Load::new(&mut Rng::from_env("smoke"), Promise::Acknowledged);
        let stop = AtomicBool::new(false);
        load.run(node.address, &stop, || {
            std::thread::sleep(Duration::from_secs(3));
            stop.store(true, Ordering::Relaxed);
        });
        assert!(load.coverage.acked > 50, "hardly any load: {:?}", load.coverage);
        node.stop()?;
        let node = GuestNode::start(&vm, PORT, &serve)?;
        load.verify(&mut Client::connect(node.address).unwrap());
        node.stop()?;
        vm.stop()?;

        let vm = Vm::boot(&machine)?;
        engine.take_devices(&vm)?;
        let node = GuestNode::start(&vm, PORT, &serve)?;
        load.verify(&mut Client::connect(node.address).unwrap());
        node.stop()?;
        vm.stop()?;
        check(&engine.program()?, &drive)
    })
}
