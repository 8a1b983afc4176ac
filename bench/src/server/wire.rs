//! Keys, values and commands as both sides of a measurement know them, and a client for what is not measured.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::Failure;

/// How long a server may take for anything that is not measured.
const PATIENCE: Duration = Duration::from_secs(60);
/// Commands that are sent before replies are awaited, while loading.
const LOAD_DEPTH: u64 = 128;
/// Digits of a key's number, as redis-benchmark writes `__rand_int__`.
const DIGITS: usize = 12;

/// Keys of one name, from 0 on, and what they hold: whoever knows the key knows the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keyspace {
    /// What keys begin with.
    pub name: &'static str,
    /// How many.
    pub count: u64,
    /// Bytes of each value, at least 16.
    pub value_size: usize,
    /// Whether values differ. redis-benchmark can only write one.
    pub distinct: bool,
}

impl Keyspace {
    /// A key, with whatever stands for its number.
    pub fn key_with(&self, number: &str) -> String {
        format!("{}:{number}", self.name)
    }

    fn key_size(&self) -> usize {
        self.name.len() + 1 + DIGITS
    }

    /// Appends what a key holds.
    pub fn value(&self, number: u64, out: &mut Vec<u8>) {
        let mut seed = [b'v'; 16];
        if self.distinct {
            let mut left = number;
            for place in seed.iter_mut().rev() {
                *place = b"0123456789abcdef"[(left & 15) as usize];
                left >>= 4;
            }
        }
        let end = out.len() + self.value_size;
        while out.len() + seed.len() <= end {
            out.extend_from_slice(&seed);
        }
        out.extend_from_slice(&seed[..end - out.len()]);
    }

    /// Appends a command that reads a key.
    pub fn get(&self, number: u64, out: &mut Vec<u8>) {
        self.command("*2\r\n$3\r\nGET", number, out);
    }

    /// Appends a command that writes a key.
    pub fn set(&self, number: u64, out: &mut Vec<u8>) {
        self.command("*3\r\n$3\r\nSET", number, out);
        self.bulk(number, out);
    }

    /// Appends the reply to `get`.
    pub fn bulk(&self, number: u64, out: &mut Vec<u8>) {
        append(out, format_args!("${}\r\n", self.value_size));
        self.value(number, out);
        out.extend_from_slice(b"\r\n");
    }

    fn command(&self, start: &str, number: u64, out: &mut Vec<u8>) {
        append(out, format_args!("{start}\r\n${}\r\n{}:{number:0DIGITS$}\r\n", self.key_size(), self.name));
    }
}

fn append(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    out.write_fmt(text).expect("a vector takes all that is written to it");
}

/// A client that sends and waits.
pub struct Client {
    reader: BufReader<TcpStream>,
}

impl Client {
    /// Connects.
    pub fn connect(address: SocketAddr) -> Result<Client, Failure> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Client { reader: BufReader::new(stream) })
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        Ok(self.reader.get_mut().write_all(bytes)?)
    }

    fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        match line.strip_suffix("\r\n") {
            Some(line) => Ok(line.to_owned()),
            None => Err("the server closed the connection".into()),
        }
    }

    /// Writes every key once; an answer other than OK ends it.
    pub fn load(&mut self, keys: &Keyspace) -> Result<(), Failure> {
        let mut start = 0;
        while start < keys.count {
            let end = (start + LOAD_DEPTH).min(keys.count);
            let mut commands = Vec::new();
            (start..end).for_each(|number| keys.set(number, &mut commands));
            self.send(&commands)?;
            for number in start..end {
                let reply = self.line()?;
                if reply != "+OK" {
                    let key = keys.key_with(&number.to_string());
                    return Err(format!("loading {key} was answered with {reply:?}").into());
                }
            }
            start = end;
        }
        Ok(())
    }

    /// Changes a setting of a redis-server.
    pub fn configure(&mut self, setting: &str, value: &str) -> Result<(), Failure> {
        self.send(format!("CONFIG SET {setting} {value}\r\n").as_bytes())?;
        match self.line()?.as_str() {
            "+OK" => Ok(()),
            reply => Err(format!("CONFIG SET {setting} {value} was answered with {reply:?}").into()),
        }
    }

    /// Reads some keys, evenly spread, and compares what they hold.
    pub fn verify(&mut self, keys: &Keyspace, samples: u64) -> Result<(), Failure> {
        let step = (keys.count / samples).max(1);
        for number in (0..keys.count).step_by(step as usize) {
            let (mut command, mut expected) = (Vec::new(), Vec::new());
            keys.get(number, &mut command);
            keys.bulk(number, &mut expected);
            self.send(&command)?;
            let mut reply = self.line()?.into_bytes();
            reply.extend_from_slice(b"\r\n");
            // Only as much as there is: a nil or an error has no body.
            if reply.starts_with(b"$") && expected.starts_with(&reply) {
                let mut body = vec![0; expected.len() - reply.len()];
                self.reader.read_exact(&mut body)?;
                reply.append(&mut body);
            }
            if reply != expected {
                let key = keys.key_with(&number.to_string());
                let (reply, expected) = (excerpt(&reply), excerpt(&expected));
                return Err(format!("{key} was answered with {reply} instead of {expected}").into());
            }
        }
        Ok(())
    }

    /// How many keys there are.
    pub fn key_count(&mut self) -> Result<u64, Failure> {
        self.send(b"*1\r\n$6\r\nDBSIZE\r\n")?;
        let reply = self.line()?;
        let count = reply.strip_prefix(':').and_then(|count| count.parse().ok());
        Ok(count.ok_or_else(|| format!("DBSIZE was answered with {reply:?}"))?)
    }

    /// A field of INFO, where the server has it.
    pub fn info(&mut self, field: &str) -> Result<Option<String>, Failure> {
        self.send(b"*1\r\n$4\r\nINFO\r\n")?;
        let reply = self.line()?;
        let size: usize = reply
            .strip_prefix('$')
            .and_then(|size| size.parse().ok())
            .ok_or_else(|| format!("INFO was answered with {reply:?}"))?;
        let mut body = vec![0; size + 2];
        self.reader.read_exact(&mut body)?;
        let body = String::from_utf8_lossy(&body);
        let value = body.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        Ok(value.map(str::to_owned))
    }
}

