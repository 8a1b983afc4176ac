//! NVMe controllers as the kernel's sysfs shows them: what they are, who uses them, and which driver has them.
//!
//! Everything is read and written through [`system::System`], whose root a test can put elsewhere and whose few actions a test can
//! answer itself. Nothing here reads a device's blocks; whether binding is wise is decided by the command line.

pub mod binding;
pub mod controller;
#[cfg(test)]
pub(crate) mod fake;
pub mod hugepages;
pub mod system;
pub mod users;

use std::fmt;
use std::str::FromStr;

/// The address of a PCI function: domain, bus, device, function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// Text that is no PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a PCI address such as 0000:01:00.0; `basalt device list` shows those of this machine")]
pub struct BadBdf(String);

impl FromStr for Bdf {
    type Err = BadBdf;

    /// Reads `0000:01:00.0`; the domain may be left out when it is 0.
    fn from_str(text: &str) -> Result<Bdf, BadBdf> {
        let bad = || BadBdf(text.to_owned());
        // `from_str_radix` would also take a sign.
        let hex = |part: &str, width: usize| {
            let is_hex = part.len() <= width && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            u32::from_str_radix(part, 16).ok().filter(|_| is_hex).ok_or_else(bad)
        };
        let (rest, function) = text.rsplit_once('.').ok_or_else(bad)?;
        let parts: Vec<&str> = rest.split(':').collect();
        let (domain, bus, device) = match parts.as_slice() {
            [bus, device] => (0, *bus, *device),
            // VMD and other bridges make domains of five digits.
            [domain, bus, device] => (hex(domain, 8)?, *bus, *device),
            _ => return Err(bad()),
        };
        let (bus, device, function) = (hex(bus, 2)?, hex(device, 2)?, hex(function, 1)?);
        if device > 0x1f || function > 7 {
            return Err(bad());
        }
        Ok(Bdf { domain, bus: bus as u8, device: device as u8, function: function as u8 })
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

impl serde::Serialize for Bdf {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_as_the_kernel_writes_them() {
        for (text, shown) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("01:1F.7", "0000:01:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
            ("0:0:4.0", "0000:00:04.0"),
        ] {
            assert_eq!(text.parse::<Bdf>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "nvme0",
            "/dev/nvme0n1",
            "0000:01:00",
            "0000:01:20.0",
            "0000:01:00.8",
            "0000:+1:00.0",
            "0:0:0:0.0",
            "0000:001:00.0",
            "0000:01:00.0 ",
        ] {
            assert_eq!(text.parse::<Bdf>(), Err(BadBdf(text.to_owned())));
        }
    }
}
