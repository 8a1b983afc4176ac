//! What drives differ in: block sizes, several namespaces, one reactor or several; and one image under every engine.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vm_test::engine::Engine;
use vm_test::error::Result;
use vm_test::host::{output, say};
use vm_test::image;
use vm_test::machine::{Machine, Namespace};
use vm_test::node::{GuestNode, HostNode, PORT, check};
use vm_test::vm::Vm;

use crate::case;
use crate::load::{Load, Promise};
use crate::resp::Client;
use crate::rng::Rng;

const DRIVE_SIZE: u64 = 1 << 30;

fn load_for(load: &mut Load, address: std::net::SocketAddr, time: Duration) {
    let stop = AtomicBool::new(false);
    let before = load.coverage.acked;
    load.run(address, &stop, || {
        std::thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
    });
    assert!(load.is_answered(), "a connection broke: {:?}", load.coverage);
    assert!(load.coverage.acked > before + 10, "hardly any load: {:?}", load.coverage);
}

fn client(address: std::net::SocketAddr) -> Client {
    Client::connect(address).expect("a node that is ready can be connected to")
}

fn verify_and_load(load: &mut Load, node: &GuestNode) -> Result<()> {
    load.verify(&mut client(node.address));
    load_for(load, node.address, Duration::from_millis(1_500));
    Ok(())
}

#[test]
fn uring_serves_two_namespaces_of_different_block_sizes() -> Result<()> {
    two_namespaces(Engine::Uring)
}

/// Two nodes, one with one reactor and one with two, each on a namespace of its own of one controller; one after the other
/// where a controller has only one user.
pub fn two_namespaces(engine: Engine) -> Result<()> {
    case(&format!("namespaces-{}", engine.name()), |directory| {
        let namespaces = [512, 4096].map(|block_size| {
            let drive = image::create(directory.join(format!("drive-{block_size}.img")), DRIVE_SIZE);
            drive.map(|drive| Namespace::new(drive).block_size(block_size))
        });
        let namespaces: Vec<Namespace> = namespaces.into_iter().collect::<Result<_>>()?;
        let ports = vec![PORT, PORT + 1];
        let machine = engine.prepare(Machine { ports, ..Machine::with_namespaces(namespaces) })?;
        let vm = Vm::boot(&machine)?;
        engine.take_devices(&vm)?;
        let mut rng = Rng::from_env("namespaces");
        let mut loads =
            [Load::new(&mut rng, Promise::Acknowledged), Load::new(&mut rng, Promise::Acknowledged)];
        let serve = |index: usize, cores: &str| {
            let device = engine.device(&machine, 0, index);
            let serve = format!("--engine {} --device {device} --cores {cores}", engine.name());
            GuestNode::start(&vm, PORT + index as u16, &serve)
        };
        for index in 0..2 {
            vm.run(&format!("basalt format --device {}", engine.device(&machine, 0, index)))?;
        }
        // The second round swaps the reactors: an image does not depend on their number.
        for cores in [["0", "0,1"], ["0,1", "0"]] {
            if engine.shares_controllers() {
                let nodes = [serve(0, cores[0])?, serve(1, cores[1])?];
                for (node, load) in nodes.iter().zip(&mut loads) {
                    verify_and_load(load, node)?;
                }
                // Whatever was written to the second one meanwhile, the first one has only its own.
                for (node, load) in nodes.into_iter().zip(&mut loads) {
                    load.verify(&mut client(node.address));
                    node.stop()?;
                }
            } else {
                for (index, load) in loads.iter_mut().enumerate() {
                    let node = serve(index, cores[index])?;
                    verify_and_load(load, &node)?;
                    node.stop()?;
                }
            }
        }
        vm.stop()?;
        for (namespace, mut load) in machine.controllers[0].namespaces.iter().zip(loads) {
            check(&engine.program()?, &namespace.image)?;
            let node = HostNode::start(&engine.program()?, &namespace.image)?;
            load.verify(&mut client(node.address));
        }
        Ok(())
    })
}

#[test]
fn an_image_moves_between_host_and_guest_512() -> Result<()> {
    moves_between_host_and_guest(Engine::Uring, 512)
}

#[test]
fn an_image_moves_between_host_and_guest_4096() -> Result<()> {
    moves_between_host_and_guest(Engine::Uring, 4096)
}

/// Made on the host as a file, opened in the guest as a drive, written there, opened on the host again; and the same with an
/// image that was formatted in the guest.
pub fn moves_between_host_and_guest(engine: Engine, block_size: u32) -> Result<()> {
    case(&format!("moves-{}-{block_size}", engine.name()), |directory| {
        let program = engine.program()?;
        let made_on_host = image::create(directory.join("made-on-host.img"), DRIVE_SIZE)?;
        let made_in_guest = image::create(directory.join("made-in-guest.img"), DRIVE_SIZE)?;
        let mut format = std::process::Command::new(&program);
        say(output(format.args(["format", "--device"]).arg(&made_on_host), Duration::from_secs(60))?
            .trim_end());
        let mut rng = Rng::from_env("moves");
        let mut loads =
            [Load::new(&mut rng, Promise::Acknowledged), Load::new(&mut rng, Promise::Acknowledged)];
        let on_host = |image: &Path, load: &mut Load| -> Result<()> {
            check(&program, image)?;
            let node = HostNode::start(&program, image)?;
            load.verify(&mut client(node.address));
            load_for(load, node.address, Duration::from_millis(300));
            // Dropping it kills it: the guest recovers what the host left.
            Ok(())
        };
        on_host(&made_on_host, &mut loads[0])?;

        let namespaces =
            [&made_on_host, &made_in_guest].map(|image| Namespace::new(image).block_size(block_size));
        let machine = Machine { ports: vec![PORT], ..Machine::with_namespaces(namespaces.into()) };
        let machine = engine.prepare(machine)?;
        let vm = Vm::boot(&machine)?;
        engine.take_devices(&vm)?;
        vm.run(&format!("basalt format --device {}", engine.device(&machine, 0, 1)))?;
        for (index, load) in loads.iter_mut().enumerate() {
            let serve = format!("--engine {} --device {}", engine.name(), engine.device(&machine, 0, index));
            let node = GuestNode::start(&vm, PORT, &serve)?;
            load.verify(&mut client(node.address));
            load_for(load, node.address, Duration::from_millis(1_000));
            node.kill9()?;
        }
        vm.stop()?;

        on_host(&made_on_host, &mut loads[0])?;
        on_host(&made_in_guest, &mut loads[1])
    })
}
