//! `basalt device list`.

use super::contents::Contents;
use super::{Inspection, ListArgs, Report};
use crate::pci::controller::{self, Controller, Namespace};
use crate::pci::system::System;
use crate::pci::users;
use crate::size;

pub(super) fn list(system: &System, args: &ListArgs) -> Report {
    let controllers = controller::list(system);
    let inspected: Vec<_> = controllers.iter().map(|one| (one, Inspection::new(system, one))).collect();
    if args.json {
        let values: Vec<_> =
            inspected.iter().map(|(one, inspection)| json(system, one, inspection)).collect();
        return Report::done(serde_json::json!({ "controllers": values }).to_string());
    }
    if controllers.is_empty() {
        return Report::done(
            "This machine has no NVMe controller on PCI. `basalt serve` works on a file or any block device.",
        );
    }
    let header =
        ["ADDRESS", "MODEL", "SERIAL", "FIRMWARE", "SIZE", "DRIVER", "NUMA", "IOMMU", "BLOCK DEVICES"];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(controllers.iter().map(row));
    let mut out = String::new();
    let widths: Vec<usize> = (0..header.len())
        .map(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0))
        .collect();
    for (at, row) in rows.iter().enumerate() {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}"));
        out += cells.collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
        if let Some((one, inspection)) = at.checked_sub(1).map(|at| &inspected[at]) {
            for line in details(system, one, inspection) {
                out += &format!("    {line}\n");
            }
        }
    }
    Report::done(out.trim_end())
}

fn row(one: &Controller) -> [String; 9] {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    let disks: Vec<&str> = one.namespaces.iter().map(|namespace| namespace.name.as_str()).collect();
    [
        one.bdf.to_string(),
        one.model.clone().unwrap_or_else(|| one.pci_id.clone()),
        or_dash(&one.serial),
        or_dash(&one.firmware),
        one.size().map_or("-".into(), size::show),
        one.driver.clone().unwrap_or_else(|| "none".into()),
        one.numa_node.map_or("-".into(), |node| node.to_string()),
        or_dash(&one.iommu_group),
        if disks.is_empty() { "-".into() } else { disks.join(" ") },
    ]
}

/// Who uses it and what is on it.
fn details(system: &System, one: &Controller, inspection: &Inspection) -> Vec<String> {
    let mut lines = Vec::new();
    for owner in users::user_space_owners(system, one.bdf) {
        lines.push(owner.what);
    }
    match one.driver.as_deref() {
        None => lines.push("no driver has it: the kernel shows nothing of what is on it".to_owned()),
        Some(driver) if one.is_user_space() => lines.push(format!(
            "bound to {driver} for user space: model, serial number and contents show when it is opened, or after `basalt \
             device unbind {}`",
            one.bdf
        )),
        Some(_) => {}
    }
    for namespace in &one.namespaces {
        lines.push(format!(
            "{}: {}{}",
            namespace.name,
            size::show(namespace.size),
            namespace.partitions.iter().map(|one| format!(", {}", one.name)).collect::<String>()
        ));
        let found = inspection.contents.iter().find(|found| found.namespace == namespace.name);
        let Some(found) = found else { continue };
        lines.extend(found.not_read.iter().map(|why| format!("  contents not read: {why}")));
        lines.extend(shown(namespace, &found.contents).into_iter().map(|line| format!("  {line}")));
    }
    for user in &inspection.users {
        let mark = if user.is_system { " (this machine runs from it)" } else { "" };
        lines.push(format!("  {}{mark}", user.what));
    }
    lines
}

fn shown(namespace: &Namespace, contents: &Contents) -> Vec<String> {
    if let Some(basalt) = &contents.basalt {
        let label = if basalt.label.is_empty() { String::new() } else { format!(" '{}'", basalt.label) };
        let starts = size::count(basalt.starts, "time");
        return vec![format!("the Basalt device{label} {}, started {starts}", basalt.uuid)];
    }
    let is_listed = |what: &&String| {
        !namespace.partitions.iter().any(|one| what.contains(&format!("partition {}", one.name)))
    };
    contents.data.iter().filter(is_listed).cloned().collect()
}

fn json(system: &System, one: &Controller, inspection: &Inspection) -> serde_json::Value {
    let mut value = serde_json::json!(one);
    value["size"] = one.size().into();
    value["users"] = serde_json::json!(inspection.users);
    value["owners"] = serde_json::json!(users::user_space_owners(system, one.bdf));
    let namespaces = value["namespaces"].as_array_mut().into_iter().flatten();
    for (namespace, found) in namespaces.zip(&inspection.contents) {
        namespace["basalt"] = serde_json::json!(found.contents.basalt);
        namespace["data"] = serde_json::json!(found.contents.data);
        namespace["not_read"] = serde_json::json!(found.not_read);
    }
    value
}
