//! `basalt device bind` and `unbind`. Binding destroys nothing by itself, but what is in use loses its disk at once, and
//! what is not in use is about to be formatted: both are refused, only the second can be forced.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::{BindArgs, Inspection, Report, UnbindArgs, find};
use crate::cli::Exit;
use crate::pci::binding::{self, Bound, Failure, Mode, Wish};
use crate::pci::controller::Controller;
use crate::pci::system::System;
use crate::pci::users::{self, User};

pub(super) fn bind(system: &System, args: &BindArgs, tell: &mut dyn FnMut(&str)) -> Report {
    let controller = match find(system, args.bdf) {
        Ok(controller) => controller,
        Err(report) => return report,
    };
    if let Some(report) = wrong_serial(&controller, args) {
        return report;
    }
    if let Some(report) = needs_root(system, args.dry_run, "bind", args.bdf) {
        return report;
    }
    let is_bound = controller.is_user_space()
        && args.driver.is_none_or(|driver| controller.driver.as_deref() == Some(driver.name()));
    // Kept until the driver has changed: it holds the claims.
    let inspection = Inspection::new(system, &controller);
    if !is_bound {
        let mut in_use = inspection.users.clone();
        in_use.extend(users::user_space_owners(system, args.bdf));
        let data = inspection.data();
        if !in_use.is_empty() || (!data.is_empty() && !args.force) {
            return refusal(&controller, &in_use, &data, args);
        }
        for what in &data {
            tell(&format!("forced although there is {what}"));
        }
        if controller.driver.is_none() {
            tell(
                "no driver has it, so what is on it could not be looked at; `format` looks before it writes",
            );
        }
    }
    let wish = Wish { driver: args.driver, hugepages_size: args.hugepages };
    let mode = mode(args.dry_run);
    let result = binding::bind(system, &controller, wish, mode, &interrupts(), tell);
    drop(inspection);
    finished(&controller, result, args.dry_run, args.json, "bound to")
}

pub(super) fn unbind(system: &System, args: &UnbindArgs, tell: &mut dyn FnMut(&str)) -> Report {
    let controller = match find(system, args.bdf) {
        Ok(controller) => controller,
        Err(report) => return report,
    };
    if let Some(report) = needs_root(system, args.dry_run, "unbind", args.bdf) {
        return report;
    }
    if let Some(driver) =
        controller.driver.as_deref().filter(|&driver| driver != "nvme" && !controller.is_user_space())
    {
        let text = format!(
            "{} is with the driver {driver}, which is not one for user space; nothing was changed",
            args.bdf
        );
        return Report::failed(Exit::Refused, text);
    }
    // The kernel would wait for them without an end.
    let owners = users::user_space_owners(system, args.bdf);
    if !owners.is_empty() {
        let mut text = format!("{} is in use. Nothing was changed.", controller.describe());
        list(&mut text, &owners, &format!("basalt device unbind {}", args.bdf));
        return Report::failed(Exit::Refused, text);
    }
    let result = binding::unbind(system, &controller, mode(args.dry_run), &interrupts(), tell);
    finished(&controller, result, args.dry_run, args.json, "back with")
}

fn mode(dry_run: bool) -> Mode {
    if dry_run { Mode::Dry } else { Mode::Take }
}

/// Ctrl-C between two steps undoes what was done instead of leaving a drive without a driver.
fn interrupts() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        // Without the handler an interrupt ends the process, as it does everywhere else.
        let _ = signal_hook::flag::register(signal, Arc::clone(&stop));
    }
    stop
}

fn wrong_serial(controller: &Controller, args: &BindArgs) -> Option<Report> {
    let wanted = args.serial.as_ref()?;
    let text = match &controller.serial {
        Some(serial) if serial == wanted => return None,
        Some(serial) => format!(
            "the serial number of {} is '{serial}', not '{wanted}': this is another drive. Nothing was changed",
            controller.bdf
        ),
        None => format!(
            "the serial number of {0} can't be read while {1} has it: leave out --serial, or run `basalt device unbind {0}` \
             first. Nothing was changed",
            controller.bdf,
            controller.driver.as_ref().map_or("no driver".into(), |driver| format!("the driver {driver}"))
        ),
    };
    Some(Report::failed(Exit::Refused, text))
}

