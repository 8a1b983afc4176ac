//! Steps that are told, taken, remembered and, when a later one fails, undone.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Bound;
use crate::pci::controller::{self, device_path};
use crate::pci::system::System;
use crate::pci::{Bdf, controller::USER_SPACE_DRIVERS};

/// Whether steps are taken or only told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Take them.
    Take,
    /// Tell them.
    Dry,
}

/// A step failed, and what was done about those before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}{}", .left.iter().map(|left| format!("; could not be undone: {left}")).collect::<String>())]
pub struct Failure {
    /// What went wrong.
    pub what: String,
    /// Steps that were undone.
    pub undone: Vec<String>,
    /// Steps that could not be.
    pub left: Vec<String>,
}

/// How a step is undone.
enum Undo {
    /// Write the old value.
    Write {
        path: String,
        old: String,
    },
    /// Give the device back to the driver it was taken from.
    Return {
        bdf: Bdf,
        driver: String,
    },
    /// Take it from the driver that got it.
    Release {
        bdf: Bdf,
        driver: String,
    },
    Unmount {
        path: String,
    },
}

pub(super) struct Journal<'a> {
    pub(super) system: &'a System,
    mode: Mode,
    stop: &'a AtomicBool,
    tell: &'a mut dyn FnMut(&str),
    undo: Vec<Undo>,
    steps: Vec<String>,
    notes: Vec<String>,
}

