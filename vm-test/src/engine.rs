//! How a case drives the drives: the same case runs over each engine.

use std::path::PathBuf;

use crate::binary;
use crate::error::Result;
use crate::machine::{Machine, Owner};
use crate::vm::Vm;

/// An I/O engine of Basalt, together with what it takes to use it in a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring on the block devices of the guest's kernel.
    Uring,
    /// pread and pwrite on the same.
    Sync,
}

impl Engine {
    /// As in `--engine`.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Uring => "uring",
            Engine::Sync => "sync",
        }
    }

    /// The program that has it.
    pub fn program(self) -> Result<PathBuf> {
        binary::basalt(&[])
    }

    /// Makes a machine one in which this engine can work.
    pub fn prepare(self, machine: Machine) -> Result<Machine> {
        let mut machine = machine;
        machine.owner = Owner::Kernel;
        machine.programs.push(self.program()?);
        Ok(machine)
    }

    /// Does in the guest what has to be done before its devices can be opened.
    pub fn take_devices(self, vm: &Vm) -> Result<()> {
        for (controller, one) in vm.machine().controllers.iter().enumerate() {
            for index in 0..one.namespaces.len() {
                // The kernel finds drives while the guest comes up.
                let device = self.device(vm.machine(), controller, index);
                vm.run(&format!("for i in $(seq 300); do [ -b {device} ] && exit; sleep 0.1; done; exit 1"))?;
            }
        }
        Ok(())
    }

    /// What a namespace is called for `--device`.
    pub fn device(self, _machine: &Machine, controller: usize, index: usize) -> String {
        format!("/dev/{}", crate::machine::namespace_name(controller, index))
    }

    /// Resets a controller, whatever is in flight.
    pub fn reset_controller(self, vm: &Vm, controller: usize) -> Result<()> {
        vm.run(&format!("echo 1 >/sys/class/nvme/nvme{controller}/reset_controller")).map(drop)
    }
}
