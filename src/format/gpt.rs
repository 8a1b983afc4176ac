//! The protective partition table: one GPT partition over the whole device, so that partitioners and installers see an
//! occupied disk. Its type GUID is SPDK's own, which SPDK's set-up script recognises and still binds.
//!
//! Source: UEFI specification 2.10, section 5.3 (GPT) and 5.2.3 (protective MBR).

use crate::limits::DEVICE_MARGIN_SIZE;

/// The partition type: 6527994e-2c5a-4eec-9613-8f5944074e8b, in the mixed-endian form of the specification.
pub const TYPE_GUID: [u8; 16] =
    [0x4e, 0x99, 0x27, 0x65, 0x5a, 0x2c, 0xec, 0x4e, 0x96, 0x13, 0x8f, 0x59, 0x44, 0x07, 0x4e, 0x8b];

const ENTRY_COUNT: u32 = 128;
const ENTRY_SIZE: u32 = 128;
const HEADER_SIZE: u32 = 92;

/// Bytes to write at the start and at the end of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionTable {
    /// Protective MBR, header and entries, from byte 0.
    pub start: Vec<u8>,
    /// Entries and backup header; its last byte is the device's last.
    pub end: Vec<u8>,
}

/// Makes the table for a device of `size` bytes as seen by tools that count in `block_size` bytes.
pub fn encode(uuid: &[u8; 16], size: u64, block_size: u32) -> PartitionTable {
    let block = u64::from(block_size);
    let block_count = size / block;
    let entries_size = u64::from(ENTRY_COUNT * ENTRY_SIZE).next_multiple_of(block);
    let entry_blocks = entries_size / block;
    let mut entries = vec![0; entries_size as usize];
    let (first, last) = (DEVICE_MARGIN_SIZE / block, (size - DEVICE_MARGIN_SIZE) / block - 1);
    entries[0..16].copy_from_slice(&TYPE_GUID);
    entries[16..32].copy_from_slice(uuid);
    entries[32..40].copy_from_slice(&first.to_le_bytes());
    entries[40..48].copy_from_slice(&last.to_le_bytes());
    for (i, unit) in "Basalt".encode_utf16().enumerate() {
        entries[56 + 2 * i..58 + 2 * i].copy_from_slice(&unit.to_le_bytes());
    }
    let entries_sum = crc32fast::hash(&entries[..(ENTRY_COUNT * ENTRY_SIZE) as usize]);
    let header = |own: u64, other: u64, entries_at: u64| {
        let mut out = vec![0; block_size as usize];
        out[0..8].copy_from_slice(b"EFI PART");
        out[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
        out[12..16].copy_from_slice(&HEADER_SIZE.to_le_bytes());
        out[24..32].copy_from_slice(&own.to_le_bytes());
        out[32..40].copy_from_slice(&other.to_le_bytes());
        out[40..48].copy_from_slice(&(2 + entry_blocks).to_le_bytes());
        out[48..56].copy_from_slice(&(block_count - 2 - entry_blocks).to_le_bytes());
        // The disk's GUID differs from the partition's in one bit, so that both are unique.
        out[56..72].copy_from_slice(uuid);
        out[71] ^= 1;
        out[72..80].copy_from_slice(&entries_at.to_le_bytes());
        out[80..84].copy_from_slice(&ENTRY_COUNT.to_le_bytes());
        out[84..88].copy_from_slice(&ENTRY_SIZE.to_le_bytes());
        out[88..92].copy_from_slice(&entries_sum.to_le_bytes());
        let sum = crc32fast::hash(&out[..HEADER_SIZE as usize]);
        out[16..20].copy_from_slice(&sum.to_le_bytes());
        out
    };
    let mut start = vec![0; block_size as usize];
    start[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]);
    let mbr_blocks = u32::try_from(block_count - 1).unwrap_or(u32::MAX);
    start[458..462].copy_from_slice(&mbr_blocks.to_le_bytes());
    start[510..512].copy_from_slice(&[0x55, 0xaa]);
    start.extend(header(1, block_count - 1, 2));
    start.extend_from_slice(&entries);
    let mut end = entries;
    end.extend(header(block_count - 1, 1, block_count - 1 - entry_blocks));
    PartitionTable { start, end }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_places_are_as_the_specification_says() {
        for block_size in [512u32, 4096] {
            let size = 64u64 << 20;
            let table = encode(&[3; 16], size, block_size);
            let block = block_size as usize;
            for (bytes, own) in
                [(&table.start[block..], 1u64), (&table.end[16384..], size / u64::from(block_size) - 1)]
            {
                assert_eq!(&bytes[..8], b"EFI PART");
                assert_eq!(u64::from_le_bytes(bytes[24..32].try_into().unwrap()), own);
                let mut header = bytes[..92].to_vec();
                let stored = u32::from_le_bytes(header[16..20].try_into().unwrap());
                header[16..20].fill(0);
                assert_eq!(stored, crc32fast::hash(&header));
            }
            assert_eq!(&table.start[510..512], &[0x55, 0xaa]);
            assert!(
                table.start.len() as u64 <= DEVICE_MARGIN_SIZE
                    && table.end.len() as u64 <= DEVICE_MARGIN_SIZE
            );
        }
    }
}
