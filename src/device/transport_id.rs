//! The name of an NVMe namespace that SPDK is to drive: `trtype:PCIe traddr:0000:01:00.0`, a bare PCI address, or
//! `trtype:TCP adrfam:IPv4 traddr:192.0.2.1 trsvcid:4420 subnqn:nqn...`, each with `ns:N` where it is not the only one.
//!
//! The words are those of SPDK and nvme-cli. Parsing needs no SPDK, so that every build can explain a name.

use std::fmt;
use std::net::IpAddr;

use crate::pci::Bdf;

/// The longest NVMe qualified name, in bytes (NVM Express Base Specification, NVMe Qualified Names).
const NQN_SIZE_MAX: usize = 223;

/// The port of NVMe/TCP that IANA assigned.
const TCP_PORT_DEFAULT: u16 = 4420;

/// Where a controller is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A drive on this machine's PCI bus.
    Pcie(Bdf),
    /// A subsystem behind TCP.
    Tcp {
        /// Its address.
        address: IpAddr,
        /// Its port.
        port: u16,
        /// The subsystem's NVMe qualified name.
        subsystem: String,
    },
}

/// A namespace of a controller.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TransportId {
    /// Where the controller is.
    pub transport: Transport,
    /// The namespace; without one, the controller must have exactly one.
    pub namespace: Option<u32>,
}

/// Why a name is none. The text is a sentence for the user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not the name of an NVMe namespace: {cause}")]
pub struct ParseError {
    text: String,
    cause: String,
}

impl ParseError {
    /// What is wrong, without the name.
    pub fn cause(&self) -> &str {
        &self.cause
    }
}

const PCIE_EXAMPLE: &str = "trtype:PCIe traddr:0000:01:00.0";
const TCP_EXAMPLE: &str =
    "trtype:TCP adrfam:IPv4 traddr:192.0.2.1 trsvcid:4420 subnqn:nqn.2016-06.io.spdk:cnode1";

impl TransportId {
    /// Whether a device's name is meant as one of these rather than as a path.
    pub fn is_meant_by(text: &str) -> bool {
        let first = text.split_whitespace().next().unwrap_or_default();
        let key = first.split_once(':').map_or("", |(key, _)| key);
        ["trtype", "traddr", "trsvcid", "adrfam", "subnqn"].iter().any(|name| key.eq_ignore_ascii_case(name))
            || looks_like_address(first)
    }

    /// Reads a name. The words may come in any order, and their keys in any case.
    pub fn parse(text: &str) -> Result<TransportId, ParseError> {
        parse(text).map_err(|cause| ParseError { text: text.to_owned(), cause })
    }

    /// Whether the controller is on this machine's PCI bus.
    pub fn pci_address(&self) -> Option<Bdf> {
        match self.transport {
            Transport::Pcie(address) => Some(address),
            Transport::Tcp { .. } => None,
        }
    }

    /// The controller alone, as SPDK parses it.
    pub fn controller(&self) -> String {
        match &self.transport {
            Transport::Pcie(address) => format!("trtype:PCIe traddr:{address}"),
            Transport::Tcp { address, port, subsystem } => {
                let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
                format!("trtype:TCP adrfam:{family} traddr:{address} trsvcid:{port} subnqn:{subsystem}")
            }
        }
    }
}

impl fmt::Display for TransportId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.controller())?;
        self.namespace.map_or(Ok(()), |namespace| write!(f, " ns:{namespace}"))
    }
}

/// A PCI address, or somebody's attempt at one: nobody calls a file that.
fn looks_like_address(word: &str) -> bool {
    word.contains(':')
        && word.contains(|c: char| c.is_ascii_digit())
        && word.chars().all(|c| c.is_ascii_hexdigit() || c == ':' || c == '.')
}

/// The words of a name by their keys.
#[derive(Default)]
struct Words<'a> {
    trtype: Option<&'a str>,
    adrfam: Option<&'a str>,
    traddr: Option<&'a str>,
    trsvcid: Option<&'a str>,
    subnqn: Option<&'a str>,
    ns: Option<&'a str>,
}

