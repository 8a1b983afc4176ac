//! Responses and their bytes, in RESP2 and RESP3.

use std::borrow::Cow;

use bytes::{BufMut, Bytes, BytesMut};

use crate::engine::action::format_float;
use crate::engine::op::Reply;

/// The protocol version that a connection speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// What every client understands, and every connection starts with.
    #[default]
    Resp2,
    /// After `HELLO 3`.
    Resp3,
}

/// One reply to a client. What RESP2 has no type for is written as its nearest one.
#[derive(Debug, Clone, PartialEq)]
pub enum Response {
    /// No reply at all: the connection closes instead (SHUTDOWN).
    Nothing,
    /// `OK`.
    Ok,
    /// No value.
    Nil,
    /// No array (EXEC whose watched keys changed): another null in RESP2.
    NilArray,
    /// An integer.
    Int(i64),
    /// A byte string.
    Bulk(Bytes),
    /// A short text without line ends.
    Simple(Cow<'static, str>),
    /// An error, its prefix included; line ends become spaces.
    Error(Cow<'static, str>),
    /// An array.
    Array(Vec<Response>),
    /// Pairs; in RESP2 an array of twice as many.
    Map(Vec<(Response, Response)>),
    /// Distinct elements; in RESP2 an array.
    Set(Vec<Response>),
    /// A float; in RESP2 a byte string.
    Double(f64),
    /// A boolean; in RESP2 1 or 0.
    Boolean(bool),
    /// A text to be shown as it is; in RESP2 a byte string.
    Verbatim(String),
    /// Something nobody asked for; in RESP2 an array.
    Push(Vec<Response>),
}

impl From<Reply> for Response {
    fn from(reply: Reply) -> Self {
        match reply {
            Reply::Ok => Self::Ok,
            Reply::Nil => Self::Nil,
            Reply::Int(number) => Self::Int(number),
            Reply::Bulk(bytes) => Self::Bulk(bytes),
            Reply::Simple(text) => Self::Simple(Cow::Borrowed(text)),
            Reply::Array(items) => Self::Array(items.into_iter().map(Self::from).collect()),
            Reply::Error(error) => Self::Error(error.to_string().into()),
        }
    }
}

impl Response {
    /// An error from its text.
    pub fn error(text: impl Into<Cow<'static, str>>) -> Self {
        Self::Error(text.into())
    }

    /// A byte string from a text.
    pub fn bulk(text: &str) -> Self {
        Self::Bulk(Bytes::copy_from_slice(text.as_bytes()))
    }

    /// About how many bytes of memory it holds while it waits to be written.
    pub fn size(&self) -> usize {
        const OVERHEAD: usize = 16;
        OVERHEAD
            + match self {
                Self::Bulk(bytes) => bytes.len(),
                Self::Simple(text) | Self::Error(text) => text.len(),
                Self::Verbatim(text) => text.len(),
                Self::Array(items) | Self::Set(items) | Self::Push(items) => {
                    items.iter().map(Self::size).sum()
                }
                Self::Map(pairs) => pairs.iter().map(|(key, value)| key.size() + value.size()).sum(),
                _ => 0,
            }
    }

    /// Writes it.
    pub fn encode(&self, version: Version, out: &mut BytesMut) {
        let resp3 = version == Version::Resp3;
        match self {
            Self::Nothing => {}
            Self::Ok => out.put_slice(b"+OK\r\n"),
            Self::Nil if resp3 => out.put_slice(b"_\r\n"),
            Self::Nil => out.put_slice(b"$-1\r\n"),
            Self::NilArray if resp3 => out.put_slice(b"_\r\n"),
            Self::NilArray => out.put_slice(b"*-1\r\n"),
            Self::Int(number) => put_number(out, b':', *number),
            Self::Bulk(bytes) => put_bulk(out, bytes),
            Self::Simple(text) => put_line(out, b'+', text),
            Self::Error(text) => put_line(out, b'-', text),
            Self::Array(items) => put_items(out, b'*', items, version),
            Self::Set(items) => put_items(out, if resp3 { b'~' } else { b'*' }, items, version),
            Self::Push(items) => put_items(out, if resp3 { b'>' } else { b'*' }, items, version),
            Self::Map(pairs) => {
                let (kind, count) = if resp3 { (b'%', pairs.len()) } else { (b'*', pairs.len() * 2) };
                put_count(out, kind, count);
                for (key, value) in pairs {
                    key.encode(version, out);
                    value.encode(version, out);
                }
            }
            Self::Double(number) => {
                let text = format_float(*number);
                if resp3 { put_line(out, b',', &text) } else { put_bulk(out, text.as_bytes()) }
            }
            Self::Boolean(yes) if resp3 => out.put_slice(if *yes { b"#t\r\n" } else { b"#f\r\n" }),
            Self::Boolean(yes) => put_number(out, b':', i64::from(*yes)),
            Self::Verbatim(text) if resp3 => {
                put_count(out, b'=', text.len() + 4);
                out.put_slice(b"txt:");
                out.put_slice(text.as_bytes());
                out.put_slice(b"\r\n");
            }
            Self::Verbatim(text) => put_bulk(out, text.as_bytes()),
        }
    }
}

fn put_number(out: &mut BytesMut, kind: u8, number: i64) {
    out.put_u8(kind);
    out.put_slice(itoa::Buffer::new().format(number).as_bytes());
    out.put_slice(b"\r\n");
}

fn put_count(out: &mut BytesMut, kind: u8, count: usize) {
    out.put_u8(kind);
    out.put_slice(itoa::Buffer::new().format(count).as_bytes());
    out.put_slice(b"\r\n");
}

/// Writes a byte string.
pub fn put_bulk(out: &mut BytesMut, bytes: &[u8]) {
    put_count(out, b'$', bytes.len());
    out.put_slice(bytes);
    out.put_slice(b"\r\n");
}

/// Writes a text that must stay on one line: a client's own bytes may be part of it.
fn put_line(out: &mut BytesMut, kind: u8, text: &str) {
    out.put_u8(kind);
    for byte in text.bytes() {
        out.put_u8(if byte == b'\r' || byte == b'\n' { b' ' } else { byte });
    }
    out.put_slice(b"\r\n");
}

fn put_items(out: &mut BytesMut, kind: u8, items: &[Response], version: Version) {
    put_count(out, kind, items.len());
    for item in items {
        item.encode(version, out);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line<'a>(bytes: &mut &'a [u8]) -> &'a str {
        let end = memchr::memmem::find(bytes, b"\r\n").unwrap();
        let line = std::str::from_utf8(&bytes[..end]).unwrap();
        *bytes = &bytes[end + 2..];
        line
    }

    fn take<'a>(bytes: &mut &'a [u8], size: usize) -> &'a [u8] {
        let (taken, rest) = bytes.split_at(size);
        *bytes = rest.strip_prefix(b"\r\n").unwrap();
        taken
    }

    /// Reads RESP3 back; only for tests.
    fn decode(bytes: &mut &[u8]) -> Response {
        let head = line(bytes);
        let (kind, rest) = head.split_at(1);
        let count = || rest.parse::<usize>().unwrap();
        match kind {
            "+" if rest == "OK" => Response::Ok,
            "+" => Response::Simple(rest.to_owned().into()),
            "-" => Response::Error(rest.to_owned().into()),
            ":" => Response::Int(rest.parse().unwrap()),
            "_" => Response::Nil,
            "," => Response::Double(rest.parse().unwrap()),
            "#" => Response::Boolean(rest == "t"),
            "$" => Response::Bulk(Bytes::copy_from_slice(take(bytes, count()))),
            "=" => Response::Verbatim(String::from_utf8(take(bytes, count())[4..].to_vec()).unwrap()),
            "*" => Response::Array((0..count()).map(|_| decode(bytes)).collect()),
            "~" => Response::Set((0..count()).map(|_| decode(bytes)).collect()),
            ">" => Response::Push((0..count()).map(|_| decode(bytes)).collect()),
            "%" => Response::Map((0..count()).map(|_| (decode(bytes), decode(bytes))).collect()),
            other => unreachable!("kind {other}"),
        }
    }

    fn responses() -> impl Strategy<Value = Response> {
        let leaf = prop_oneof![
            Just(Response::Ok),
            Just(Response::Nil),
            any::<i64>().prop_map(Response::Int),
            prop::collection::vec(any::<u8>(), 0..20).prop_map(|b| Response::Bulk(b.into())),
            "[a-z ]{0,10}".prop_map(|s| Response::Simple(s.into())),
            "ERR [a-z ]{0,10}".prop_map(|s| Response::Error(s.into())),
            "[a-zé\r\n]{0,10}".prop_map(Response::Verbatim),
            (-1e9..1e9).prop_map(Response::Double),
            any::<bool>().prop_map(Response::Boolean),
        ];
        leaf.prop_recursive(3, 30, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Response::Array),
                prop::collection::vec(inner.clone(), 0..4).prop_map(Response::Set),
                prop::collection::vec(inner.clone(), 0..4).prop_map(Response::Push),
                prop::collection::vec((inner.clone(), inner), 0..4).prop_map(Response::Map),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(response in responses()) {
            let mut out = BytesMut::new();
            response.encode(Version::Resp3, &mut out);
            let mut bytes = out.as_ref();
            prop_assert_eq!(decode(&mut bytes), response);
            prop_assert!(bytes.is_empty());
        }
    }

    #[test]
    fn resp2_has_its_own_words_for_what_it_lacks() {
        for (response, resp2, resp3) in [
            (Response::Nil, "$-1\r\n", "_\r\n"),
            (Response::NilArray, "*-1\r\n", "_\r\n"),
            (
                Response::Map(vec![(Response::Int(1), Response::Ok)]),
                "*2\r\n:1\r\n+OK\r\n",
                "%1\r\n:1\r\n+OK\r\n",
            ),
            (Response::Set(vec![Response::Int(1)]), "*1\r\n:1\r\n", "~1\r\n:1\r\n"),
            (Response::Double(1.5), "$3\r\n1.5\r\n", ",1.5\r\n"),
            (Response::Boolean(true), ":1\r\n", "#t\r\n"),
            (Response::Verbatim("hi".into()), "$2\r\nhi\r\n", "=6\r\ntxt:hi\r\n"),
            (Response::error("ERR a\r\nb"), "-ERR a  b\r\n", "-ERR a  b\r\n"),
        ] {
            for (version, expected) in [(Version::Resp2, resp2), (Version::Resp3, resp3)] {
                let mut out = BytesMut::new();
                response.encode(version, &mut out);
                assert_eq!(out, expected.as_bytes(), "{response:?}");
            }
        }
    }
}
