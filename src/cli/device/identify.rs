//! `basalt device identify`: what a controller and its namespaces can do.

use serde::Serialize;

use super::{IdentifyArgs, Report, find};
use crate::cli::Exit;
#[cfg(feature = "spdk")]
use crate::device::spdk;
#[cfg(feature = "spdk")]
use crate::device::transport_id::{Transport, TransportId};
use crate::pci::Bdf;
use crate::pci::controller::{Controller, device_path};
use crate::pci::system::System;
use crate::size;

/// What is known of a controller. Fields that a source can't tell are missing.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Identity {
    bdf: String,
    /// Where this comes from.
    source: &'static str,
    model: Option<String>,
    serial: Option<String>,
    firmware: Option<String>,
    subsystem: Option<String>,
    state: Option<String>,
    namespaces: Vec<NamespaceIdentity>,
    health: Option<HealthReport>,
}

/// From the SMART / health log page.
#[derive(Debug, Clone, Copy, Serialize)]
struct HealthReport {
    critical_warning: u8,
    temperature_celsius: i32,
    available_spare_percent: u8,
    used_percent: u8,
    power_on_hours: u64,
    unsafe_shutdowns: u64,
    media_errors: u64,
}

/// The kernel's words for what a drive's write cache asks of who writes.
const WRITE_BACK: &str = "write back";
const WRITE_THROUGH: &str = "write through";

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

/// How a controller is asked that a driver for user space has.
pub(super) type Ask<'a> = dyn Fn(Bdf) -> Result<Identity, String> + 'a;

pub(super) fn report(system: &System, args: &IdentifyArgs, ask: &Ask) -> Report {
    let controller = match find(system, args.bdf) {
        Ok(controller) => controller,
        Err(report) => return report,
    };
    match identify(system, &controller, ask) {
        Ok(identity) if args.json => Report::done(serde_json::json!(identity).to_string()),
        Ok(identity) => Report::done(text(&identity)),
        Err(why) => Report::failed(Exit::Failed, why),
    }
}

/// The one place that knows whom to ask: the kernel's driver answers through sysfs, what user space has through SPDK.
fn identify(system: &System, controller: &Controller, ask: &Ask) -> Result<Identity, String> {
    let bdf = controller.bdf;
    match controller.driver.as_deref() {
        Some("nvme") => Ok(from_sysfs(system, controller)),
        Some(_) if controller.is_user_space() => ask(bdf),
        Some(driver) => Err(format!("{bdf} is with the driver {driver}, which shows nothing of it")),
        None => Err(format!(
            "{bdf} has no driver, so nobody can ask it; `basalt device unbind {bdf}` gives it to nvme, `basalt device bind \
             {bdf}` to SPDK"
        )),
    }
}

#[cfg(not(feature = "spdk"))]
pub(super) fn through_spdk(bdf: Bdf) -> Result<Identity, String> {
    Err(format!(
        "{bdf} is with user space, where only SPDK can ask it, and this build has none: run scripts/setup-spdk and build \
         with `cargo build --release --features spdk`, or give it back with `basalt device unbind {bdf}`"
    ))
}

#[cfg(feature = "spdk")]
pub(super) fn through_spdk(bdf: Bdf) -> Result<Identity, String> {
    let device = TransportId { transport: Transport::Pcie(bdf), namespace: None };
    let found = spdk::identify(&device).map_err(|error| error.to_string())?;
    let known = |text: String| (!text.is_empty()).then_some(text);
    let volatile = found.volatile_write_cache;
    let namespaces = found.namespaces.iter().map(|one| NamespaceIdentity {
        name: format!("ns:{}", one.id),
        nsid: Some(one.id.into()),
        size: one.size,
        block_size: one.block_size.into(),
        physical_block_size: None,
        write_cache: Some(if volatile { WRITE_BACK } else { WRITE_THROUGH }.to_owned()),
        fua: None,
        transfer_size_max: Some(one.transfer_size_max.into()),
        optimal_boundary_size: Some(one.optimal_boundary_size).filter(|&size| size > 0),
        deallocate: Some(one.deallocate),
        metadata_size: Some(one.metadata_size.into()),
        // As the kernel writes them: both are strings of bytes.
        wwid: match (u128::from_be_bytes(one.nguid), one.eui64.swap_bytes()) {
            (0, 0) => None,
            (0, eui64) => Some(format!("eui.{eui64:016x}")),
            (nguid, _) => Some(format!("eui.{nguid:032x}")),
        },
    });
    Ok(Identity {
        bdf: bdf.to_string(),
        source: "SPDK",
        namespaces: namespaces.collect(),
        model: known(found.model),
        serial: known(found.serial),
        firmware: known(found.firmware),
        subsystem: known(found.subsystem),
        state: None,
        health: found.health.map(|health| HealthReport {
            critical_warning: health.critical_warning,
            // The page counts in Kelvin.
            temperature_celsius: health.temperature_celsius(),
            available_spare_percent: health.available_spare_percent,
            used_percent: health.used_percent,
            power_on_hours: health.power_on_hours,
            unsafe_shutdowns: health.unsafe_shutdowns,
            media_errors: health.media_errors,
        }),
    })
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
        health: None,
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
    line(
        "health",
        &identity.health.map(|health| {
            let warning = match health.critical_warning {
                0 => String::new(),
                bits => format!(", CRITICAL WARNING {bits:#04x}"),
            };
            format!(
                "{} % used, {} % spare, {} degrees Celsius, {} hours on, {} unsafe shutdowns, {} media errors{warning}",
                health.used_percent,
                health.available_spare_percent,
                health.temperature_celsius,
                health.power_on_hours,
                health.unsafe_shutdowns,
                health.media_errors
            )
        }),
    );
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
                WRITE_BACK => "volatile: flushes are needed".to_owned(),
                WRITE_THROUGH => "none, or not volatile: flushes are not needed".to_owned(),
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
