//! What I/O engines are called on the command line: a name, and for uring its options behind it.

use std::fmt::{self, Display};
use std::str::FromStr;

use crate::device::kernel::KernelEngine;
use crate::device::mmap::WHY_NOT_SERVED;
use crate::device::uring_options::UringOptions;

/// How a device is read and written: `sync`, `uring`, `uring+sqpoll`...
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EngineName {
    /// io_uring with O_DIRECT.
    Uring(UringOptions),
    /// Another way through the kernel.
    Kernel(KernelEngine),
    /// SPDK, on NVMe controllers that this process owns; what a transport id means anyway.
    Spdk,
}

/// What there is, for messages and help.
pub(super) const ENGINE_NAMES: &str = "uring, aio, pool, sync, buffered, mmap, spdk";

impl EngineName {
    /// Why a node can't be served through it, if so.
    pub(super) fn why_not_served(self) -> Option<&'static str> {
        (self == EngineName::Kernel(KernelEngine::Mmap)).then_some(WHY_NOT_SERVED)
    }
}

impl Display for EngineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EngineName::Uring(options) => options.engine(),
            EngineName::Kernel(engine) => engine.name(),
            EngineName::Spdk => "spdk",
        })
    }
}

impl FromStr for EngineName {
    type Err = String;

    fn from_str(text: &str) -> Result<EngineName, String> {
        let mut parts = text.split('+');
        let name = parts.next().unwrap_or_default();
        if name == "uring" {
            let mut options = UringOptions::default();
            parts.try_for_each(|part| options.add(part))?;
            return Ok(EngineName::Uring(options));
        }
        let engine = match KernelEngine::ALL.into_iter().find(|engine| engine.name() == name) {
            Some(engine) => EngineName::Kernel(engine),
            None if name == "spdk" => EngineName::Spdk,
            None => return Err(format!("'{name}' is not one of {ENGINE_NAMES}")),
        };
        match parts.next() {
            None => Ok(engine),
            Some(option) => Err(format!("{name} has no option '{option}'; only uring has options")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_shown() {
        let mut all: Vec<String> = ENGINE_NAMES.split(", ").map(str::to_owned).collect();
        all.extend(["uring+registered+sqpoll+iopoll".to_owned(), "uring+unregistered".to_owned()]);
        for text in all {
            let engine: EngineName = text.parse().unwrap();
            assert_eq!(engine.to_string(), text);
            assert_eq!(engine.why_not_served().is_some(), text == "mmap");
        }
        let wrong = |text: &str| text.parse::<EngineName>().unwrap_err();
        assert!(wrong("io_uring").contains("not one of uring, aio"));
        assert!(wrong("uring+fast").contains("no option 'fast'"));
        assert!(wrong("aio+sqpoll").contains("only uring has options"));
        assert!(wrong("").contains("not one of"));
    }
}
