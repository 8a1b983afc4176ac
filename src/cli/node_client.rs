//! A client of a running node, for commands that work on one: blocking, one connection.

use std::io::{self, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use clap::Args;

use super::export::put_command;

/// Which node.
#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    /// Host of the node
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// Port of the node
    #[arg(long, value_name = "PORT", default_value_t = 6379)]
    port: u16,
    /// Password, where the node asks for one; better in the environment variable BASALT_PASSWORD, which others can't see
    #[arg(long, value_name = "PASSWORD")]
    password: Option<String>,
}

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reply {
    Text(String),
    /// In words: the code that clients look at, as `ERR`, is not part of it.
    Error(String),
    Int(i64),
    Bytes(Vec<u8>),
    Nil,
    Array(Vec<Reply>),
}

/// A node that says nothing for so long is taken for dead.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The longest string and array that a reply may declare: a node has neither.
const REPLY_SIZE_MAX: i64 = 1 << 30;

/// A connection.
pub(super) struct NodeClient {
    input: BufReader<TcpStream>,
    output: TcpStream,
    command: Vec<u8>,
}

impl NodeClient {
    /// Connects, and says the password if there is one.
    pub(super) fn connect(args: &NodeArgs) -> Result<NodeClient, String> {
        let name = format!("{}:{}", args.host, args.port);
        let cannot =
            |error: io::Error| format!("cannot connect to {name}: {error}; is a node running there?");
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        for address in (args.host.as_str(), args.port).to_socket_addrs().map_err(cannot)? {
            match TcpStream::connect_timeout(&address, TIMEOUT) {
                Ok(stream) => {
                    let client = NodeClient::over(stream).map_err(cannot)?;
                    return client.with_password(args, &name);
                }
                Err(error) => last = error,
            }
        }
        Err(cannot(last))
    }

    fn over(stream: TcpStream) -> io::Result<NodeClient> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let output = stream.try_clone()?;
        Ok(NodeClient { input: BufReader::with_capacity(1 << 20, stream), output, command: Vec::new() })
    }

    fn with_password(mut self, args: &NodeArgs, name: &str) -> Result<NodeClient, String> {
        let password = args.password.clone().or_else(|| std::env::var("BASALT_PASSWORD").ok());
        if let Some(password) = password {
            match self.call(&[b"AUTH", password.as_bytes()]) {
                Ok(Reply::Error(text)) => return Err(format!("{name}: {text}")),
                Ok(_) => {}
                Err(error) => return Err(format!("{name}: {error}")),
            }
        }
        Ok(self)
    }

    /// One command and its reply.
    pub(super) fn call(&mut self, parts: &[&[u8]]) -> io::Result<Reply> {
        self.send(parts)?;
        self.receive()
    }

    /// Sends a command; its reply comes from `receive`, in order.
    pub(super) fn send(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        self.command.clear();
        put_command(&mut self.command, parts);
        self.output.write_all(&self.command)
    }

    /// Sends bytes that are commands already.
    pub(super) fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.output.write_all(bytes)
    }

    /// The next reply.
    pub(super) fn receive(&mut self) -> io::Result<Reply> {
        read_reply(&mut self.input, 0)
    }
}

/// Reads one line without its end.
pub(super) fn read_line(input: &mut impl Read) -> io::Result<String> {
    const LINE_SIZE_MAX: usize = 64 << 10;
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        input.read_exact(&mut byte)?;
        line.push(byte[0]);
        if line.ends_with(b"\r\n") {
            line.truncate(line.len() - 2);
            return String::from_utf8(line).map_err(|_| invalid("a line is no text"));
        }
        if line.len() > LINE_SIZE_MAX {
            return Err(invalid("a line does not end"));
        }
    }
}

/// Reads a string of a declared size and its end. Memory is taken as the bytes come.
pub(super) fn read_bytes(input: &mut impl Read, size: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let got = input.take(size + 2).read_to_end(&mut bytes)?;
    if got as u64 != size + 2 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if !bytes.ends_with(b"\r\n") {
        return Err(invalid("a string does not end where it says"));
    }
    bytes.truncate(size as usize);
    Ok(bytes)
}

pub(super) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// What an error says to people: its first word is a code for programs, in capitals.
fn without_code(error: &str) -> &str {
    match error.split_once(' ') {
        Some((code, words)) if code.bytes().all(|byte| byte.is_ascii_uppercase()) => words,
        _ => error,
    }
}

fn read_reply(input: &mut impl Read, depth: u32) -> io::Result<Reply> {
    let line = read_line(input)?;
    let (kind, rest) = line.split_at_checked(1).ok_or_else(|| invalid("a reply without a type"))?;
    let number = || {
        let number = rest.parse::<i64>().ok().filter(|number| *number <= REPLY_SIZE_MAX);
        number.ok_or_else(|| invalid("a reply of no length"))
    };
    Ok(match kind {
        "+" => Reply::Text(rest.to_owned()),
        "-" => Reply::Error(without_code(rest).to_owned()),
        ":" => Reply::Int(rest.parse().map_err(|_| invalid("an integer that is none"))?),
        "$" => match u64::try_from(number()?) {
            Ok(size) => Reply::Bytes(read_bytes(input, size)?),
            Err(_) => Reply::Nil,
        },
        "*" if depth < 4 => match u64::try_from(number()?) {
            Ok(count) => {
                let items: io::Result<Vec<Reply>> =
                    (0..count).map(|_| read_reply(input, depth + 1)).collect();
                Reply::Array(items?)
            }
            Err(_) => Reply::Nil,
        },
        _ => return Err(invalid("a reply of an unknown type")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_and_bad_ones_refused() {
        let read = |bytes: &[u8]| read_reply(&mut &bytes[..], 0).map_err(|error| error.kind());
        let array = b"*4\r\n:1\r\n$2\r\n\r\n\r\n-ERR x\r\n$-1\r\n";
        let items = vec![Reply::Int(1), Reply::Bytes(b"\r\n".to_vec()), Reply::Error("x".into()), Reply::Nil];
        assert_eq!(read(array), Ok(Reply::Array(items)));
        assert_eq!(read(b"-IOERR the device\r\n"), Ok(Reply::Error("the device".into())));
        assert_eq!(read(b"-Something else\r\n"), Ok(Reply::Error("Something else".into())));
        for cut in 0..array.len() {
            assert_eq!(read(&array[..cut]), Err(io::ErrorKind::UnexpectedEof), "{cut}");
        }
        for bad in [&b"!\r\n"[..], b"\r\n", b":x\r\n", b"$1\r\nab\r\n", b"$9999999999\r\n"] {
            assert_eq!(read(bad), Err(io::ErrorKind::InvalidData), "{bad:?}");
        }
    }
}
