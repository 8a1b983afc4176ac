//! `basalt inspect`: what is on a device, for people (and as JSON for programs).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};

use super::device_path::{self, DEVICE_DEFAULT, OpenOptions, with_namespace};
use super::progress::Progress;
use super::{Exit, SpdkArgs, fail_on, note, say};
use crate::device::{Device, Namespace};
use crate::engine::device_format::OpenError;
use crate::engine::inspect::{
    CheckpointState, CheckpointView, ExtentContents, ExtentView, Inspection, KeyView, RecordView,
    SuperblockView,
};
use crate::engine::op::Key;
use crate::size;

/// `basalt inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// What the device is formatted as, and each copy that says so.
    Superblock(On),
    /// Every extent: whose it is, and how much of it is live. Reads the whole log.
    Extents(On),
    /// Frames and records of one extent, whether they count or not.
    Extent {
        /// The extent's number
        number: u32,
        #[command(flatten)]
        on: On,
    },
    /// Every checkpoint of the index: how much of the log it covers, and whether a start uses it. Reads all of them.
    Checkpoint(On),
    /// Where the newest record of a key is, and which others are still there. Reads the log of the key's shard.
    Key {
        /// The key
        key: OsString,
        /// The key is given as messages show it, with escapes such as \x00
        #[arg(long)]
        escaped: bool,
        #[command(flatten)]
        on: On,
    },
}

/// Which device, and how it is told.
#[derive(Debug, Args)]
struct On {
    /// File, block device or NVMe controller, as for serve; no node may be serving it
    #[arg(long, value_name = "PATH", default_value = DEVICE_DEFAULT)]
    device: PathBuf,
    /// Show it as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    spdk: SpdkArgs,
}

/// What was looked at.
enum Seen {
    Superblock(SuperblockView),
    Extents(Vec<ExtentView>),
    Extent(ExtentContents),
    NoSuchExtent(u32),
    Checkpoints(Vec<CheckpointView>),
    Key(KeyView),
}

pub(super) fn inspect(args: &InspectArgs) -> Exit {
    let on = match &args.what {
        What::Superblock(on)
        | What::Extents(on)
        | What::Extent { on, .. }
        | What::Checkpoint(on)
        | What::Key { on, .. } => on,
    };
    let options = OpenOptions { spdk: Some(&on.spdk), queue_count: 1, ..OpenOptions::default() };
    let name = on.device.display().to_string();
    let failed = |exit, text: String| fail_on(&name, on.json, exit, text);
    let key = match key_of(&args.what) {
        Ok(key) => key,
        Err(text) => return failed(Exit::Usage, text),
    };
    let namespace = match device_path::open(&on.device, options) {
        Ok(namespace) => namespace,
        Err(error) => return failed(Exit::Failed, error.to_string()),
    };
    let mut progress = Progress::new("reading");
    let seen = with_namespace!(&namespace, namespace => match namespace.open_queue() {
        Ok(queue) => look(queue, &args.what, &key, &mut progress).map_err(|error| format!("{name}: {error}")),
        Err(error) => Err(error.to_string()),
    });
    progress.end();
    match seen {
        Err(text) => return failed(Exit::Failed, text),
        Ok(Seen::NoSuchExtent(count)) => {
            return failed(Exit::Usage, format!("{name} has extents 0 to {}", count.saturating_sub(1)));
        }
        Ok(Seen::Superblock(view)) if on.json => say(serde_json::json!(view)),
        Ok(Seen::Extents(views)) if on.json => say(serde_json::json!({ "extents": views })),
        Ok(Seen::Extent(view)) if on.json => say(serde_json::json!(view)),
        Ok(Seen::Checkpoints(views)) if on.json => say(serde_json::json!({ "checkpoints": views })),
        Ok(Seen::Key(view)) if on.json => say(serde_json::json!(view)),
        Ok(Seen::Superblock(view)) => print_superblock(&view),
        Ok(Seen::Extents(views)) => print_extents(&views),
        Ok(Seen::Extent(view)) => print_extent(&view),
        Ok(Seen::Checkpoints(views)) => print_checkpoints(&views),
        Ok(Seen::Key(view)) => print_key(&view),
    }
    Exit::Done
}

fn key_of(what: &What) -> Result<Key, String> {
    let What::Key { key, escaped, .. } = what else { return Ok(Key::new()) };
    let bytes = key.clone().into_vec();
    if !escaped {
        return Ok(bytes.into());
    }
    let shown = String::from_utf8_lossy(&bytes).into_owned();
    unescape(&bytes).map(Key::from).ok_or_else(|| format!("'{shown}' has an escape that is none"))
}

