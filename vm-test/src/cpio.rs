//! The archive that a kernel unpacks as its first file system: cpio in the "newc" form.
//!
//! Every header field is eight hexadecimal digits; names end with a zero byte; names and contents are padded to four
//! bytes. Directories above an entry are made as needed. See Documentation/driver-api/early-userspace/buffer-format.rst.

use std::collections::BTreeMap;

const MODE_DIRECTORY: u32 = 0o040_000;
const MODE_FILE: u32 = 0o100_000;
const MODE_LINK: u32 = 0o120_000;
const MODE_CHARACTER_DEVICE: u32 = 0o020_000;

/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";

#[derive(Debug)]
struct Entry {
    mode: u32,
    device: (u32, u32),
    contents: Vec<u8>,
}

/// What goes into an archive, by path without a leading slash. Sorted, so that directories precede what is in them.
#[derive(Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// A directory and those above it.
    pub fn directory(&mut self, path: &str) {
        let path = path.trim_matches('/');
        let mut end = 0;
        while end < path.len() {
            end = path[end..].find('/').map_or(path.len(), |at| end + at);
            let entry = Entry { mode: MODE_DIRECTORY | 0o755, device: (0, 0), contents: Vec::new() };
            self.entries.entry(path[..end].to_string()).or_insert(entry);
            end += 1;
        }
    }

    /// A file; `permissions` as in `0o755`.
    pub fn file(&mut self, path: &str, permissions: u32, contents: Vec<u8>) {
        self.add(path, Entry { mode: MODE_FILE | permissions, device: (0, 0), contents });
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, to: &str) {
        self.add(path, Entry { mode: MODE_LINK | 0o777, device: (0, 0), contents: to.into() });
    }

    /// A character device; no root is needed, since it is only a record.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        let mode = MODE_CHARACTER_DEVICE | 0o600;
        self.add(path, Entry { mode, device: (major, minor), contents: Vec::new() });
    }

    fn add(&mut self, path: &str, entry: Entry) {
        let path = path.trim_matches('/');
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above);
        }
        self.entries.insert(path.to_string(), entry);
    }

    /// The archive's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let size: usize =
            self.entries.iter().map(|(name, entry)| name.len() + entry.contents.len() + 128).sum();
        let mut bytes = Vec::with_capacity(size);
        for (number, (name, entry)) in self.entries.iter().enumerate() {
            record(&mut bytes, number as u32 + 1, name, entry);
        }
        record(&mut bytes, 0, TRAILER, &Entry { mode: 0, device: (0, 0), contents: Vec::new() });
        bytes
    }
}

fn record(bytes: &mut Vec<u8>, number: u32, name: &str, entry: &Entry) {
    let size = entry.contents.len() as u32;
    let (major, minor) = entry.device;
    let name_size = name.len() as u32 + 1;
    // inode, mode, uid, gid, links, mtime, size, device of the file (2), device it stands for (2), name size, checksum
    let fields = [number, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
    bytes.extend_from_slice(b"070701");
    for field in fields {
        bytes.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(0);
    pad(bytes);
    bytes.extend_from_slice(&entry.contents);
    pad(bytes);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names, modes and contents, read back by a parser that knows only the format.
    fn parse(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            let field = |at: usize| {
                let digits = std::str::from_utf8(&bytes[6 + 8 * at..14 + 8 * at]).unwrap();
                u32::from_str_radix(digits, 16).unwrap() as usize
            };
            assert_eq!(&bytes[..6], b"070701");
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name_size - 1], 0, "{name} ends with a zero byte");
            let from = (110 + name_size).next_multiple_of(4);
            if name == TRAILER {
                return found;
            }
            found.push((name, mode as u32, bytes[from..from + size].to_vec()));
            bytes = &bytes[(from + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn directories_come_before_what_is_in_them() {
        let mut archive = Archive::default();
        archive.file("/a/b/program", 0o755, b"12345".to_vec());
        archive.link("a/link", "b/program");
        archive.directory("/var/tmp/");
        archive.character_device("dev/console", 5, 1);
        let found = parse(&archive.bytes());
        let names: Vec<&str> = found.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["a", "a/b", "a/b/program", "a/link", "dev", "dev/console", "var", "var/tmp"]);
        assert_eq!((found[2].1, found[2].2.as_slice()), (0o100_755, b"12345".as_slice()));
        assert_eq!((found[3].1, found[3].2.as_slice()), (0o120_777, b"b/program".as_slice()));
        assert_eq!(found[0].1, 0o040_755);
    }
}
