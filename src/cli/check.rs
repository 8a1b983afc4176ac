//! `basalt check`: reads and verifies everything, changes nothing.

use super::device_path::{self, OpenOptions, with_namespace};
use super::engine_name::EngineName;
use super::progress::Progress;
use super::{CheckArgs, Exit, fail_on, say};
use crate::device::Namespace;
use crate::engine::check::{Report, check as check_device};
use crate::engine::recovery::Damage;
use crate::size;

pub(super) fn check(args: &CheckArgs) -> Exit {
    let failed = |exit, text: String| fail_on(args.device.display(), args.json, exit, text);
    if let Some(why) = args.engine.and_then(EngineName::why_not_served) {
        return failed(Exit::Refused, why.to_owned());
    }
    let could_not = |text| failed(Exit::CouldNotRun, text);
    let namespace = match device_path::open(
        &args.device,
        OpenOptions { engine: args.engine, spdk: Some(&args.spdk), queue_count: 1, ..OpenOptions::default() },
    ) {
        Ok(namespace) => namespace,
        Err(error) => return could_not(error.to_string()),
    };
    let name = args.device.display().to_string();
    let mut progress = Progress::new("checking");
    let report = with_namespace!(&namespace, namespace => match namespace.open_queue() {
        Ok(mut queue) => check_device(&mut queue, &mut |done, total| progress.show(done, total)).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    });
    progress.end();
    let report = match report {
        Ok(report) => report,
        Err(text) => return could_not(format!("{name}: {text}")),
    };
    if args.json {
        let mut json = serde_json::json!(report);
        json["device"] = name.into();
        json["clean"] = report.is_clean().into();
        say(json);
    } else {
        print(&name, &report);
    }
    if report.is_clean() { Exit::Done } else { Exit::DamageFound }
}

fn print(name: &str, report: &Report) {
    say(format!(
        "{name}: {}, UUID {}, {}, {} of {} extents used, {}, {} in {} ({})",
        size::show(report.device_size_bytes),
        report.uuid,
        size::count(report.shard_count.into(), "shard"),
        report.extents_used,
        report.extent_count,
        size::count(report.keys, "key"),
        size::count(report.records, "record"),
        size::count(report.frames, "frame"),
        size::show(report.log_bytes)
    ));
    if report.checkpoints > 0 {
        say(format!("{}, compared with the log", size::count(report.checkpoints.into(), "checkpoint")));
    }
    if report.incomplete_checkpoints > 0 {
        let checkpoints = size::count(report.incomplete_checkpoints.into(), "checkpoint");
        say(format!("{checkpoints} cut short: no damage, the next start reads more of the log"));
    }
    for copy in &report.bad_superblock_copies {
        say(format!("bad superblock {copy} (the others agree; the next start repairs it)"));
    }
    for torn in &report.torn_tails {
        say(format!(
            "shard {}: the log ends in a write that was in flight at the last crash (extent {}, byte {}): no acknowledged data is affected",
            torn.shard, torn.extent, torn.offset
        ));
    }
    for one in &report.damage {
        say(format!("damaged: {}", show(one)));
    }
    for one in &report.superseded {
        say(format!("superseded: {}", show(one)));
    }
    if !report.superseded.is_empty() {
        say(format!(
            "{} superseded: no key depends on what was there; the space comes back when it is collected",
            size::count(report.superseded.len() as u64, "damaged place")
        ));
    }
    if report.is_clean() {
        say("clean".to_owned());
        return;
    }
    say(format!(
        "damage found: {} place(s) in the log, {} superblock copies",
        report.damage.len(),
        report.bad_superblock_copies.len()
    ));
    if report.damage.iter().any(|one| one.key.is_some()) {
        say("write or delete the keys named above: each answers an error until then".to_owned());
    }
    if report.damage.iter().any(|one| one.key.is_none()) {
        say("where no key is named it is not known which keys are affected: those that may be answer errors until they are written again; `basalt salvage` saves what can be read".to_owned());
    }
}

fn show(one: &Damage) -> String {
    let shard = one.shard.map_or(String::new(), |shard| format!("shard {shard}, "));
    let key = one.key.as_ref().map_or(String::new(), |key| format!("key '{key}', "));
    format!("{key}{shard}extent {}, byte {} ({} bytes): {}", one.extent, one.offset, one.size, one.what)
}
