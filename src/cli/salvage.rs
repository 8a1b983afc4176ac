//! `basalt salvage`: everything that can be read of a device that is not served, as commands that load it elsewhere.

use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::device_path::{self, OpenOptions, with_namespace};
use super::export::{Export, Refused};
use super::progress::Progress;
use super::{Exit, SalvageArgs, fail, note, say};
use crate::device::Namespace;
use crate::engine::salvage::{Finding, KeyFinding, Report, SalvageError, Saved, Sink, salvage as save_from};
use crate::size;

struct ToFile {
    export: Export,
    progress: Progress,
    only_certain: bool,
}

impl Sink for ToFile {
    fn save(&mut self, saved: &Saved<'_>) -> io::Result<()> {
        self.export.set(saved.key, saved.value, saved.expires_at_ms)
    }

    fn find(&mut self, finding: Finding) {
        self.progress.end();
        note(text_of(&finding, self.only_certain));
    }

    fn progress(&mut self, done: u64, total: u64) {
        self.progress.show(done, total);
    }
}

pub(super) fn salvage(args: &SalvageArgs) -> Exit {
    let name = args.device.display().to_string();
    let to_stdout = args.to.as_os_str() == "-";
    // Nothing is opened for writing before the device is: a name that was mistyped must not cost a file.
    let options = OpenOptions { spdk: Some(&args.spdk), queue_count: 1, ..OpenOptions::default() };
    let failed = |exit, text: String| {
        if args.json {
            tell(to_stdout, serde_json::json!({ "device": name, "error": text }));
        }
        fail(exit, text)
    };
    let could_not = |text| failed(Exit::CouldNotRun, text);
    let namespace = match device_path::open(&args.device, options) {
        Ok(namespace) => namespace,
        Err(error) => return could_not(error.to_string()),
    };
    let export = match begin(&args.to, args.force) {
        Ok(export) => export,
        Err((exit, text)) => return failed(exit, text),
    };
    let mut sink = ToFile { export, progress: Progress::new("salvaging"), only_certain: args.only_certain };
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let saved = with_namespace!(&namespace, namespace => match namespace.open_queue() {
        Ok(queue) => save_from(queue, args.only_certain, now_ms, &mut sink),
        Err(error) => {
            sink.export.abandon();
            return could_not(error.to_string());
        }
    });
    sink.progress.end();
    let cannot_write = |error: io::Error| failed(Exit::Failed, format!("{}: {error}", args.to.display()));
    let report = match saved {
        Ok(report) => report,
        Err(SalvageError::Open(error)) => {
            sink.export.abandon();
            return could_not(format!("{name}: {error}"));
        }
        Err(SalvageError::Sink(error)) => {
            sink.export.abandon();
            return cannot_write(error);
        }
    };
    if let Err(error) = sink.export.finish() {
        return cannot_write(error);
    }
    if args.json {
        let mut json = serde_json::json!(report);
        json["device"] = name.into();
        json["complete"] = report.is_complete().into();
        tell(to_stdout, json);
    } else {
        tell(to_stdout, summary(&name, &report));
    }
    if report.is_complete() { Exit::Done } else { Exit::DamageFound }
}

/// Begins an export, or says why not.
pub(super) fn begin(to: &Path, force: bool) -> Result<Export, (Exit, String)> {
    Export::create(to, force).map_err(|refused| match refused {
        Refused::Exists => {
            (Exit::Refused, format!("{} is there already: name another file, or say --force", to.display()))
        }
        Refused::Io(error) => (Exit::Failed, format!("{}: {error}", to.display())),
    })
}

/// The summary goes where the data does not.
pub(super) fn tell(data_on_stdout: bool, text: impl std::fmt::Display) {
    if data_on_stdout { note(text) } else { say(text) }
}

fn text_of(finding: &Finding, only_certain: bool) -> String {
    let key = |one: &KeyFinding| {
        let (key, shard) = (one.key.escape_ascii(), one.shard);
        match one.extent {
            0 if one.offset == 0 => format!("key '{key}', shard {shard}"),
            extent => format!("key '{key}', shard {shard}, extent {extent}, byte {}", one.offset),
        }
    };
    let outcome = if only_certain { "left out" } else { "saved" };
    match finding {
        Finding::Note(text) => text.clone(),
        Finding::Damage(one) | Finding::Region(one) => {
            let shard = one.shard.map_or(String::new(), |shard| format!("shard {shard}, "));
            let means = match finding {
                Finding::Region(_) if one.shard.is_some() => {
                    "; any key of this shard may have had a newer value here"
                }
                Finding::Region(_) => "; any key may have had a newer value here",
                _ => "",
            };
            format!(
                "damaged: {shard}extent {}, byte {} ({} bytes): {}{means}",
                one.extent, one.offset, one.size, one.what
            )
        }
        Finding::Shard { shard, what } => format!("lost: all of shard {shard}: {what}"),
        Finding::UnknownKeys { shard } => {
            format!("lost: records of shard {shard}, and it is not known of which keys")
        }
        Finding::Lost(one) => format!("lost: {}: {}", key(one), one.what),
        Finding::Older(one) => format!("older value {outcome}: {}: {}", key(one), one.what),
        Finding::InDoubt(one) => format!("in doubt, {outcome}: {}: {}", key(one), one.what),
    }
}

fn summary(name: &str, report: &Report) -> String {
    let mut text = format!("{name}: {} keys saved ({})", report.keys_saved, size::show(report.bytes_saved));
    for (count, what) in [
        (report.keys_expired, "expired and left out"),
        (report.keys_lost, "lost"),
        (report.keys_older, "with an older value"),
        (report.keys_in_doubt, "in doubt"),
        (report.keys_left_out, "of these left out"),
        (report.shards_in_doubt, "shards that lost records of unknown keys"),
        (report.shards_unreadable, "shards that can't be read"),
        (report.regions_lost, "places that may have held anything"),
    ] {
        if count > 0 {
            text.push_str(&format!(", {count} {what}"));
        }
    }
    let verdict = if report.is_complete() { "nothing was lost" } else { "not everything could be saved" };
    format!("{text}; {verdict}")
}
