//! SPDK on the controllers themselves: what the other cases show over the kernel's block devices must be true here as well.
//! The controllers are bound by `basalt device bind`.

use std::time::Duration;

use vm_test::engine::Engine::Spdk;
use vm_test::engine::wait_for_devices;
use vm_test::error::Result;
use vm_test::image;
use vm_test::machine::{Machine, Namespace};
use vm_test::node::{GuestNode, PORT};
use vm_test::vm::Vm;
use vm_test::write_log::Survivors;

use crate::power_cut::Drive;
use crate::resp::{Client, Reply};
use crate::{case, count_from_env, faults, power_cut, shapes, smoke};

#[test]
fn smoke() -> Result<()> {
    smoke::serves_and_restarts(Spdk)
}

#[test]
fn power_cut() -> Result<()> {
    let cuts = count_from_env("BASALT_POWER_CUTS", 6);
    let drive = Drive { engine: Spdk, block_size: 512, serve: "--cores 0,1" };
    power_cut::loses_nothing("power-cut-spdk", drive, cuts)
}

#[test]
fn power_cut_with_4096_byte_blocks_and_one_reactor() -> Result<()> {
    let cuts = count_from_env("BASALT_POWER_CUTS", 4).div_ceil(2);
    let drive = Drive { engine: Spdk, block_size: 4096, serve: "--cores 0" };
    power_cut::loses_nothing("power-cut-spdk-4096", drive, cuts)
}

#[test]
fn power_cut_of_a_node_that_does_not_flush_is_caught() -> Result<()> {
    power_cut::is_caught("power-cut-spdk-planted", Spdk, "--durability never", Survivors::Flushed)
}

#[test]
fn two_namespaces_of_different_block_sizes() -> Result<()> {
    shapes::two_namespaces(Spdk)
}

/// What a controller is asked, and refused, through each stage of its life: with the kernel, bound, and in use.
#[test]
fn a_controller_is_identified_when_nobody_uses_it() -> Result<()> {
    case("identify-spdk", |directory| {
        let namespaces = [512, 4096].map(|block_size| {
            let drive = image::create(directory.join(format!("drive-{block_size}.img")), 256 << 20);
            drive.map(|drive| Namespace::new(drive).block_size(block_size))
        });
        let namespaces = namespaces.into_iter().collect::<Result<_>>()?;
        let machine = Spdk.prepare(Machine { ports: vec![PORT], ..Machine::with_namespaces(namespaces) })?;
        let vm = Vm::boot(&machine)?;
        wait_for_devices(&vm)?;
        let address = machine.address(0);
        let basalt = |code: i32, arguments: &str| {
            vm.expect(code, &format!("cd /tmp && basalt {arguments}"), Duration::from_secs(300))
        };
        let with_kernel = basalt(1, &format!("serve --device {address}"))?;
        assert!(with_kernel.contains(&format!("basalt device bind {address}")), "{with_kernel}");
        let absent = basalt(1, "serve --device 0000:00:1e.0")?;
        assert!(absent.contains("no PCI device 0000:00:1e.0"), "{absent}");
        assert!(basalt(0, &format!("device identify {address}"))?.contains("from sysfs"));
        Spdk.take_devices(&vm)?;
        let text = basalt(0, &format!("device identify {address}"))?;
        for words in [
            "from SPDK",
            "QEMU NVMe Ctrl",
            "BASALT0",
            "media errors",
            "ns:1 (namespace 1): 256.0 MiB in blocks of 512 bytes",
            "ns:2 (namespace 2): 256.0 MiB in blocks of 4096 bytes",
            "volatile: flushes are needed",
        ] {
            assert!(text.contains(words), "no {words:?} in {text}");
        }
        let unnamed = basalt(1, &format!("format --device {address}"))?;
        assert!(unnamed.contains("say which, with ns:N"), "{unnamed}");
        let device = Spdk.device(&machine, 0, 1);
        basalt(0, &format!("format --device {device}"))?;
        let node = GuestNode::start(&vm, PORT, &format!("--device {device}"))?;
        let mut client = Client::connect(node.address).expect("a node that is ready can be connected to");
        assert_eq!(client.call(&[b"SET", b"key", b"value"]), Reply::ok());
        let busy = basalt(1, &format!("device identify {address}"))?;
        assert!(busy.contains("stop whatever else uses it"), "{busy}");
        basalt(1, &format!("serve --listen 127.0.0.1:7000 --device {device}"))?;
        assert_eq!(client.call(&[b"GET", b"key"]), Reply::bulk(b"value"), "the node was not disturbed");
        node.stop()?;
        assert_eq!(vm.run("ls /tmp | grep -v node- | wc -l")?.trim(), "0", "nothing was made on the way");
        basalt(0, &format!("device unbind {address}"))?;
        wait_for_devices(&vm)?;
        vm.stop()
    })
}

#[test]
fn an_image_moves_between_host_and_guest() -> Result<()> {
    shapes::moves_between_host_and_guest(Spdk, 512)?;
    shapes::moves_between_host_and_guest(Spdk, 4096)
}

#[test]
fn an_unreadable_block_is_an_error_of_its_key() -> Result<()> {
    faults::unreadable_block(Spdk)
}

#[test]
fn nothing_is_acknowledged_after_a_write_fault() -> Result<()> {
    faults::failing(Spdk, "write")
}

#[test]
fn nothing_is_acknowledged_after_a_flush_error() -> Result<()> {
    faults::failing(Spdk, "flush")
}

#[test]
fn controller_resets_under_load() -> Result<()> {
    faults::resets_under_load("0")?;
    faults::resets_under_load("0,1")
}

#[test]
fn errors_after_the_drive_was_removed() -> Result<()> {
    faults::removal(Spdk)
}

#[test]
fn a_drive_that_warns_of_itself_is_in_the_log_and_in_info() -> Result<()> {
    faults::warning(Spdk)
}