fn parse(text: &str) -> Result<TransportId, String> {
    let words = split(text)?;
    let namespace = match words.ns {
        None => None,
        Some(number) => match number.parse::<u32>() {
            Ok(number) if (1..u32::MAX).contains(&number) => Some(number),
            _ => return Err(format!("ns:{number} is not a namespace; they count from 1")),
        },
    };
    let transport = match words.trtype.map(str::to_ascii_lowercase).as_deref() {
        Some("pcie") => pcie(&words)?,
        Some("tcp") => tcp(&words)?,
        Some(other) => return Err(format!("trtype:{other} is not driven; PCIe and TCP are")),
        None => return Err(format!("it says no trtype, as in '{PCIE_EXAMPLE}' or '{TCP_EXAMPLE}'")),
    };
    Ok(TransportId { transport, namespace })
}

fn split(text: &str) -> Result<Words<'_>, String> {
    let mut words = Words::default();
    for (index, word) in text.split_whitespace().enumerate() {
        if index == 0 && word.parse::<Bdf>().is_ok() {
            (words.trtype, words.traddr) = (Some("pcie"), Some(word));
            continue;
        }
        if index == 0 && looks_like_address(word) {
            return Err(format!(
                "'{word}' is not a PCI address such as 0000:01:00.0 (a file of that name would be ./{word})"
            ));
        }
        let Some((key, value)) = word.split_once(':').filter(|(_, value)| !value.is_empty()) else {
            return Err(format!("'{word}' is not a word like traddr:0000:01:00.0"));
        };
        let place = match key.to_ascii_lowercase().as_str() {
            "trtype" => &mut words.trtype,
            "adrfam" => &mut words.adrfam,
            "traddr" => &mut words.traddr,
            "trsvcid" => &mut words.trsvcid,
            "subnqn" => &mut words.subnqn,
            "ns" => &mut words.ns,
            _ => {
                return Err(format!("'{key}' is not one of trtype, adrfam, traddr, trsvcid, subnqn and ns"));
            }
        };
        if place.replace(value).is_some() {
            return Err(format!("it says {key} twice"));
        }
    }
    Ok(words)
}

fn pcie(words: &Words<'_>) -> Result<Transport, String> {
    let address = words.traddr.ok_or_else(|| format!("it says no traddr, as in '{PCIE_EXAMPLE}'"))?;
    if let Some((key, _)) = [("adrfam", words.adrfam), ("trsvcid", words.trsvcid), ("subnqn", words.subnqn)]
        .iter()
        .find(|(_, value)| value.is_some())
    {
        return Err(format!("a PCIe controller has no {key}"));
    }
    address
        .parse()
        .map(Transport::Pcie)
        .map_err(|_| format!("traddr:{address} is not a PCI address like 0000:01:00.0"))
}

