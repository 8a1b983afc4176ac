//! A shell in a guest with one empty NVMe drive, for a person: `vm-test/run --shell`.

use std::process::ExitCode;

use vm_test::engine::Engine;
use vm_test::error::{Result, VmError};
use vm_test::host::say;
use vm_test::machine::{Machine, Namespace};
use vm_test::node::PORT;
use vm_test::{image, vm};

/// Bytes of the drive.
const DRIVE_SIZE: u64 = 1 << 30;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error);
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let directory = tempfile::tempdir().map_err(VmError::os("make a directory in", std::env::temp_dir()))?;
    let drive = image::create(directory.path().join("drive.img"), DRIVE_SIZE)?;
    let engine = if cfg!(feature = "spdk") { Engine::Spdk } else { Engine::Uring };
    let mut machine = engine.prepare(Machine::with_namespaces(vec![Namespace::new(drive)]))?;
    machine.ports = vec![PORT];
    // For `basalt device bind` as well as for the kernel's own driver, whatever drives it then.
    machine.iommu = true;
    machine.memory_mib = 2048;
    vm::shell(&machine)
}