fn needs_root(system: &System, dry_run: bool, verb: &str, bdf: crate::pci::Bdf) -> Option<Report> {
    if dry_run || system.kernel().process().is_root {
        return None;
    }
    let text = format!("changing drivers needs root: sudo basalt device {verb} {bdf}");
    Some(Report::failed(Exit::Failed, text))
}

fn refusal(controller: &Controller, in_use: &[User], data: &[String], args: &BindArgs) -> Report {
    if args.json {
        let text = format!("{} is in use or carries data. Nothing was changed", controller.describe());
        let found = serde_json::json!({
            "bdf": controller.bdf, "model": controller.model, "serial": controller.serial,
            "refused": true, "users": in_use, "data": data, "error": text,
        });
        return Report { out: found.to_string(), error: Some(text), exit: Exit::Refused };
    }
    let again = format!("basalt device bind {}", controller.bdf);
    let mut text = match in_use.is_empty() {
        true => format!("{} carries data. Nothing was changed.", controller.describe()),
        false => format!("{} is in use. Nothing was changed.", controller.describe()),
    };
    text += &data.iter().map(|what| format!("\n  {what}")).collect::<String>();
    if !in_use.is_empty() {
        list(&mut text, in_use, &again);
    } else {
        let disks: Vec<String> = controller
            .namespaces
            .iter()
            // Partitions first: without their table they have no node.
            .flat_map(|disk| disk.partitions.iter().map(|one| &one.name).chain([&disk.name]))
            .map(|name| format!("/dev/{name}"))
            .collect();
        text += &format!(
            "\nTo erase it, which can't be taken back:\n  wipefs --all {}\n  {again}",
            disks.join(" ")
        );
        if let Some(serial) = &controller.serial {
            text += &format!(
                "\nTo bind it as it is (`basalt format` will ask again):\n  {again} --force --serial {}",
                shell_word(serial)
            );
        }
    }
    Report::failed(Exit::Refused, text)
}

/// Serial numbers may hold spaces.
fn shell_word(text: &str) -> String {
    let is_plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if is_plain { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// What uses the device, and the commands that end it.
fn list(text: &mut String, users: &[User], again: &str) {
    for user in users {
        *text += &format!("\n  {}", user.what);
        if user.is_system {
            *text += ": this machine runs from it";
        }
    }
    if users.iter().any(|user| user.is_system) {
        *text += "\nIt can't be freed while this machine runs: choose another drive (`basalt device list`).";
        return;
    }
    let mut commands: Vec<&str> = Vec::new();
    for command in users.iter().flat_map(|user| &user.free) {
        if !commands.contains(&command.as_str()) {
            commands.push(command);
        }
    }
    if !commands.is_empty() {
        commands.push(again);
        *text += &format!("\nTo free it, if nothing needs it any more:\n  {}", commands.join("\n  "));
    }
}

fn finished(
    controller: &Controller,
    result: Result<Bound, Failure>,
    dry_run: bool,
    json: bool,
    how: &str,
) -> Report {
    let bdf = controller.bdf;
    let bound = match result {
        Ok(bound) => bound,
        Err(failure) => {
            let undone: String = failure.undone.iter().map(|text| format!("\n  undone: {text}")).collect();
            let after = match (failure.undone.is_empty(), failure.left.is_empty()) {
                (true, true) => "; nothing was changed",
                (false, true) => "; everything is as it was",
                (_, false) => "; the drive needs you",
            };
            return Report::failed(Exit::Failed, format!("{failure}{after}{undone}"));
        }
    };
    if json {
        let mut value = serde_json::json!(bound);
        value["bdf"] = bdf.to_string().into();
        value["dry_run"] = dry_run.into();
        return Report::done(value.to_string());
    }
    let notes: String = bound.notes.iter().map(|note| format!("note: {note}\n")).collect();
    let driver = &bound.driver;
    let text = match (bound.steps.is_empty(), dry_run, bound.was_bound) {
        (true, ..) => format!("{bdf} is {how} {driver} already; nothing to do"),
        (false, true, _) => format!("dry run: {} steps, none taken", bound.steps.len()),
        (false, false, true) => format!("{bdf} was {how} {driver} already; huge pages are set up"),
        (false, false, false) => format!("{} is {how} {driver}", controller.describe()),
    };
    Report::done(notes + &text)
}
