//! What already lives on a device: partition tables, file systems and other stores that `format` must not overwrite.
//!
//! The offsets and magic numbers are those of util-linux's libblkid (`libblkid/src/{superblocks,partitions}/`), which
//! takes them from each format's own documentation. The superblock of this program is recognised elsewhere: the caller
//! asks for it first. Nothing here trusts the device: every read is bounded and nothing but bytes is compared.

use std::io;

/// Bytes at each end of a device that are searched for any data at all.
const SAMPLE_SIZE: u64 = 1 << 20;

/// Something that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// In words, for a message.
    pub what: String,
    /// The byte at which it was recognised.
    pub offset: u64,
}

/// Where a magic number is: from the start, or from the end of the device rounded down to a multiple.
#[derive(Clone, Copy)]
enum At {
    Start(u64),
    /// So many bytes before the end, from an end rounded down to this multiple.
    End(u64, u64),
}

use At::{End, Start};

/// Magic numbers that settle the matter by themselves.
const MAGICS: &[(&str, At, &[u8])] = &[
    // UEFI 2.10, 5.3.2: the header is at LBA 1, whose size may be 512 or 4096; the backup is in the last block.
    ("a GPT partition table", Start(512), b"EFI PART"),
    ("a GPT partition table", Start(4096), b"EFI PART"),
    ("a backup GPT partition table", End(512, 512), b"EFI PART"),
    ("a backup GPT partition table", End(4096, 4096), b"EFI PART"),
    ("an XFS file system", Start(0), b"XFSB"),
    ("a Btrfs file system", Start(0x1_0040), b"_BHRfS_M"),
    ("an F2FS file system", Start(0x400), b"\x10\x20\xf5\xf2"),
    ("an exFAT file system", Start(3), b"EXFAT   "),
    ("an NTFS file system", Start(3), b"NTFS    "),
    ("a FAT file system", Start(54), b"FAT12   "),
    ("a FAT file system", Start(54), b"FAT16   "),
    ("a FAT file system", Start(82), b"FAT32   "),
    // The magic ends the first page, whose size depends on the machine.
    ("swap space", Start(4096 - 10), b"SWAPSPACE2"),
    ("swap space", Start(4096 - 10), b"SWAP-SPACE"),
    ("swap space", Start(16_384 - 10), b"SWAPSPACE2"),
    ("swap space", Start(65_536 - 10), b"SWAPSPACE2"),
    // The label may be in any of the first four 512-byte blocks.
    ("an LVM physical volume", Start(0), b"LABELONE"),
    ("an LVM physical volume", Start(512), b"LABELONE"),
    ("an LVM physical volume", Start(1024), b"LABELONE"),
    ("an LVM physical volume", Start(1536), b"LABELONE"),
    ("a LUKS1 encrypted volume", Start(0), b"LUKS\xba\xbe\x00\x01"),
    ("a LUKS2 encrypted volume", Start(0), b"LUKS\xba\xbe\x00\x02"),
    ("a secondary LUKS2 header", Start(0x4000), b"SKUL\xba\xbe\x00\x02"),
    // Linux md: 1.1 at the start, 1.2 at 4 KiB, 1.0 8 KiB before the end, 0.90 64 KiB before the end.
    ("a Linux RAID member (1.1)", Start(0), b"\xfc\x4e\x2b\xa9"),
    ("a Linux RAID member (1.2)", Start(4096), b"\xfc\x4e\x2b\xa9"),
    ("a Linux RAID member (1.0)", End(8192, 4096), b"\xfc\x4e\x2b\xa9"),
    ("a Linux RAID member (0.90)", End(65_536, 65_536), b"\xfc\x4e\x2b\xa9"),
    (
        "a bcache device",
        Start(4096 + 24),
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
    ),
    // SPDK, lib/blob/blobstore.h: SPDK_BS_SUPER_BLOCK_SIG.
    ("an SPDK blobstore", Start(0), b"SPDKBLOB"),
    ("an ISO 9660 file system", Start(0x8001), b"CD001"),
    ("a SquashFS file system", Start(0), b"hsqs"),
    (
        "a bcachefs file system",
        Start(4096 + 24),
        b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef",
    ),
    ("a ReiserFS file system", Start(0x1_0034), b"ReIsEr"),
    ("a JFS file system", Start(0x8000), b"JFS1"),
    ("a Ceph BlueStore device", Start(0), b"bluestore block device"),
    ("a VMFS volume", Start(0x10_0000), b"\x0d\xd0\x01\xc0"),
    ("a GFS2 file system", Start(0x1_0000), b"\x01\x16\x19\x70"),
];

/// The magic of a ZFS uberblock, in either byte order.
const ZFS_MAGICS: [[u8; 8]; 2] = [[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0xba, 0xb1, 0x0c]];

/// ZFS labels: two of 256 KiB at each end; their uberblocks start 128 KiB in and are at least 1 KiB apart.
const ZFS_LABEL_SIZE: u64 = 256 << 10;

