//! The journal at its edges; whole bindings are tested with the commands.

use super::*;
use crate::pci::fake::Machine;

const BDF: &str = "0000:01:00.0";

#[test]
fn an_interrupt_between_steps_undoes_them() {
    let machine = Machine::new();
    machine.add_disk(BDF, "nvme0", "S1");
    let system = machine.system();
    let controller = controller::find(&system, BDF.parse().unwrap()).unwrap();
    let stop = AtomicBool::new(false);
    let wish = Wish { driver: None, hugepages_size: 64 << 20 };
    // Interrupted while the drive has no driver at all.
    let mut tell = |step: &str| {
        if step.contains("driver/unbind") {
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        }
    };
    let failure = bind(&system, &controller, wish, Mode::Take, &stop, &mut tell).unwrap_err();
    assert!(failure.what.contains("interrupted"), "{failure}");
    assert_eq!(failure.left, Vec::<String>::new());
    assert_eq!(machine.driver_of(BDF).as_deref(), Some("nvme"));
    let writes = machine.kernel.borrow().writes.clone();
    assert!(writes.iter().any(|(path, _)| path.ends_with("/driver/unbind")), "{writes:?}");
    let pages = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages";
    assert_eq!(machine.read(pages), "0");
}

#[test]
fn a_reservation_that_was_there_is_restored() {
    let machine = Machine::new();
    machine.add_disk(BDF, "nvme0", "S1");
    let reservation = format!("/sys/bus/pci/devices/{BDF}/driver_override");
    machine.write(&reservation, "nvme\n");
    machine.kernel.borrow_mut().refusing.insert("vfio-pci".into());
    let system = machine.system();
    let controller = controller::find(&system, BDF.parse().unwrap()).unwrap();
    let wish = Wish { driver: Some(Driver::VfioPci), hugepages_size: 0 };
    bind(&system, &controller, wish, Mode::Take, &AtomicBool::new(false), &mut |_| {}).unwrap_err();
    assert_eq!(machine.read(&reservation), "nvme");
    assert_eq!(machine.driver_of(BDF).as_deref(), Some("nvme"));
}