/// The beginning of bytes, for people.
pub fn excerpt(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(60)];
    let more = if shown.len() < bytes.len() { "..." } else { "" };
    format!("\"{}{more}\"", shown.escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    const KEYS: Keyspace = Keyspace { name: "k", count: 300, value_size: 20, distinct: true };

    fn text(write: impl Fn(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn commands_are_as_redis_benchmark_sends_them() {
        assert_eq!(text(|out| KEYS.get(42, out)), "*2\r\n$3\r\nGET\r\n$14\r\nk:000000000042\r\n");
        let set = "*3\r\n$3\r\nSET\r\n$14\r\nk:000000000042\r\n$20\r\n000000000000002a0000\r\n";
        assert_eq!(text(|out| KEYS.set(42, out)), set);
        assert_eq!(text(|out| KEYS.bulk(42, out)), "$20\r\n000000000000002a0000\r\n");
        let same = Keyspace { distinct: false, value_size: 16, ..KEYS };
        assert_eq!(text(|out| same.value(1, out)), text(|out| same.value(2, out)));
        assert_eq!(text(|out| same.value(1, out)), "v".repeat(16));
    }

    /// Answers what comes with the replies, in turn, one for each read.
    fn answering(replies: Vec<Vec<u8>>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for reply in replies {
                let _ = stream.read(&mut [0; 1 << 16]).unwrap();
                stream.write_all(&reply).unwrap();
            }
        });
        address
    }

    #[test]
    fn a_wrong_answer_ends_it_with_words() {
        let ask = |reply: &[u8]| Client::connect(answering(vec![reply.to_vec()])).unwrap();
        let error = ask(b"$-1\r\n").verify(&KEYS, 1).unwrap_err().to_string();
        assert!(error.contains("k:0") && error.contains("$-1"), "{error}");
        let error = ask(b"$20\r\n000000000000002a0000\r\n").verify(&KEYS, 1).unwrap_err().to_string();
        assert!(error.contains("instead of"), "{error}");
        let error = ask(b"+OK\r\n-OOM device is full\r\n").load(&KEYS).unwrap_err().to_string();
        assert!(error.contains("k:1") && error.contains("OOM"), "{error}");
        let error = ask(b"-ERR no\r\n").configure("appendfsync", "always").unwrap_err().to_string();
        assert!(error.contains("CONFIG SET appendfsync always") && error.contains("ERR no"), "{error}");
        let error = ask(b"-LOADING\r\n").key_count().unwrap_err().to_string();
        assert!(error.contains("LOADING"), "{error}");
        let error = ask(b"").key_count().unwrap_err().to_string();
        assert!(error.contains("closed"), "{error}");
    }

    #[test]
    fn right_answers_are_taken() {
        let one = Keyspace { count: 1, ..KEYS };
        let fields = "# Stats\r\ncache_misses:17\r\nother:1\r\n";
        let info = format!("${}\r\n{fields}\r\n", fields.len()).into_bytes();
        let bulk = b"$20\r\n00000000000000000000\r\n".to_vec();
        let replies =
            vec![bulk, b"+OK\r\n".to_vec(), b"+OK\r\n".to_vec(), b":7\r\n".to_vec(), info.clone(), info];
        let mut client = Client::connect(answering(replies)).unwrap();
        client.verify(&one, 1).unwrap();
        client.load(&one).unwrap();
        client.configure("appendfsync", "no").unwrap();
        assert_eq!(client.key_count().unwrap(), 7);
        assert_eq!(client.info("cache_misses").unwrap().as_deref(), Some("17"));
        assert_eq!(client.info("misses").unwrap(), None);
    }
}
