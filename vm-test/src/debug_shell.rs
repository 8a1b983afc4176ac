//! A shell in a guest with one empty NVMe drive, for a person: `vm-test/run --shell`.

use std::process::ExitCode;

use vm_test::engine::Engine;
use vm_test::error::{Result, VmError};
use vm_test::host::say;
use vm_test::machine::{Machine, Namespace, Owner};
use vm_test::node::PORT;
use vm_test::{image, vm};

/// Bytes of the drive.
const DRIVE_SIZE: u64 = 1 << 30;

fn main() -> ExitCode {
    let for_user_space = std::env::args().any(|argument| argument == "--vfio");
    match run(for_user_space) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(for_user_space: bool) -> Result<()> {
    let directory = tempfile::tempdir().map_err(VmError::os("make a directory in", std::env::temp_dir()))?;
    let drive = image::create(directory.path().join("drive.img"), DRIVE_SIZE)?;
    let mut machine = Engine::Uring.prepare(Machine::with_namespaces(vec![Namespace::new(drive)]))?;
    machine.ports = vec![PORT];
    if for_user_space {
        machine.owner = Owner::UserSpace;
        machine.hugepage_count = 128;
        machine.memory_mib = 2048;
    }
    vm::shell(&machine)
}