impl<'a> Journal<'a> {
    pub(super) fn new(
        system: &'a System,
        mode: Mode,
        stop: &'a AtomicBool,
        tell: &'a mut dyn FnMut(&str),
    ) -> Journal<'a> {
        Journal { system, mode, stop, tell, undo: Vec::new(), steps: Vec::new(), notes: Vec::new() }
    }

    pub(super) fn is_dry(&self) -> bool {
        self.mode == Mode::Dry
    }

    /// Something for the user that is no step.
    pub(super) fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// A step whose details only show once earlier ones are taken.
    pub(super) fn would(&mut self, what: &str) {
        (self.tell)(what);
        self.steps.push(what.to_owned());
    }

    /// Tells a step; `true` when it is to be taken.
    fn begin(&mut self, what: String) -> Result<bool, String> {
        if self.stop.load(Ordering::Relaxed) {
            return Err("it was interrupted".to_owned());
        }
        self.would(&what);
        Ok(!self.is_dry())
    }

    pub(super) fn load(&mut self, module: &str) -> Result<(), String> {
        if self.begin(format!("load the module {module}"))? {
            self.system.kernel().load_module(module)?;
        }
        Ok(())
    }

    /// Loads a module that some kernels have under another name or not at all.
    pub(super) fn load_if_there(&mut self, module: &str) {
        if !self.is_dry() {
            let _ = self.system.kernel().load_module(module);
        }
    }

    /// Writes a value. With `old` given, undoing writes that.
    pub(super) fn write(
        &mut self,
        path: &str,
        text: &str,
        what: &str,
        old: Option<&str>,
    ) -> Result<(), String> {
        if self.begin(format!("{what}: echo {} > {path}", shown(text)))? {
            self.system.write(path, text).map_err(|error| format!("{}: {}", what, explain(path, &error)))?;
            self.undo.extend(old.map(|old| Undo::Write { path: path.to_owned(), old: old.to_owned() }));
        }
        Ok(())
    }

    pub(super) fn mount_hugetlbfs(&mut self, path: &str) -> Result<(), String> {
        if self.begin(format!("mount huge pages: mount -t hugetlbfs -o pagesize=2M none {path}"))? {
            let place = self.system.path(path);
            self.system.kernel().mount_hugetlbfs(&place).map_err(|error| {
                format!("huge pages can't be mounted at {path} ({error}); mount them elsewhere, or give --hugepages 0")
            })?;
            self.undo.push(Undo::Unmount { path: path.to_owned() });
        }
        Ok(())
    }

    /// Takes a device from a driver.
    pub(super) fn release(&mut self, bdf: Bdf, driver: &str) -> Result<(), String> {
        let path = format!("{}/driver/unbind", device_path(bdf));
        if self.begin(format!("take {bdf} from the driver {driver}: echo {bdf} > {path}"))? {
            // Before it is written: a driver that fails half-way may have let go of the device.
            self.undo.push(Undo::Return { bdf, driver: driver.to_owned() });
            self.system
                .write(&path, &bdf.to_string())
                .map_err(|error| format!("{bdf} can't be taken from {driver}: {}", explain(&path, &error)))?;
            if let Some(still) = controller::driver(self.system, bdf) {
                return Err(format!("{bdf} still belongs to the driver {still}"));
            }
        }
        Ok(())
    }

    /// Has the kernel find a driver for a device, which must be this one.
    pub(super) fn probe(&mut self, bdf: Bdf, driver: &str) -> Result<(), String> {
        let path = "/sys/bus/pci/drivers_probe";
        if self.begin(format!("give {bdf} to the driver {driver}: echo {bdf} > {path}"))? {
            self.undo.push(Undo::Release { bdf, driver: driver.to_owned() });
            let written = self.system.write(path, &bdf.to_string());
            if controller::driver(self.system, bdf).as_deref() == Some(driver) {
                return Ok(());
            }
            if !self.system.exists(&device_path(bdf)) {
                return Err(format!("{bdf} went away"));
            }
            let why = match written {
                Err(error) => explain(path, &error),
                Ok(()) => "the kernel's log (dmesg) says why".to_owned(),
            };
            return Err(format!("the driver {driver} did not take {bdf}: {why}"));
        }
        Ok(())
    }

    /// Ends well, or undoes what was done.
    pub(super) fn finish(mut self, result: Result<(String, bool), String>) -> Result<Bound, Failure> {
        match result {
            Ok((driver, was_bound)) => Ok(Bound { driver, was_bound, steps: self.steps, notes: self.notes }),
            Err(what) => {
                let (mut undone, mut left) = (Vec::new(), Vec::new());
                while let Some(undo) = self.undo.pop() {
                    match self.take_back(&undo) {
                        Ok(Some(text)) => undone.push(text),
                        Ok(None) => {}
                        Err(text) => left.push(text),
                    }
                }
                Err(Failure { what, undone, left })
            }
        }
    }

    /// Undoes one step; nothing when there was nothing to undo.
    fn take_back(&self, undo: &Undo) -> Result<Option<String>, String> {
        let failed =
            |what: &str, path: &str, error: &std::io::Error| format!("{what} ({})", explain(path, error));
        match undo {
            Undo::Write { path, old } => {
                let what = match shown(old) {
                    "" => format!("{path} is empty again"),
                    old => format!("{path} is {old} again"),
                };
                self.system.write(path, old).map_err(|error| failed(path, path, &error))?;
                Ok(Some(what))
            }
            Undo::Unmount { path } => {
                let place = self.system.path(path);
                self.system.kernel().unmount(&place).map_err(|error| failed("the mount", path, &error))?;
                Ok(Some(format!("{path} is unmounted")))
            }
            Undo::Release { bdf, driver } => {
                if controller::driver(self.system, *bdf).as_deref() != Some(driver.as_str()) {
                    return Ok(None);
                }
                let path = format!("{}/driver/unbind", device_path(*bdf));
                let what = format!("{bdf} was given to {driver}");
                self.system.write(&path, &bdf.to_string()).map_err(|error| failed(&what, &path, &error))?;
                Ok(Some(format!("{bdf} is no longer with {driver}")))
            }
            Undo::Return { bdf, driver } => {
                let what = format!("{bdf} was taken from {driver}");
                if !self.system.exists(&device_path(*bdf)) {
                    return Err(format!("{what} (the device is gone)"));
                }
                let path = format!("/sys/bus/pci/drivers/{driver}/bind");
                let written = match controller::driver(self.system, *bdf) {
                    Some(_) => Ok(()),
                    None => self.system.write(&path, &bdf.to_string()),
                };
                match (controller::driver(self.system, *bdf), written) {
                    (Some(now), _) if now == *driver => Ok(Some(format!("{bdf} is with {driver} again"))),
                    (_, Err(error)) => Err(failed(&what, &path, &error)),
                    (now, Ok(())) => {
                        Err(format!("{what} (it is with {})", now.as_deref().unwrap_or("no driver")))
                    }
                }
            }
        }
    }
}

fn shown(text: &str) -> &str {
    if text.trim().is_empty() { "" } else { text }
}

/// What the usual errors of sysfs mean.
fn explain(path: &str, error: &std::io::Error) -> String {
    use rustix::io::Errno;
    let is = |errno: Errno| error.raw_os_error() == Some(errno.raw_os_error());
    let driver = USER_SPACE_DRIVERS.iter().find(|driver| path.contains(*driver));
    if is(Errno::ROFS) {
        format!("{path} is read-only ({error}), as /sys is inside containers: bind on the host")
    } else if is(Errno::NOENT) || is(Errno::NODEV) {
        format!(
            "{path}: {error}; the device or its driver{} went away",
            driver.map_or(String::new(), |d| format!(" {d}"))
        )
    } else if is(Errno::PERM) || is(Errno::ACCESS) {
        format!("{path}: {error}; this needs root, and a kernel that is not locked down")
    } else {
        format!("{path}: {error}")
    }
}