/// Looks for anything that lives on a device of `size` bytes. `read` gives so many bytes from an offset; the ranges asked
/// for are multiples of 4096 within the device, except that the last one may end with it.
pub fn probe(mut read: impl FnMut(u64, u64) -> io::Result<Vec<u8>>, size: u64) -> io::Result<Vec<Finding>> {
    // Everything known lies within 1 MiB and a little of either end, so two reads see all of it.
    let first = Window::read(&mut read, 0, size.min(SAMPLE_SIZE + 4096))?;
    let last_start = size.saturating_sub(SAMPLE_SIZE) / 4096 * 4096;
    let last = Window::read(&mut read, last_start, size - last_start)?;
    let mut findings = Vec::new();
    for &(what, at, magic) in MAGICS {
        let (window, offset) = match at {
            Start(offset) => (&first, offset),
            End(before, multiple) => match (size / multiple * multiple).checked_sub(before) {
                Some(offset) => (&last, offset),
                None => continue,
            },
        };
        if window.get(offset, magic.len()) == Some(magic) {
            findings.push(Finding { what: what.to_owned(), offset });
        }
    }
    findings.extend(ext(&first));
    findings.extend(zfs(&first, &last, size));
    findings.extend(mbr(&first));
    if findings.is_empty() {
        let data = [&first, &last].into_iter().find_map(Window::first_data);
        findings.extend(data.map(|offset| Finding { what: "non-zero data".to_owned(), offset }));
    }
    Ok(findings)
}

/// Bytes of the device and where they start.
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn read(
        read: &mut impl FnMut(u64, u64) -> io::Result<Vec<u8>>,
        start: u64,
        size: u64,
    ) -> io::Result<Window> {
        let bytes = read(start, size)?;
        if bytes.len() as u64 != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Window { start, bytes })
    }

    fn get(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let at = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        self.bytes.get(at..at.checked_add(len)?)
    }

    fn first_data(&self) -> Option<u64> {
        let at = self.bytes.iter().position(|&byte| byte != 0)?;
        Some(self.start + at as u64)
    }
}

/// ext2, ext3 and ext4 share a magic of two bytes (Documentation/filesystems/ext4: s_magic at 0x38 of the superblock at
/// 1024); the block size and the inode count keep chance away, and the features say which of them it is.
fn ext(first: &Window) -> Option<Finding> {
    let superblock = first.get(1024, 0x68)?;
    let word = |at: usize| {
        superblock[at..at + 4].iter().rev().fold(0_u32, |word, &byte| word << 8 | u32::from(byte))
    };
    if superblock[0x38..0x3a] != [0x53, 0xef] || word(0) == 0 || word(0x18) > 6 {
        return None;
    }
    let (compatible, incompatible) = (word(0x5c), word(0x60));
    // Extents, 64-bit, flexible groups (incompatible); journal (compatible).
    let what = match (incompatible & 0x2c0 != 0, compatible & 4 != 0) {
        (true, _) => "an ext4 file system",
        (false, true) => "an ext3 file system",
        (false, false) => "an ext2 file system",
    };
    Some(Finding { what: what.to_owned(), offset: 1024 + 0x38 })
}

fn zfs(first: &Window, last: &Window, size: u64) -> Option<Finding> {
    let end = size / ZFS_LABEL_SIZE * ZFS_LABEL_SIZE;
    let labels = [
        (first, Some(0)),
        (first, Some(ZFS_LABEL_SIZE)),
        (last, end.checked_sub(2 * ZFS_LABEL_SIZE)),
        (last, end.checked_sub(ZFS_LABEL_SIZE)),
    ];
    labels.into_iter().find_map(|(window, label)| {
        let ring = label? + ZFS_LABEL_SIZE / 2;
        let mut uberblocks = (ring..ring + ZFS_LABEL_SIZE / 2).step_by(1024);
        let is_uberblock =
            |&at: &u64| window.get(at, 8).is_some_and(|found| ZFS_MAGICS.iter().any(|magic| magic == found));
        uberblocks.find(is_uberblock).map(|offset| Finding { what: "a ZFS pool member".to_owned(), offset })
    })
}

