//! `basalt dump` and `basalt restore`: a running node's keys as they are at one moment, to a file and back.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use clap::Args;

use super::export::{END_MARK, Export, end_mark, put_command};
use super::node_client::{NodeArgs, NodeClient, Reply, invalid, read_bytes, read_line};
use super::progress::Progress;
use super::salvage::{begin, tell};
use super::{Exit, fail, note, say};
use crate::size;

/// `basalt dump`.
#[derive(Debug, Args)]
pub(super) struct DumpArgs {
    /// File for the keys, as RESP commands; - is standard output
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// Replace the file if it is there.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    node: NodeArgs,
}

/// `basalt restore`.
#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// File that `dump` or `salvage` wrote
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    /// Restore although the node has keys. Those that the file has too are overwritten; the others stay.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    node: NodeArgs,
}

/// Commands that are under way at a time.
const PIPELINE_DEPTH: usize = 256;

/// Bytes of commands that are under way at a time, beyond which replies come first.
const PIPELINE_SIZE: usize = 4 << 20;

/// Parts of one command of an export.
const PARTS_MAX: u64 = 5;

/// The longest key or value of an export.
const PART_SIZE_MAX: u64 = 1 << 30;

pub(super) fn dump(args: &DumpArgs) -> Exit {
    let mut client = match NodeClient::connect(&args.node) {
        Ok(client) => client,
        Err(text) => return fail(Exit::Failed, text),
    };
    let mut export = match begin(&args.to, args.force) {
        Ok(export) => export,
        Err((exit, text)) => return fail(exit, text),
    };
    let mut progress = Progress::new("dumping");
    let dumped = read_all(&mut client, &mut progress, &mut export);
    progress.end();
    let to_stdout = args.to.as_os_str() == "-";
    match dumped {
        Err(text) => {
            export.abandon();
            fail(Exit::Failed, text)
        }
        Ok(Dumped { keys, bytes, lost }) => {
            if let Err(error) = export.finish() {
                return fail(Exit::Failed, format!("{}: {error}", args.to.display()));
            }
            let lost_text =
                if lost == 0 { String::new() } else { format!(", {lost} that can't be read left out") };
            tell(to_stdout, format!("{keys} keys ({}){lost_text}", size::show(bytes)));
            if lost == 0 { Exit::Done } else { Exit::DamageFound }
        }
    }
}

#[derive(Default)]
struct Dumped {
    keys: u64,
    bytes: u64,
    lost: u64,
}

fn read_all(client: &mut NodeClient, progress: &mut Progress, export: &mut Export) -> Result<Dumped, String> {
    let broken = |error: io::Error| format!("the node does not go on: {error}");
    let number = match client.call(&[b"BASALT.DUMP", b"BEGIN"]).map_err(broken)? {
        Reply::Int(number) => number.to_string(),
        Reply::Error(text) => return Err(text),
        other => return Err(format!("the node answers {other:?}: is it a basalt of this version?")),
    };
    let total = match client.call(&[b"DBSIZE"]).map_err(broken)? {
        Reply::Int(keys) => keys as u64,
        _ => 0,
    };
    let next = [&b"BASALT.DUMP"[..], b"NEXT", number.as_bytes()];
    let mut dumped = Dumped::default();
    client.send(&next).map_err(broken)?;
    loop {
        let mut items = match client.receive().map_err(broken)? {
            Reply::Array(items) => items.into_iter(),
            Reply::Error(text) => return Err(text),
            other => return Err(format!("the node answers {other:?}")),
        };
        let is_last = items.next() == Some(Reply::Int(1));
        if !is_last {
            // The node reads the next ones while these are written.
            client.send(&next).map_err(broken)?;
        }
        while let Some(key) = items.next() {
            match (key, items.next(), items.next()) {
                (Reply::Bytes(key), Some(Reply::Bytes(value)), Some(Reply::Int(expiry))) => {
                    dumped.keys += 1;
                    dumped.bytes += (key.len() + value.len()) as u64;
                    export.set(&key, &value, expiry as u64).map_err(|error| error.to_string())?;
                }
                (key @ (Reply::Bytes(_) | Reply::Nil), Some(Reply::Error(text)), _) => {
                    dumped.lost += 1;
                    progress.end();
                    let what = match key {
                        Reply::Bytes(key) => format!("key '{}'", key.escape_ascii()),
                        _ => "a record whose key cannot be read".to_owned(),
                    };
                    note(format!("lost: {what}: {text}"));
                }
                other => return Err(format!("the node answers {other:?}")),
            }
        }
        progress.show_count(dumped.keys, total, "keys");
        if is_last {
            // The pins would go by themselves, later.
            let _ = client.call(&[b"BASALT.DUMP", b"END", number.as_bytes()]);
            return Ok(dumped);
        }
    }
}

