//! `basalt device`: NVMe controllers of this machine, and giving them to user space and back.

mod bind;
mod contents;
mod identify;
mod inspection;
mod list;
#[cfg(test)]
mod tests;

use clap::{Args, Subcommand};

use super::{Exit, fail, say};
use crate::pci::Bdf;
use crate::pci::binding::Driver;
use crate::pci::controller::{self, Controller};
use crate::pci::system::System;
use crate::size;

pub(super) use inspection::Inspection;

#[derive(Debug, Args)]
pub(super) struct DeviceArgs {
    #[command(subcommand)]
    command: DeviceCommand,
}

#[derive(Debug, Subcommand)]
enum DeviceCommand {
    /// Show every NVMe controller: what it is, which driver has it, who uses it and what is on it.
    List(ListArgs),
    /// Give a controller to user space, for `serve`. Refuses one that is in use or carries data.
    Bind(BindArgs),
    /// Give a controller back to the kernel's nvme driver.
    Unbind(UnbindArgs),
    /// Show what a controller and its namespaces can do.
    Identify(IdentifyArgs),
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct BindArgs {
    /// PCI address, such as 0000:01:00.0
    #[arg(value_name = "BDF")]
    bdf: Bdf,
    /// Driver to bind to [default: vfio-pci; uio_pci_generic where there is neither IOMMU nor no-IOMMU mode]
    #[arg(long, value_name = "DRIVER")]
    driver: Option<Driver>,
    /// 2 MiB huge pages that the drive's NUMA node should have at least; 0 leaves them as they are
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "512MiB")]
    hugepages: u64,
    /// Bind although data is on it, never although it is in use. Needs --serial.
    #[arg(long, requires = "serial")]
    force: bool,
    /// The drive's serial number: nothing is done when it is another
    #[arg(long, value_name = "SN")]
    serial: Option<String>,
    /// Show each step and take none.
    #[arg(long)]
    dry_run: bool,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct UnbindArgs {
    /// PCI address, such as 0000:01:00.0
    #[arg(value_name = "BDF")]
    bdf: Bdf,
    /// Show each step and take none.
    #[arg(long)]
    dry_run: bool,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct IdentifyArgs {
    /// PCI address, such as 0000:01:00.0
    #[arg(value_name = "BDF")]
    bdf: Bdf,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

/// What a command has to say, kept apart from saying it so that tests can read it.
#[derive(Debug, Default)]
struct Report {
    /// The result, for standard output.
    out: String,
    /// An error, for standard error.
    error: Option<String>,
    exit: Exit,
}

impl Report {
    fn done(out: impl Into<String>) -> Report {
        Report { out: out.into(), error: None, exit: Exit::Done }
    }

    fn failed(exit: Exit, error: impl Into<String>) -> Report {
        Report { out: String::new(), error: Some(error.into()), exit }
    }
}

pub(super) fn device(args: &DeviceArgs) -> Exit {
    let system = System::host();
    // Each step before it is taken: letting go of a drive that does not answer may take a while.
    let mut tell = |text: &str| super::note(text);
    let report = run(&system, &args.command, &mut tell, &identify::through_spdk);
    if !report.out.is_empty() {
        say(report.out);
    }
    match report.error {
        Some(text) => fail(report.exit, text),
        None => report.exit,
    }
}

/// `ask` asks a controller that a driver for user space has. Where a script wants JSON, an error is an object on standard output too.
fn run(system: &System, command: &DeviceCommand, tell: &mut dyn FnMut(&str), ask: &identify::Ask) -> Report {
    let (mut report, bdf) = match command {
        DeviceCommand::List(args) => return list::list(system, args),
        DeviceCommand::Bind(args) => (bind::bind(system, args, tell), args.json.then_some(args.bdf)),
        DeviceCommand::Unbind(args) => (bind::unbind(system, args, tell), args.json.then_some(args.bdf)),
        DeviceCommand::Identify(args) => (identify::report(system, args, ask), args.json.then_some(args.bdf)),
    };
    if let (Some(bdf), Some(error), "") = (bdf, &report.error, &*report.out) {
        report.out = serde_json::json!({ "bdf": bdf, "error": error }).to_string();
    }
    report
}

/// The controller at an address, or what to say.
fn find(system: &System, bdf: Bdf) -> Result<Controller, Report> {
    controller::find(system, bdf).map_err(|error| {
        let exit = match error {
            controller::NotFound::Nothing(_) => Exit::Failed,
            controller::NotFound::OtherClass(..) => Exit::Refused,
        };
        Report::failed(exit, error.to_string())
    })
}