/// The bytes that `escape_ascii` shows so.
fn unescape(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'\\' {
            out.push(*first);
            continue;
        }
        let (kind, after) = rest.split_first()?;
        rest = after;
        out.push(match kind {
            b't' => b'\t',
            b'r' => b'\r',
            b'n' => b'\n',
            b'\\' | b'\'' | b'"' => *kind,
            b'x' => {
                let (digits, after) = rest.split_at_checked(2)?;
                rest = after;
                u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?
            }
            _ => return None,
        });
    }
    Some(out)
}

fn look<D: Device>(device: D, what: &What, key: &Key, progress: &mut Progress) -> Result<Seen, OpenError> {
    let mut inspection = Inspection::open(device)?;
    for text in &inspection.notes {
        note(text);
    }
    let mut show = |done, total| progress.show(done, total);
    Ok(match what {
        What::Superblock(_) => Seen::Superblock(inspection.superblock()?),
        What::Extents(_) => Seen::Extents(inspection.extents(&mut show)?),
        What::Extent { number, .. } => match inspection.extent(*number)? {
            Some(contents) => Seen::Extent(contents),
            None => Seen::NoSuchExtent(inspection.superblock()?.extent_count),
        },
        What::Checkpoint(_) => Seen::Checkpoints(inspection.checkpoints(&mut show)?),
        What::Key { .. } => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            let now_ms = now.map_or(0, |since| since.as_millis() as u64);
            Seen::Key(inspection.key(key, now_ms, &mut show)?)
        }
    })
}

fn print_superblock(view: &SuperblockView) {
    let label = if view.label.is_empty() { "none" } else { &view.label };
    for (name, value) in [
        ("UUID", view.uuid.clone()),
        ("label", label.to_owned()),
        ("format version", view.format_version.to_string()),
        ("generation", view.generation.to_string()),
        ("starts", view.boot.to_string()),
        ("formatted at", format!("{} ms since 1970", view.created_ms)),
        ("device size", format!("{} bytes ({})", view.device_size_bytes, size::show(view.device_size_bytes))),
        ("found", format!("{} bytes", view.found_size_bytes)),
        ("block size", format!("{} bytes", view.block_size_bytes)),
        ("extents", format!("{} of {}", view.extent_count, size::show(view.extent_size_bytes))),
        ("shards", view.shard_count.to_string()),
        ("index", view.index.to_owned()),
    ] {
        say(format!("{name:15} {value}"));
    }
    for copy in &view.copies {
        let state = match (&copy.error, copy.generation) {
            (Some(error), _) => format!("bad: {error}"),
            (None, Some(generation)) => format!("good, generation {generation}"),
            (None, None) => "missing".to_owned(),
        };
        say(format!("copy {}          at byte {}: {state}", copy.copy, copy.offset_bytes));
    }
}

fn print_extents(views: &[ExtentView]) {
    say(
        "extent  state   shard  frames                 used          live          carried       dead (bytes)",
    );
    let (mut free, mut live, mut dead) = (0, 0, 0);
    for view in views {
        if view.shard.is_none() {
            free += 1;
            continue;
        }
        live += view.live_bytes;
        dead += view.dead_bytes;
        let number = |value: Option<u64>| value.map_or("-".to_owned(), |value| value.to_string());
        let state = format!("{:?}", view.state).to_lowercase();
        let shard = view.shard.map_or("-".to_owned(), |shard| shard.to_string());
        let frames = format!("{}..{}", number(view.first_frame), number(view.last_frame));
        say(format!(
            "{:<7} {state:<7} {shard:<6} {frames:<22} {:<13} {:<13} {:<13} {}{}",
            view.extent,
            view.used_bytes,
            view.live_bytes,
            view.carried_bytes,
            view.dead_bytes,
            match view.holds {
                _ if view.reserve => "  (from the reserve)",
                Some("survivors") => "  (survivors: units)",
                _ => "",
            }
        ));
    }
    let (live, dead) = (size::show(live), size::show(dead));
    say(format!("{} extents, {free} never used, {live} live, {dead} dead", views.len()));
}

