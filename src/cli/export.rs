//! Files of keys as RESP commands, which `redis-cli --pipe` loads as well as `basalt restore`.
//!
//! ```text
//! SET key value [PXAT milliseconds]      for each key
//! ECHO "basalt-end keys=... crc32=..."   of everything before: a file that was cut short has none
//! ```
//!
//! A file gets its name only when it is whole: until then what is written is beside it, under the name with `.part`.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// How the last command's argument begins.
pub(super) const END_MARK: &str = "basalt-end";

/// Where an export goes.
enum Target {
    Stdout(io::Stdout),
    /// A pipe or another thing that is no file.
    Device(File),
    File {
        file: File,
        part: PathBuf,
        path: PathBuf,
    },
}

/// An export that is being written.
pub(super) struct Export {
    out: BufWriter<Target>,
    command: Vec<u8>,
    crc: crc32fast::Hasher,
    key_count: u64,
}

/// Why an export was not begun.
#[derive(Debug)]
pub(super) enum Refused {
    /// There is a file, and nothing was said about replacing it.
    Exists,
    /// It can't be written.
    Io(io::Error),
}

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Target::Stdout(out) => out.write(bytes),
            Target::Device(file) | Target::File { file, .. } => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Target::Stdout(out) => out.flush(),
            Target::Device(file) | Target::File { file, .. } => file.flush(),
        }
    }
}

impl Export {
    /// Begins an export; `-` is standard output.
    pub(super) fn create(path: &Path, force: bool) -> Result<Export, Refused> {
        let target = if path.as_os_str() == "-" {
            Target::Stdout(io::stdout())
        } else {
            match fs::metadata(path) {
                Ok(metadata) if metadata.is_file() && !force => return Err(Refused::Exists),
                Ok(metadata) if !metadata.is_file() => {
                    Target::Device(File::options().write(true).open(path).map_err(Refused::Io)?)
                }
                _ => {
                    let mut part = path.as_os_str().to_owned();
                    part.push(".part");
                    let part = PathBuf::from(part);
                    let file = File::create(&part).map_err(Refused::Io)?;
                    Target::File { file, part, path: path.to_owned() }
                }
            }
        };
        let out = BufWriter::with_capacity(1 << 20, target);
        Ok(Export { out, command: Vec::new(), crc: crc32fast::Hasher::new(), key_count: 0 })
    }

    /// Writes one key.
    pub(super) fn set(&mut self, key: &[u8], value: &[u8], expires_at_ms: u64) -> io::Result<()> {
        self.key_count += 1;
        if expires_at_ms == 0 {
            return self.put(&[b"SET", key, value]);
        }
        self.put(&[b"SET", key, value, b"PXAT", expires_at_ms.to_string().as_bytes()])
    }

    fn put(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        self.command.clear();
        put_command(&mut self.command, parts);
        self.crc.update(&self.command);
        self.out.write_all(&self.command)
    }

    /// Ends it: what was written is on the disk under its name when this returns.
    pub(super) fn finish(mut self) -> io::Result<()> {
        let end = end_mark(self.key_count, self.crc.clone().finalize());
        self.put(&[b"ECHO", end.as_bytes()])?;
        self.out.flush()?;
        if let Target::File { file, part, path } = self.out.get_ref() {
            file.sync_all()?;
            fs::rename(part, path)?;
            // The new name is durable with its directory.
            let directory = path.parent().filter(|one| !one.as_os_str().is_empty());
            File::open(directory.unwrap_or(Path::new(".")))?.sync_all()?;
        }
        Ok(())
    }

    /// Gives up: nothing is left under any name.
    pub(super) fn abandon(self) {
        if let Target::File { part, .. } = self.out.get_ref() {
            // If it can't be removed it stays, under a name that says what it is.
            let _ = fs::remove_file(part);
        }
        // What is still in the buffer would be written by the drop.
        let _ = self.out.into_parts();
    }
}

/// What the last command says.
pub(super) fn end_mark(key_count: u64, crc: u32) -> String {
    format!("{END_MARK} keys={key_count} crc32={crc:08x}")
}

/// Appends one command as clients send it.
pub(super) fn put_command(out: &mut Vec<u8>, parts: &[&[u8]]) {
    let number = |out: &mut Vec<u8>, kind: u8, count: usize| {
        out.push(kind);
        out.extend_from_slice(count.to_string().as_bytes());
        out.extend_from_slice(b"\r\n");
    };
    number(out, b'*', parts.len());
    for part in parts {
        number(out, b'$', part.len());
        out.extend_from_slice(part);
        out.extend_from_slice(b"\r\n");
    }
}