pub(super) fn restore(args: &RestoreArgs) -> Exit {
    let name = args.from.display().to_string();
    let total = match whole(&args.from) {
        Ok(total) => total,
        Err(error) => return fail(Exit::Failed, format!("{name}: {error}; nothing was restored")),
    };
    let mut client = match NodeClient::connect(&args.node) {
        Ok(client) => client,
        Err(text) => return fail(Exit::Failed, text),
    };
    match client.call(&[b"DBSIZE"]) {
        Ok(Reply::Int(0)) => {}
        Ok(Reply::Int(keys)) if !args.force => {
            return fail(
                Exit::Refused,
                format!("the node has {keys} keys: restore into an empty one, or say --force"),
            );
        }
        Ok(Reply::Error(text)) => return fail(Exit::Failed, text),
        Ok(_) => {}
        Err(error) => return fail(Exit::Failed, error),
    }
    let mut progress = Progress::new("restoring");
    let restored = load(&args.from, &mut client, total, &mut progress);
    progress.end();
    match restored {
        Ok((keys, 0)) => {
            say(format!("{name}: {keys} keys restored"));
            Exit::Done
        }
        Ok((keys, errors)) => fail(
            Exit::Failed,
            format!(
                "{name}: the node refused {errors} of {keys} keys; those before and behind them are there"
            ),
        ),
        Err(error) => fail(Exit::Failed, format!("{name}: {error}; a part may have been restored")),
    }
}

/// Sends everything; how many keys that were, and how many of them the node refused.
fn load(path: &Path, client: &mut NodeClient, total: u64, progress: &mut Progress) -> io::Result<(u64, u64)> {
    let mut commands = Commands::open(path)?;
    let (mut keys, mut errors, mut under_way, mut sizes) = (0, 0, 0, 0);
    let mut raw = Vec::new();
    let mut settle = |client: &mut NodeClient, under_way: &mut usize| -> io::Result<()> {
        while *under_way > 0 {
            *under_way -= 1;
            if let Reply::Error(text) = client.receive()? {
                errors += 1;
                if errors <= 10 {
                    note(text);
                }
            }
        }
        Ok(())
    };
    while let Some(parts) = commands.next()? {
        if parts[0] != b"SET" {
            continue;
        }
        raw.clear();
        put_command(&mut raw, &parts.iter().map(Vec::as_slice).collect::<Vec<_>>());
        client.send_raw(&raw)?;
        keys += 1;
        under_way += 1;
        sizes += raw.len();
        if under_way >= PIPELINE_DEPTH || sizes >= PIPELINE_SIZE {
            settle(client, &mut under_way)?;
            sizes = 0;
            progress.show(commands.done, total);
        }
    }
    settle(client, &mut under_way)?;
    Ok((keys, errors))
}

/// Reads a file to its end and verifies it. Its size in bytes.
fn whole(path: &Path) -> io::Result<u64> {
    let mut commands = Commands::open(path)?;
    while commands.next()?.is_some() {}
    Ok(commands.done)
}

/// The commands of an export, verified as they are read.
struct Commands<R> {
    input: R,
    crc: crc32fast::Hasher,
    key_count: u64,
    /// Bytes read.
    done: u64,
    has_ended: bool,
}