/// An MBR with at least one partition whose entry makes sense; boot sectors of file systems carry 55 AA as well.
fn mbr(first: &Window) -> Option<Finding> {
    let sector = first.get(0, 512)?;
    if sector[510..] != [0x55, 0xaa] {
        return None;
    }
    let entries: Vec<&[u8]> = sector[446..510].chunks(16).collect();
    let is_used = |entry: &&&[u8]| entry[4] != 0;
    let is_sane = |entry: &&[u8]| entry[0] & 0x7f == 0 && entry[12..16] != [0; 4];
    let used = entries.iter().filter(is_used).count();
    let is_table = used > 0 && entries.iter().filter(is_used).all(is_sane);
    let plural = if used == 1 { "" } else { "s" };
    is_table.then(|| Finding {
        what: format!("an MBR partition table with {used} partition{plural}"),
        offset: 446,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const SIZE: u64 = 16 << 20;

    fn probe_bytes(bytes: &[u8]) -> Vec<Finding> {
        let read = |offset: u64, size: u64| {
            assert!(offset.is_multiple_of(4096));
            Ok(bytes[offset as usize..(offset + size) as usize].to_vec())
        };
        probe(read, bytes.len() as u64).unwrap()
    }

    fn data_at(offset: u64) -> [Finding; 1] {
        [Finding { what: "non-zero data".to_owned(), offset }]
    }

    fn names(bytes: &[u8]) -> Vec<String> {
        probe_bytes(bytes).into_iter().map(|finding| finding.what).collect()
    }

    #[test]
    fn a_blank_device_has_nothing_and_any_byte_is_something() {
        let mut bytes = vec![0; SIZE as usize];
        assert_eq!(probe_bytes(&bytes), []);
        bytes[SIZE as usize / 2] = 1;
        assert_eq!(probe_bytes(&bytes), []);
        bytes[SIZE as usize - 1] = 1;
        assert_eq!(probe_bytes(&bytes), data_at(SIZE - 1));
        bytes[70_000] = 1;
        assert_eq!(probe_bytes(&bytes), data_at(70_000));
    }

    #[test]
    fn every_magic_is_found_on_odd_sizes_too_and_none_by_any_other_byte() {
        for size in [SIZE, SIZE + 512, SIZE + 4096 + 1536] {
            for &(what, at, magic) in MAGICS {
                let mut bytes = vec![0; size as usize];
                let offset = match at {
                    Start(offset) => offset,
                    End(before, multiple) => size / multiple * multiple - before,
                };
                bytes[offset as usize..][..magic.len()].copy_from_slice(magic);
                let found = probe_bytes(&bytes);
                assert!(
                    found.contains(&Finding { what: what.to_owned(), offset }),
                    "{what} on {size}: {found:?}"
                );
                bytes[offset as usize] ^= 1;
                assert!(!names(&bytes).iter().any(|name| name == what), "{what}");
            }
        }
    }

    #[test]
    fn zfs_labels_are_found_at_either_end() {
        for label in [0, ZFS_LABEL_SIZE, SIZE - 2 * ZFS_LABEL_SIZE, SIZE - ZFS_LABEL_SIZE] {
            for magic in ZFS_MAGICS {
                let mut bytes = vec![0; SIZE as usize];
                let at = label + (128 << 10) + 7 * 1024;
                bytes[at as usize..][..8].copy_from_slice(&magic);
                assert_eq!(
                    probe_bytes(&bytes),
                    [Finding { what: "a ZFS pool member".to_owned(), offset: at }]
                );
            }
        }
    }

    #[test]
    fn an_mbr_needs_a_partition_that_makes_sense() {
        let mut bytes = vec![0; SIZE as usize];
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(probe_bytes(&bytes), data_at(510));
        bytes[446 + 4] = 0x83;
        assert_eq!(probe_bytes(&bytes), data_at(450));
        bytes[446 + 12] = 1;
        assert_eq!(names(&bytes), ["an MBR partition table with 1 partition"]);
        bytes[446] = 0x33;
        assert_eq!(probe_bytes(&bytes), data_at(446));
    }

    /// Real ones, where the tools are installed.
    #[test]
    fn what_the_tools_make_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        let cases: [(&str, &[&str], &str); 5] = [
            ("mkfs.ext4", &["-q", "-F"], "an ext4 file system"),
            ("mkfs.ext3", &["-q", "-F"], "an ext3 file system"),
            ("mkfs.ext2", &["-q", "-F"], "an ext2 file system"),
            ("mkswap", &["-q"], "swap space"),
            ("mkfs.vfat", &[], "a FAT file system"),
        ];
        for (tool, arguments, what) in cases {
            std::fs::write(&path, vec![0; SIZE as usize]).unwrap();
            let program = ["/usr/sbin/", "/sbin/", "/usr/bin/"].map(|folder| format!("{folder}{tool}"));
            let Some(program) = program.iter().find(|program| std::path::Path::new(program).exists()) else {
                println!("{tool} is not installed: not tested");
                continue;
            };
            let output = Command::new(program).args(arguments).arg(&path).output().unwrap();
            assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
            let found = names(&std::fs::read(&path).unwrap());
            assert!(found.iter().any(|name| name == what), "{tool}: {found:?}");
        }
    }

    #[test]
    fn tiny_devices_and_failing_reads_are_no_panic() {
        for size in [0, 1, 511, 512, 4096, 70_000] {
            assert_eq!(probe_bytes(&vec![0; size]), []);
        }
        assert!(probe(|_, _| Err(io::ErrorKind::Other.into()), SIZE).is_err());
        assert!(probe(|_, _| Ok(Vec::new()), SIZE).is_err());
    }
}
