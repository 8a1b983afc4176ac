//! How a case drives the drives: the same case runs over each engine.

use std::path::PathBuf;
use std::time::Duration;

use crate::binary;
use crate::error::Result;
use crate::machine::{Machine, namespace_name};
use crate::vm::Vm;

/// An I/O engine of Basalt, together with what it takes to use it in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring on the block devices of the guest's kernel.
    Uring,
    /// SPDK on the controllers themselves, which `basalt device bind` takes from the kernel.
    Spdk,
}

/// For `basalt device bind` under emulation.
const BIND_LIMIT: Duration = Duration::from_secs(300);

impl Engine {
    /// As in `--engine`.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Uring => "uring",
            Engine::Spdk => "spdk",
        }
    }

    /// The program that has it, for guest and host.
    pub fn program(self) -> Result<PathBuf> {
        match self {
            Engine::Uring => binary::basalt(&[]),
            Engine::Spdk => binary::basalt(&["spdk"]),
        }
    }

    /// Makes a machine one in which this engine can work.
    pub fn prepare(self, machine: Machine) -> Result<Machine> {
        let mut machine = machine;
        machine.programs.push(self.program()?);
        if self == Engine::Spdk {
            machine.iommu = true;
            // Room for the huge pages that `device bind` sets up.
            machine.memory_mib = machine.memory_mib.max(2048);
        }
        Ok(machine)
    }

    /// Does in the guest what has to be done before its devices can be opened.
    pub fn take_devices(self, vm: &Vm) -> Result<()> {
        wait_for_devices(vm)?;
        if self == Engine::Spdk {
            for controller in 0..vm.machine().controllers.len() {
                let address = vm.machine().address(controller);
                // Images that carry data are what cases are about.
                let bind = format!("basalt device bind {address} --force --serial BASALT{controller}");
                vm.expect(0, &bind, BIND_LIMIT)?;
            }
        }
        Ok(())
    }

    /// Whether two processes may use namespaces of one controller at a time.
    pub fn shares_controllers(self) -> bool {
        self == Engine::Uring
    }

    /// What a namespace is called for `--device`, quoted for a shell.
    pub fn device(self, machine: &Machine, controller: usize, index: usize) -> String {
        match self {
            Engine::Uring => format!("/dev/{}", namespace_name(controller, index)),
            Engine::Spdk => {
                format!("\"trtype:PCIe traddr:{} ns:{}\"", machine.address(controller), index + 1)
            }
        }
    }
}

/// The guest's kernel finds drives while the guest comes up.
pub fn wait_for_devices(vm: &Vm) -> Result<()> {
    for (controller, one) in vm.machine().controllers.iter().enumerate() {
        for index in 0..one.namespaces.len() {
            let device = format!("/dev/{}", namespace_name(controller, index));
            vm.run(&format!("for i in $(seq 300); do [ -b {device} ] && exit; sleep 0.1; done; exit 1"))?;
        }
    }
    Ok(())
}