fn print_extent(view: &ExtentContents) {
    let of = match (view.shard, view.epoch) {
        (Some(shard), Some(epoch)) => format!("shard {shard}, epoch {epoch}"),
        _ => "no header: never used, or nobody's".to_owned(),
    };
    let what = if view.holds == Some("survivors") { "unit" } else { "frame" };
    let count = view.frames.len();
    say(format!("extent {} at byte {}: {of}, {count} {what}s", view.extent, view.offset_bytes));
    for at in &view.unreadable_offsets_bytes {
        say(format!("unreadable: the block at byte {at}"));
    }
    let part =
        |words: &str, number: Option<u64>| number.map_or(String::new(), |one| format!("{words} {one}"));
    for frame in &view.frames {
        say(format!(
            "{what} {} at byte {}, {} bytes ({} used), boot {}{}{}{}{}",
            frame.frame,
            frame.offset_bytes,
            frame.size_bytes,
            frame.payload_bytes,
            frame.boot,
            part(", durable to", frame.durable_frame),
            part(", sequences from", frame.first_sequence),
            part(", behind frame", frame.follows_frame),
            if frame.clean_stop { ", clean stop" } else { "" }
        ));
        for record in &frame.records {
            say(format!("  {}", line_of(record)));
        }
        for one in &frame.damage {
            say(format!("  damaged: byte {} ({} bytes): {}", one.offset, one.size, one.what));
        }
    }
}

fn print_checkpoints(views: &[CheckpointView]) {
    if views.is_empty() {
        say("no checkpoint: a start reads the whole log");
    }
    for view in views {
        let state = match view.state {
            CheckpointState::Used => "a start uses it".to_owned(),
            CheckpointState::Superseded => "newer ones take its place".to_owned(),
            CheckpointState::Incomplete => {
                "not whole, so it does not count: cut short, or its space is in use again".to_owned()
            }
            CheckpointState::Foreign => {
                format!("of version {}, which this program leaves alone", view.version)
            }
        };
        let extents = view.extents.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let keys: u64 = view.shards.iter().map(|shard| shard.keys).sum();
        say(format!(
            "checkpoint {}, boot {}, {}: {state}",
            view.checkpoint,
            view.boot,
            size::count(keys, "key")
        ));
        say(format!("  extents {extents}"));
        for shard in &view.shards {
            say(format!(
                "  shard {:<5} to frame {}, {} ({} with an expiry, {} long in {}), {} undecided{}{}",
                shard.shard,
                shard.frame,
                size::count(shard.keys, "key"),
                shard.expiring_keys,
                shard.long_values,
                size::count(shard.chunks, "chunk"),
                size::count(shard.undecided_parts, "part"),
                if shard.clean_stop { ", clean stop" } else { "" },
                if shard.used { "" } else { ", superseded" }
            ));
        }
    }
}

fn line_of(record: &RecordView) -> String {
    let mut text = format!(
        "{} '{}' sequence {}, extent {}, byte {}, {} bytes, value {} bytes",
        record.kind,
        record.key,
        record.sequence,
        record.extent,
        record.offset_bytes,
        record.size_bytes,
        record.value_bytes
    );
    if record.expires_at_ms != 0 {
        text.push_str(&format!(", expires at {} ms since 1970", record.expires_at_ms));
    }
    if let Some(batch) = &record.batch {
        text.push_str(&format!(", batch {batch}"));
    }
    if !record.value_intact {
        text.push_str(", DAMAGED: the value does not match its checksum");
    }
    text
}

fn print_key(view: &KeyView) {
    let state = format!("{:?}", view.state).to_lowercase();
    say(format!("key '{}': {state}, slot {}, shard {}", view.key, view.slot, view.shard));
    if let Some(record) = &view.newest {
        say(format!("newest: {}", line_of(record)));
        if let Some(chunks) = &view.chunks {
            let damaged = match chunks.damaged {
                0 => String::new(),
                damaged => format!(", {damaged} of them can't be read"),
            };
            say(format!("chunks: {}{damaged}", chunks.count));
        }
    }
    for one in &view.others {
        say(format!("{}: {}", one.why, line_of(&one.record)));
    }
}

#[cfg(test)]
mod tests {
    use super::unescape;

    #[test]
    fn what_is_shown_escaped_is_read_back() {
        let every: Vec<u8> = (0..=255).collect();
        assert_eq!(unescape(every.escape_ascii().to_string().as_bytes()), Some(every));
        for wrong in ["\\", "\\x", "\\x0", "\\xzz", "\\q"] {
            assert_eq!(unescape(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
