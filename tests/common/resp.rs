//! A small blocking client: it shares no code with the node, so that a mistake in the node's protocol code can't hide.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A reply. RESP3's types are decoded as far as the tests speak RESP3.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    Simple(String),
    Error(String),
    Int(i64),
    Bulk(Vec<u8>),
    Nil,
    Array(Vec<Reply>),
    Map(Vec<(Reply, Reply)>),
    Double(f64),
    Bool(bool),
}

impl Reply {
    pub fn ok() -> Reply {
        Reply::Simple("OK".into())
    }

    pub fn bulk(bytes: impl AsRef<[u8]>) -> Reply {
        Reply::Bulk(bytes.as_ref().to_vec())
    }

    #[track_caller]
    pub fn int(&self) -> i64 {
        match self {
            Reply::Int(n) => *n,
            other => panic!("wanted an integer, got {}", other.brief()),
        }
    }

    #[track_caller]
    pub fn array(self) -> Vec<Reply> {
        match self {
            Reply::Array(items) => items,
            other => panic!("wanted an array, got {}", other.brief()),
        }
    }

    /// The bytes of a bulk string, `None` for null.
    #[track_caller]
    pub fn bytes(self) -> Option<Vec<u8>> {
        match self {
            Reply::Bulk(bytes) => Some(bytes),
            Reply::Nil => None,
            other => panic!("wanted a string or null, got {}", other.brief()),
        }
    }

    #[track_caller]
    pub fn error(&self) -> &str {
        match self {
            Reply::Error(text) => text,
            other => panic!("wanted an error, got {}", other.brief()),
        }
    }

    pub fn is_error(&self) -> bool {
        matches!(self, Reply::Error(_))
    }

    /// For messages: long strings are cut.
    pub fn brief(&self) -> String {
        match self {
            Reply::Bulk(bytes) if bytes.len() > 80 => {
                format!("Bulk({} bytes: {:?}...)", bytes.len(), String::from_utf8_lossy(&bytes[..60]))
            }
            Reply::Bulk(bytes) => format!("Bulk({:?})", String::from_utf8_lossy(bytes)),
            Reply::Array(items) if items.len() > 8 => format!("Array of {}", items.len()),
            other => format!("{other:?}"),
        }
    }
}

/// One command in RESP's array form.
pub fn encode(args: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + args.iter().map(|a| a.len() + 16).sum::<usize>());
    encode_into(&mut out, args);
    out
}

pub fn encode_into(out: &mut Vec<u8>, args: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", args.len()).as_bytes());
    for arg in args {
        out.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
        out.extend_from_slice(arg);
        out.extend_from_slice(b"\r\n");
    }
}

/// `call!(client, "SET", &key, value)`: one command and its reply; a lost connection fails the test.
macro_rules! call {
    ($client:expr, $($arg:expr),+ $(,)?) => {
        $client.call(&[$(AsRef::<[u8]>::as_ref(&$arg)),+])
    };
}
pub(crate) use call;

/// A connection. Every wait has a deadline, so that a node that hangs fails a test and does not hang it.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
    position: usize,
}

impl Client {
    pub fn connect(address: SocketAddr) -> io::Result<Client> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.set_write_timeout(Some(Duration::from_secs(60)))?;
        Ok(Client { stream, buffer: Vec::new(), position: 0 })
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub fn set_timeout(&self, timeout: Duration) {
        self.stream.set_read_timeout(Some(timeout)).expect("a positive timeout");
        self.stream.set_write_timeout(Some(timeout)).expect("a positive timeout");
    }

    #[track_caller]
    pub fn call(&mut self, args: &[&[u8]]) -> Reply {
        match self.try_call(args) {
            Ok(reply) => reply,
            Err(e) => panic!("{}: {e}", String::from_utf8_lossy(args[0])),
        }
    }

    pub fn try_call(&mut self, args: &[&[u8]]) -> io::Result<Reply> {
        self.send(&encode(args))?;
        self.read()
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The next reply, in the order of the commands.
    pub fn read(&mut self) -> io::Result<Reply> {
        let line = self.line()?;
        let (kind, rest) = line.split_at_checked(1).ok_or_else(|| bad("an empty line"))?;
        Ok(match kind {
            "+" => Reply::Simple(rest.into()),
            "-" => Reply::Error(rest.into()),
            ":" => Reply::Int(number(rest)?),
            "_" => Reply::Nil,
            "#" => Reply::Bool(rest == "t"),
            "," => Reply::Double(rest.parse().map_err(|_| bad(rest))?),
            "$" | "=" => match number(rest)? {
                -1 => Reply::Nil,
                size => Reply::Bulk(self.exact(size)?),
            },
            "*" | "~" | ">" => match number(rest)? {
                -1 => Reply::Nil,
                count => Reply::Array((0..count).map(|_| self.read()).collect::<io::Result<_>>()?),
            },
            "%" => {
                let count = number(rest)?;
                Reply::Map((0..count).map(|_| Ok((self.read()?, self.read()?))).collect::<io::Result<_>>()?)
            }
            _ => return Err(bad(&line)),
        })
    }

    fn line(&mut self) -> io::Result<String> {
        let mut searched = self.position;
        loop {
            if let Some(at) = self.buffer[searched..].windows(2).position(|w| w == b"\r\n") {
                let end = searched + at;
                let line = String::from_utf8_lossy(&self.buffer[self.position..end]).into_owned();
                self.position = end + 2;
                return Ok(line);
            }
            // The last byte may be the first half of the terminator.
            searched = self.buffer.len().saturating_sub(1).max(self.position);
            let before = self.position;
            self.fill()?;
            searched -= before - self.position;
        }
    }

    fn exact(&mut self, size: i64) -> io::Result<Vec<u8>> {
        let size = usize::try_from(size).map_err(|_| bad("a negative length"))?;
        while self.buffer.len() - self.position < size + 2 {
            self.fill()?;
        }
        let end = self.position + size;
        if &self.buffer[end..end + 2] != b"\r\n" {
            return Err(bad("a string that does not end where its length says"));
        }
        let bytes = self.buffer[self.position..end].to_vec();
        self.position = end + 2;
        Ok(bytes)
    }

    fn fill(&mut self) -> io::Result<()> {
        if self.position > 0 {
            self.buffer.drain(..self.position);
            self.position = 0;
        }
        let mut chunk = [0u8; 64 << 10];
        let count = self.stream.read(&mut chunk)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.buffer.extend_from_slice(&chunk[..count]);
        Ok(())
    }
}

fn number(text: &str) -> io::Result<i64> {
    text.parse().map_err(|_| bad(text))
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not RESP: {what:?}"))
}