fn tcp(words: &Words<'_>) -> Result<Transport, String> {
    let text = words.traddr.ok_or_else(|| format!("it says no traddr, as in '{TCP_EXAMPLE}'"))?;
    let address: IpAddr =
        text.parse().map_err(|_| format!("traddr:{text} is not an IP address; names are not looked up"))?;
    let family = words.adrfam.map(str::to_ascii_lowercase);
    match family.as_deref() {
        None => {}
        Some("ipv4") if address.is_ipv4() => {}
        Some("ipv6") if address.is_ipv6() => {}
        Some("ipv4" | "ipv6") => return Err(format!("traddr:{text} is not of that adrfam")),
        Some(other) => return Err(format!("adrfam:{other} is neither IPv4 nor IPv6")),
    }
    let port = match words.trsvcid {
        None => TCP_PORT_DEFAULT,
        Some(text) => text
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| format!("trsvcid:{text} is not a TCP port"))?,
    };
    let subsystem = words.subnqn.ok_or_else(|| format!("it says no subnqn, as in '{TCP_EXAMPLE}'"))?;
    if !subsystem.starts_with("nqn.") || subsystem.len() > NQN_SIZE_MAX || !subsystem.is_ascii() {
        return Err(format!(
            "subnqn:{subsystem} is not an NVMe qualified name (nqn.YYYY-MM..., {NQN_SIZE_MAX} bytes at most)"
        ));
    }
    Ok(Transport::Tcp { address, port, subsystem: subsystem.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        assert!(TransportId::is_meant_by(text), "{text}");
        let parsed = TransportId::parse(text).unwrap();
        let shown = parsed.to_string();
        assert_eq!(TransportId::parse(&shown), Ok(parsed), "{shown}");
        shown
    }

    #[test]
    fn names_are_read_and_shown_in_full() {
        let drive = "trtype:PCIe traddr:0000:01:00.0";
        for text in
            [drive, "0000:01:00.0", "01:00.0", "TRTYPE:pcie TRADDR:1:0.0", " traddr:01:00.0  trtype:PCIE"]
        {
            assert_eq!(shown(text), drive);
        }
        assert_eq!(shown("0000:5e:1f.7 ns:2"), "trtype:PCIe traddr:0000:5e:1f.7 ns:2");
        assert_eq!(shown("10000:01:00.0"), "trtype:PCIe traddr:10000:01:00.0");
        let tcp = "trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:4420 subnqn:nqn.2016-06.io.spdk:cnode1";
        assert_eq!(shown(tcp), tcp);
        assert_eq!(shown("trtype:tcp traddr:127.0.0.1 subnqn:nqn.2016-06.io.spdk:cnode1"), tcp);
        assert_eq!(
            shown("subnqn:nqn.2014-08.org.nvmexpress:uuid:1 ns:3 traddr:fe80::1 trtype:TCP trsvcid:1"),
            "trtype:TCP adrfam:IPv6 traddr:fe80::1 trsvcid:1 subnqn:nqn.2014-08.org.nvmexpress:uuid:1 ns:3"
        );
    }

    #[test]
    fn a_wrong_name_is_told_what_is_wrong_with_it() {
        let nqn = "subnqn:nqn.2016-06.io.spdk:cnode1";
        for (text, cause) in [
            ("trtype:PCIe", "no traddr"),
            ("trtype:PCIe traddr:0000:01:20.0", "not a PCI address"),
            ("trtype:PCIe traddr:0000:01:00.8", "not a PCI address"),
            ("trtype:PCIe traddr:0000:01:00.+1", "not a PCI address"),
            ("trtype:PCIe traddr:01:00.0 trsvcid:1", "has no trsvcid"),
            ("traddr:01:00.0", "no trtype"),
            ("trtype:RDMA traddr:10.0.0.1", "not driven"),
            ("0000:00:04", "not a PCI address"),
            ("0000:00:04.9 ns:1", "a file of that name would be ./0000:00:04.9"),
            ("01:00.0 ns:0", "count from 1"),
            ("01:00.0 ns:4294967295", "count from 1"),
            ("01:00.0 ns:one", "count from 1"),
            ("01:00.0 traddr:02:00.0", "traddr twice"),
            ("01:00.0 ns:", "not a word"),
            ("01:00.0 02:00.0", "'02' is not one of"),
            ("trtype:TCP traddr:localhost subnqn:nqn.1", "names are not looked up"),
            (&format!("trtype:TCP adrfam:IPv6 traddr:127.0.0.1 {nqn}"), "not of that adrfam"),
            (&format!("trtype:TCP adrfam:ib traddr:127.0.0.1 {nqn}"), "neither IPv4 nor IPv6"),
            (&format!("trtype:TCP traddr:127.0.0.1 trsvcid:0 {nqn}"), "not a TCP port"),
            (&format!("trtype:TCP traddr:127.0.0.1 trsvcid:65536 {nqn}"), "not a TCP port"),
            ("trtype:TCP traddr:127.0.0.1", "no subnqn"),
            ("trtype:TCP traddr:127.0.0.1 subnqn:cnode1", "qualified name"),
            (&format!("trtype:TCP traddr:127.0.0.1 subnqn:nqn.{}", "x".repeat(220)), "qualified name"),
        ] {
            let error = TransportId::parse(text).unwrap_err().to_string();
            assert!(error.contains(cause) && error.contains(text), "{error}");
        }
    }

    #[test]
    fn paths_are_not_meant() {
        for path in ["./basalt.img", "/dev/nvme0n1", "data.img", "a:b.c", "trtype", "nvme:1.0", ""] {
            assert!(!TransportId::is_meant_by(path), "{path}");
        }
        assert_eq!(TransportId::parse("01:00.0").unwrap().pci_address().unwrap().to_string(), "0000:01:00.0");
    }
}
