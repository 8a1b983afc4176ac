//! Mounts in every mount namespace that can be seen.

use std::collections::HashSet;

use crate::pci::system::System;

/// One mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// Major and minor number; of no device for file systems that span several (Btrfs, ZFS).
    pub dev: String,
    /// Where.
    pub at: String,
    /// Kind of file system.
    pub fs: String,
    /// What was mounted, as it was named.
    pub source: String,
    /// A process in whose mount namespace it is, when that is not ours.
    pub process: Option<u32>,
}

/// All mounts, ours first.
pub(super) struct Mounts(Vec<Mount>);

impl Mounts {
    /// Reads ours, which must be there, and those of other processes as far as they may be read.
    pub(super) fn read(system: &System) -> Result<Mounts, String> {
        let own = system
            .read_whole("/proc/self/mountinfo")
            .map_err(|error| format!("/proc/self/mountinfo can't be read ({error}): mount /proc"))?;
        let mut mounts = parse(&own, None);
        let mut seen: HashSet<String> = system.link("/proc/self/ns/mnt").into_iter().collect();
        for entry in system.list("/proc") {
            let Ok(process) = entry.parse::<u32>() else { continue };
            // Without the right to look, exclusive claims still show that a device is in use.
            let Some(namespace) = system.link(&format!("/proc/{process}/ns/mnt")) else { continue };
            if seen.insert(namespace) {
                let text = system.read_whole(&format!("/proc/{process}/mountinfo")).unwrap_or_default();
                mounts.extend(parse(&text, Some(process)));
            }
        }
        Ok(Mounts(mounts))
    }

    /// Mounts of a device by number, or by the name that was given for it where the number tells nothing.
    pub(super) fn of<'a>(
        &'a self,
        dev: &'a str,
        is_at: impl Fn(&str) -> bool,
    ) -> impl Iterator<Item = &'a Mount> {
        let mut seen = HashSet::new();
        let mut found = Vec::new();
        for mount in &self.0 {
            let by_number = !dev.is_empty() && mount.dev == dev;
            // Bcachefs joins its devices with colons. A number of major 0 stands for no single device.
            let by_name = || mount.dev.starts_with("0:") && mount.source.split(':').any(&is_at);
            // A mount that a namespace inherited is the same place, not another.
            if (by_number || by_name()) && seen.insert(&mount.at) {
                found.push(mount);
            }
        }
        // Nested mounts are freed from the inside.
        found.sort_by_key(|mount| std::cmp::Reverse(mount.at.len()));
        found.into_iter()
    }
}

/// proc_pid_mountinfo(5): id, parent, major:minor, root, mount point, options, optional fields, "-", type, source, ...
fn parse(text: &str, process: Option<u32>) -> Vec<Mount> {
    let line = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let dev = left.next()?.to_owned();
        let at = unescape(left.nth(1)?);
        let mut right = right.split(' ');
        let (fs, source) = (right.next()?.to_owned(), unescape(right.next()?));
        Some(Mount { dev, at, fs, source, process })
    };
    text.lines().filter_map(line).collect()
}

/// Undoes the octal escapes of the kernel's tables (`\040` for a space).
pub(super) fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(u8::is_ascii_digit));
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(value.unwrap_or(byte));
        rest = if value.is_some() { &after[3..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_read_with_its_escapes() {
        let text = "36 35 259:2 / /mnt/my\\040disk\\134 rw,noatime master:1 shared:2 - ext4 /dev/nvme0n1p2 rw\nnonsense\n";
        let expected = Mount {
            dev: "259:2".into(),
            at: "/mnt/my disk\\".into(),
            fs: "ext4".into(),
            source: "/dev/nvme0n1p2".into(),
            process: Some(9),
        };
        assert_eq!(parse(text, Some(9)), [expected]);
        assert_eq!(unescape("a\\9x\\"), "a\\9x\\");
    }
}
