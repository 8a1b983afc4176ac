//! `basalt device identify`: what a controller and its namespaces can do.

use serde::Serialize;

use super::{IdentifyArgs, Report, find};
use crate::cli::Exit;
use crate::pci::controller::{Controller, device_path};
use crate::pci::system::System;
use crate::size;

/// What is known of a controller. Fields that a source can't tell are missing.
#[derive(Debug, Clone, Serialize)]
struct Identity {
    bdf: String,
    /// Where this comes from.
    source: &'static str,
    model: Option<String>,
    serial: Option<String>,
    firmware: Option<String>,
    subsystem: Option<String>,
    state: Option<String>,
    namespaces: Vec<NamespaceIdentity>,
}

#[derive(Debug, Clone, Serialize)]
struct NamespaceIdentity {
    name: String,
    nsid: Option<u64>,
    size: u64,
    block_size: u64,
    physical_block_size: Option<u64>,
    /// The kernel's word: `write back` where flushes are needed, `write through` where not.
    write_cache: Option<String>,
    fua: Option<bool>,
    /// Bytes; the kernel's own bound may be below the drive's.
    transfer_size_max: Option<u64>,
    /// Bytes; none when the drive names no boundary.
    optimal_boundary_size: Option<u64>,
    deallocate: Option<bool>,
    metadata_size: Option<u64>,
    wwid: Option<String>,
}

pub(super) fn report(system: &System, args: &IdentifyArgs) -> Report {
    let controller = match find(system, args.bdf) {
        Ok(controller) => controller,
        Err(report) => return report,
    };
    match identify(system, &controller) {
        Ok(identity) if args.json => Report::done(serde_json::json!(identity).to_string()),
        Ok(identity) => Report::done(text(&identity)),
        Err(why) => Report::failed(Exit::Failed, why),
    }
}

/// The one place that knows whom to ask. The kernel's driver answers through sysfs.
fn identify(system: &System, controller: &Controller) -> Result<Identity, String> {
    let bdf = controller.bdf;
    match controller.driver.as_deref() {
        Some("nvme") => Ok(from_sysfs(system, controller)),
        Some(driver) if controller.is_user_space() => Err(format!(
            "{bdf} is bound to {driver}, so the kernel can't ask it; `basalt device unbind {bdf}` gives it back, then this \
             works"
        )),
        Some(driver) => Err(format!("{bdf} is with the driver {driver}, which shows nothing of it")),
        None => Err(format!(
            "{bdf} has no driver, so nobody can ask it; `basalt device unbind {bdf}` gives it to nvme"
        )),
    }
}

fn from_sysfs(system: &System, controller: &Controller) -> Identity {
    let name = controller.name.as_deref().unwrap_or_default();
    let below = format!("{}/nvme/{name}", device_path(controller.bdf));
    let namespaces = controller.namespaces.iter().map(|namespace| {
        let block = format!("/sys/class/block/{}", namespace.name);
        let number = |attribute: &str| system.number(&format!("{block}/{attribute}"));
        NamespaceIdentity {
            name: namespace.name.clone(),
            nsid: namespace.nsid,
            size: namespace.size,
            block_size: namespace.block_size,
            physical_block_size: number("queue/physical_block_size"),
            write_cache: system.read(&format!("{block}/queue/write_cache")),
            fua: number("queue/fua").map(|fua| fua == 1),
            transfer_size_max: number("queue/max_hw_sectors_kb").map(|size| size << 10),
            // In units of 512 bytes, whatever the block size.
            optimal_boundary_size: number("queue/chunk_sectors")
                .filter(|&count| count > 0)
                .map(|count| count * 512),
            deallocate: number("queue/discard_max_hw_bytes").map(|size| size > 0),
            metadata_size: number("metadata_bytes"),
            wwid: system.read(&format!("{block}/wwid")),
        }
    });
    Identity {
        bdf: controller.bdf.to_string(),
        source: "sysfs",
        model: controller.model.clone(),
        serial: controller.serial.clone(),
        firmware: controller.firmware.clone(),
        subsystem: system.read(&format!("{below}/subsysnqn")),
        state: controller.state.clone(),
        namespaces: namespaces.collect(),
    }
}

fn text(identity: &Identity) -> String {
    let mut lines = vec![format!("{} (from {})", identity.bdf, identity.source)];
    let mut line = |name: &str, value: &Option<String>| {
        lines.extend(value.iter().map(|value| format!("  {name:18} {value}")));
    };
    line("model", &identity.model);
    line("serial number", &identity.serial);
    line("firmware", &identity.firmware);
    line("subsystem", &identity.subsystem);
    line("state", &identity.state);
    for one in &identity.namespaces {
        let id = one.nsid.map_or(String::new(), |id| format!(" (namespace {id})"));
        lines.push(format!(
            "  {}{id}: {} in blocks of {} bytes",
            one.name,
            size::show(one.size),
            one.block_size
        ));
        let mut line = |name: &str, value: Option<String>| {
            lines.extend(value.iter().map(|value| format!("    {name:18} {value}")));
        };
        line("physical block", one.physical_block_size.map(|size| format!("{size} bytes")));
        line(
            "write cache",
            one.write_cache.as_deref().map(|mode| match mode {
                "write back" => "volatile: flushes are needed".to_owned(),
                "write through" => "none, or not volatile: flushes are not needed".to_owned(),
                other => other.to_owned(),
            }),
        );
        let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
        line("FUA", one.fua.map(yes));
        line("largest transfer", one.transfer_size_max.map(size::show));
        line("boundary", one.optimal_boundary_size.map(size::show));
        line("deallocate", one.deallocate.map(yes));
        line(
            "metadata",
            one.metadata_size.filter(|&size| size > 0).map(|size| format!("{size} bytes a block")),
        );
        line("id", one.wwid.clone());
    }
    lines.join("\n")
}
