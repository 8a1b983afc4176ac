//! Reading a file of exported keys, without the node's own code.

use std::collections::BTreeMap;

/// Keys with their values and the texts of their expiries.
pub type Parsed = BTreeMap<Vec<u8>, (Vec<u8>, Option<Vec<u8>>)>;

/// What an export holds: keys with their values and expiries. Parsed without the node's own code.
#[track_caller]
pub fn parse(bytes: &[u8]) -> Parsed {
    let mut at = 0;
    let line = |at: &mut usize| {
        let end = memchr::memmem::find(&bytes[*at..], b"\r\n").expect("a line ends");
        let text = std::str::from_utf8(&bytes[*at..*at + end]).unwrap().to_owned();
        *at += end + 2;
        text
    };
    let mut found = BTreeMap::new();
    let mut ended = false;
    while at < bytes.len() {
        assert!(!ended, "something follows the end mark");
        let count: usize = line(&mut at).strip_prefix('*').unwrap().parse().unwrap();
        let mut parts = Vec::new();
        for _ in 0..count {
            let size: usize = line(&mut at).strip_prefix('$').unwrap().parse().unwrap();
            parts.push(bytes[at..at + size].to_vec());
            assert_eq!(&bytes[at + size..at + size + 2], b"\r\n");
            at += size + 2;
        }
        match parts.iter().map(Vec::as_slice).collect::<Vec<_>>().as_slice() {
            [b"SET", key, value] => {
                assert!(found.insert(key.to_vec(), (value.to_vec(), None)).is_none(), "a key came twice");
            }
            [b"SET", key, value, b"PXAT", expiry] => {
                let before = found.insert(key.to_vec(), (value.to_vec(), Some(expiry.to_vec())));
                assert!(before.is_none(), "a key came twice");
            }
            [b"ECHO", end] => {
                let text = String::from_utf8_lossy(end).into_owned();
                assert!(text.starts_with(&format!("basalt-end keys={} crc32=", found.len())), "{text}");
                ended = true;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(ended, "the end mark is missing");
    found
}