impl Commands<BufReader<File>> {
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Commands::new(BufReader::with_capacity(1 << 20, File::open(path)?)))
    }
}

impl<R: Read> Commands<R> {
    fn new(input: R) -> Commands<R> {
        Commands { input, crc: crc32fast::Hasher::new(), key_count: 0, done: 0, has_ended: false }
    }

    /// The next command; `None` at the end, which only a whole file has.
    fn next(&mut self) -> io::Result<Option<Vec<Vec<u8>>>> {
        let parts = match self.read() {
            Ok(Some(_)) if self.has_ended => return Err(invalid("something follows its end")),
            Ok(Some(parts)) => parts,
            Ok(None) if self.has_ended => return Ok(None),
            Ok(None) => return Err(invalid("it was cut short: its end is missing")),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(invalid("it was cut short within a command"));
            }
            Err(error) => return Err(error),
        };
        let is_end =
            parts[0] == b"ECHO" && parts.get(1).is_some_and(|end| end.starts_with(END_MARK.as_bytes()));
        if is_end {
            if parts[1] != end_mark(self.key_count, self.crc.clone().finalize()).as_bytes() {
                return Err(invalid("it is damaged: its checksum or its number of keys is wrong"));
            }
            self.has_ended = true;
            return Ok(Some(parts));
        }
        let is_set = parts[0] == b"SET" && (parts.len() == 3 || (parts.len() == 5 && parts[3] == b"PXAT"));
        if !is_set {
            return Err(invalid("it has another command than those that dump and salvage write"));
        }
        self.key_count += 1;
        let mut bytes = Vec::new();
        put_command(&mut bytes, &parts.iter().map(Vec::as_slice).collect::<Vec<_>>());
        self.crc.update(&bytes);
        self.done += bytes.len() as u64;
        Ok(Some(parts))
    }

    fn read(&mut self) -> io::Result<Option<Vec<Vec<u8>>>> {
        let mut first = [0];
        if self.input.read(&mut first)? == 0 {
            return Ok(None);
        }
        let other = || invalid("it is not what dump and salvage write");
        if first[0] != b'*' {
            return Err(other());
        }
        let number = |text: &str, max: u64| text.parse::<u64>().ok().filter(|number| *number <= max);
        let count = number(&read_line(&mut self.input)?, PARTS_MAX).filter(|count| *count > 0);
        let mut parts = Vec::new();
        for _ in 0..count.ok_or_else(other)? {
            let line = read_line(&mut self.input)?;
            let size =
                line.strip_prefix('$').and_then(|text| number(text, PART_SIZE_MAX)).ok_or_else(other)?;
            parts.push(read_bytes(&mut self.input, size)?);
        }
        Ok(Some(parts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export() -> Vec<u8> {
        let mut out = Vec::new();
        put_command(&mut out, &[b"SET", b"key", b"va\r\nlue"]);
        put_command(&mut out, &[b"SET", b"", b"", b"PXAT", b"4102444800000"]);
        let end = end_mark(2, crc32fast::hash(&out));
        put_command(&mut out, &[b"ECHO", end.as_bytes()]);
        out
    }

    fn read(bytes: &[u8]) -> Result<u64, String> {
        let mut commands = Commands::new(bytes);
        loop {
            match commands.next() {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(commands.key_count),
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    #[test]
    fn only_a_whole_export_is_read() {
        let whole = export();
        assert_eq!(read(&whole), Ok(2));
        for cut in 0..whole.len() {
            assert!(read(&whole[..cut]).is_err(), "{cut} bytes of it");
        }
        for at in 0..whole.len() {
            for bit in [1, 0x40] {
                let mut flipped = whole.clone();
                flipped[at] ^= bit;
                assert!(read(&flipped).is_err(), "byte {at}, bit {bit:#x}");
            }
        }
        assert!(read(&[whole.clone(), whole].concat()).is_err());
        let mut other = Vec::new();
        put_command(&mut other, &[b"FLUSHALL"]);
        assert!(read(&other).is_err_and(|text| text.contains("another command")));
    }
}
