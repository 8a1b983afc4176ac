//! Requests, read from a growing buffer in whatever pieces the network brings.
//!
//! Invariants: every byte is looked at once, so that no way of cutting a stream costs more than another; nothing is
//! buffered on the strength of a declared length alone; an argument owns its memory. Arguments are copied out of the
//! read buffer rather than sliced from it: a slice would keep the whole buffer alive for as long as a three-byte key
//! waits in an index or a queue, and the copy of a large one is what lets the read buffer stay small.

use bytes::{Buf, Bytes, BytesMut};

use super::inline;
use crate::engine::action::parse_integer;
use crate::limits::ARGUMENT_COUNT_MAX;
use crate::owned::owned;

/// A line (a length, or a request typed by hand) that is longer than this is no line.
const LINE_SIZE_MAX: usize = 64 << 10;

/// Redis's own bound on one argument; beyond it the stream is taken to be no RESP at all.
const BULK_SIZE_MAX: i64 = 512 << 20;

/// From this size on, an argument is gathered on its own instead of in the read buffer.
const LARGE_SIZE_MIN: usize = 32 << 10;

/// Room made at once for a large argument: its declared length proves nothing yet.
const LARGE_SIZE_START: usize = 64 << 10;

/// What an allocator adds to an argument.
const ARGUMENT_OVERHEAD: usize = 16;

/// A command's name that is longer is not kept for the next one.
const NAME_SIZE_MAX: usize = 16;

/// What a connection is willing to hold for one command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// Bytes of one argument.
    pub argument_size_max: usize,
    /// Bytes of all arguments of one command.
    pub command_size_max: usize,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// The command's name and arguments; never empty.
    Command(Vec<Bytes>),
    /// A well-formed command that is over a limit: its bytes were dropped as they came, and the stream goes on.
    Refused(Refusal),
}

/// Which limit a command was over. `Display` gives the text of the error reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// One argument is too long.
    #[error(
        "ERR value of {size} bytes is longer than the {size_max} bytes that this node takes in one piece"
    )]
    Argument {
        /// Its declared length.
        size: usize,
        /// Bytes allowed.
        size_max: usize,
    },
    /// All arguments together are too long.
    #[error("ERR arguments of one command are longer than {size_max} bytes together")]
    Command {
        /// Bytes allowed.
        size_max: usize,
    },
}

/// The stream is not RESP; nothing after it can be understood. `Display` gives the text of the error reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A line without an end where a request begins.
    #[error("ERR Protocol error: too big inline request")]
    InlineTooBig,
    /// Quotes that do not match.
    #[error("ERR Protocol error: unbalanced quotes in request")]
    UnbalancedQuotes,
    /// A count without an end.
    #[error("ERR Protocol error: too big mbulk count string")]
    CountTooBig,
    /// A count that is no number, or too many arguments.
    #[error("ERR Protocol error: invalid multibulk length")]
    InvalidCount,
    /// A length without an end.
    #[error("ERR Protocol error: too big bulk count string")]
    LengthTooBig,
    /// A length that is no number, negative, or above 512 MiB.
    #[error("ERR Protocol error: invalid bulk length")]
    InvalidLength,
    /// An argument that is no bulk string.
    #[error("ERR Protocol error: expected '$', got '{}'", printable(*.0))]
    ExpectedBulk(u8),
}

fn printable(byte: u8) -> char {
    if byte == b'\r' || byte == b'\n' { ' ' } else { char::from(byte) }
}

#[derive(Debug)]
enum State {
    /// Between requests.
    Start,
    /// Inside an array of `missing` more arguments.
    Length,
    /// Inside an argument of this many bytes, all of them still in the read buffer.
    Small(usize),
    /// Inside an argument of which this many bytes are missing from `large`.
    Large(usize),
    /// Inside an argument that is not kept: bytes to drop, line end included.
    Skip(usize),
    /// Before the line end of a large argument.
    LargeEnd,
}

/// Reads requests; one per connection.
#[derive(Debug)]
pub struct RequestParser {
    limits: RequestLimits,
    state: State,
    arguments: Vec<Bytes>,
    /// Bytes that they hold.
    arguments_size: usize,
    missing: usize,
    size: usize,
    large: Vec<u8>,
    refusal: Option<Refusal>,
    /// The last command's name.
    name: Bytes,
    /// Bytes at the front of the read buffer that hold no line end.
    scanned: usize,
}

impl RequestParser {
    /// A parser at the start of a stream.
    pub fn new(limits: RequestLimits) -> Self {
        Self {
            limits,
            state: State::Start,
            arguments: Vec::new(),
            arguments_size: 0,
            missing: 0,
            size: 0,
            large: Vec::new(),
            refusal: None,
            name: Bytes::new(),
            scanned: 0,
        }
    }

    /// Bytes of memory that the request being read holds.
    pub fn size(&self) -> usize {
        self.large.capacity() + self.arguments_size + self.arguments.capacity() * size_of::<Bytes>()
    }

    /// Whether the next byte is the first of a request.
    pub fn is_between_requests(&self) -> bool {
        matches!(self.state, State::Start) && self.scanned == 0
    }

    /// Bytes that one argument may have.
    pub fn argument_size_max(&self) -> usize {
        self.limits.argument_size_max
    }

    /// Takes bytes that belong to a large or dropped argument straight from the network. Only to be used while the read
    /// buffer is empty. Returns how many were taken.
    pub fn absorb(&mut self, bytes: &[u8]) -> usize {
        match &mut self.state {
            State::Large(missing) => {
                let size = bytes.len().min(*missing);
                // Doubled as it fills, but never beyond what it is to hold.
                if self.large.capacity() - self.large.len() < size {
                    let whole = self.large.len() + *missing;
                    let wanted = whole.min(2 * self.large.capacity()).max(self.large.len() + size);
                    self.large.reserve_exact(wanted - self.large.len());
                }
                self.large.extend_from_slice(&bytes[..size]);
                *missing -= size;
                if *missing == 0 {
                    self.state = State::LargeEnd;
                }
                size
            }
            State::Skip(missing) => {
                let size = bytes.len().min(*missing);
                *missing -= size;
                size
            }
            _ => 0,
        }
    }

    /// The next request, taking its bytes off the buffer; `None` when more bytes are needed.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Parsed>, ProtocolError> {
        loop {
            let taken = self.absorb(buffer);
            buffer.advance(taken);
            match self.state {
                State::Start => match buffer.first() {
                    None => return Ok(None),
                    Some(b'*') => {
                        let Some(end) = self.line(buffer, ProtocolError::CountTooBig)? else {
                            return Ok(None);
                        };
                        let count = parse_integer(&buffer[1..end]).ok_or(ProtocolError::InvalidCount)?;
                        buffer.advance(end + 2);
                        // Zero and negative counts are no command and get no reply.
                        if count > 0 {
                            let count = usize::try_from(count).map_err(|_| ProtocolError::InvalidCount)?;
                            if count > ARGUMENT_COUNT_MAX {
                                return Err(ProtocolError::InvalidCount);
                            }
                            self.missing = count;
                            self.size = 0;
                            self.arguments = Vec::with_capacity(count.min(16));
                            self.state = State::Length;
                        }
                    }
                    Some(_) => match self.inline(buffer)? {
                        None => return Ok(None),
                        Some(arguments) if arguments.is_empty() => {}
                        Some(arguments) => return Ok(Some(Parsed::Command(arguments))),
                    },
                },
                State::Length => {
                    let Some(end) = self.line(buffer, ProtocolError::LengthTooBig)? else { return Ok(None) };
                    self.begin_argument(&buffer[..end])?;
                    buffer.advance(end + 2);
                }
                State::Small(size) => {
                    if buffer.len() < size + 2 {
                        return Ok(None);
                    }
                    let argument = self.argument(&buffer[..size]);
                    self.arguments.push(argument);
                    self.arguments_size += size + ARGUMENT_OVERHEAD;
                    buffer.advance(size + 2);
                    if let Some(parsed) = self.end_argument() {
                        return Ok(Some(parsed));
                    }
                }
                State::LargeEnd => {
                    if buffer.len() < 2 {
                        return Ok(None);
                    }
                    buffer.advance(2);
                    let argument = Bytes::from(std::mem::take(&mut self.large));
                    self.arguments_size += argument.len() + ARGUMENT_OVERHEAD;
                    self.arguments.push(argument);
                    if let Some(parsed) = self.end_argument() {
                        return Ok(Some(parsed));
                    }
                }
                State::Skip(0) => {
                    if let Some(parsed) = self.end_argument() {
                        return Ok(Some(parsed));
                    }
                }
                State::Large(_) | State::Skip(_) => return Ok(None),
            }
        }
    }

    /// The length of the line at the front, which ends in CR and one more byte (Redis does not look at it either).
    fn line(&mut self, buffer: &[u8], too_big: ProtocolError) -> Result<Option<usize>, ProtocolError> {
        match memchr::memchr(b'\r', &buffer[self.scanned..]) {
            Some(at) => {
                self.scanned += at;
                if self.scanned + 1 >= buffer.len() {
                    return Ok(None);
                }
                Ok(Some(std::mem::take(&mut self.scanned)))
            }
            None if buffer.len() > LINE_SIZE_MAX => Err(too_big),
            None => {
                self.scanned = buffer.len();
                Ok(None)
            }
        }
    }

    fn inline(&mut self, buffer: &mut BytesMut) -> Result<Option<Vec<Bytes>>, ProtocolError> {
        match memchr::memchr(b'\n', &buffer[self.scanned..]) {
            Some(at) => {
                let line = buffer.split_to(self.scanned + at);
                buffer.advance(1);
                self.scanned = 0;
                let line = line.strip_suffix(b"\r").unwrap_or(&line);
                inline::split(line).map(Some).map_err(|_| ProtocolError::UnbalancedQuotes)
            }
            None if buffer.len() > LINE_SIZE_MAX => Err(ProtocolError::InlineTooBig),
            None => {
                self.scanned = buffer.len();
                Ok(None)
            }
        }
    }

    fn begin_argument(&mut self, line: &[u8]) -> Result<(), ProtocolError> {
        let length = match line {
            [b'$', length @ ..] => parse_integer(length).ok_or(ProtocolError::InvalidLength)?,
            [other, ..] => return Err(ProtocolError::ExpectedBulk(*other)),
            // The line began with its own end.
            [] => return Err(ProtocolError::ExpectedBulk(b'\r')),
        };
        if !(0..=BULK_SIZE_MAX).contains(&length) {
            return Err(ProtocolError::InvalidLength);
        }
        let size = usize::try_from(length).map_err(|_| ProtocolError::InvalidLength)?;
        if self.refusal.is_none() {
            self.size = self.size.saturating_add(size);
            if size > self.limits.argument_size_max {
                self.refusal = Some(Refusal::Argument { size, size_max: self.limits.argument_size_max });
            } else if self.size > self.limits.command_size_max {
                self.refusal = Some(Refusal::Command { size_max: self.limits.command_size_max });
            }
            if self.refusal.is_some() {
                self.arguments = Vec::new();
                self.arguments_size = 0;
            }
        }
        self.state = if self.refusal.is_some() {
            State::Skip(size + 2)
        } else if size >= LARGE_SIZE_MIN {
            self.large = Vec::with_capacity(size.min(LARGE_SIZE_START));
            State::Large(size)
        } else {
            State::Small(size)
        };
        Ok(())
    }

    /// An argument of its own memory. A client mostly says the same command again, whose name is then there already.
    fn argument(&mut self, bytes: &[u8]) -> Bytes {
        if !self.arguments.is_empty() {
            return owned(bytes);
        }
        if self.name != bytes && bytes.len() <= NAME_SIZE_MAX {
            self.name = owned(bytes);
        } else if self.name != bytes {
            return owned(bytes);
        }
        self.name.clone()
    }

    fn end_argument(&mut self) -> Option<Parsed> {
        self.missing -= 1;
        if self.missing > 0 {
            self.state = State::Length;
            return None;
        }
        self.state = State::Start;
        let arguments = std::mem::take(&mut self.arguments);
        self.arguments_size = 0;
        Some(match self.refusal.take() {
            None => Parsed::Command(arguments),
            Some(refusal) => Parsed::Refused(refusal),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: RequestLimits = RequestLimits { argument_size_max: 100_000, command_size_max: 150_000 };

    /// What a stream reads as when it comes in pieces that end at `cuts`.
    fn parse(stream: &[u8], cuts: &[usize]) -> (Vec<Parsed>, Option<ProtocolError>) {
        let mut parser = RequestParser::new(LIMITS);
        let (mut buffer, mut parsed, mut from) = (BytesMut::new(), Vec::new(), 0);
        for to in cuts.iter().copied().chain([stream.len()]) {
            let mut piece = &stream[from..to];
            from = to;
            if buffer.is_empty() {
                let taken = parser.absorb(piece);
                piece = &piece[taken..];
            }
            buffer.extend_from_slice(piece);
            loop {
                match parser.next(&mut buffer) {
                    Ok(None) => break,
                    Ok(Some(one)) => parsed.push(one),
                    Err(error) => return (parsed, Some(error)),
                }
            }
            assert!(buffer.len() <= LARGE_SIZE_MIN + LINE_SIZE_MAX, "{} bytes buffered", buffer.len());
        }
        (parsed, None)
    }

    fn encode(command: &[Vec<u8>]) -> Vec<u8> {
        let mut stream = format!("*{}\r\n", command.len()).into_bytes();
        for argument in command {
            stream.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
            stream.extend_from_slice(argument);
            stream.extend_from_slice(b"\r\n");
        }
        stream
    }

    fn command(arguments: &[&str]) -> Parsed {
        Parsed::Command(arguments.iter().map(|a| Bytes::copy_from_slice(a.as_bytes())).collect())
    }

    #[test]
    fn a_stream_reads_the_same_when_cut_at_every_byte() {
        let stream = b"*2\r\n$3\r\nGET\r\n$0\r\n\r\nPING \"a b\"\r\n\r\n*0\r\n*-1\r\n*1\r\n$4\r\nQUIT\r\n";
        let expected = vec![command(&["GET", ""]), command(&["PING", "a b"]), command(&["QUIT"])];
        for cut in 0..=stream.len() {
            assert_eq!(parse(stream, &[cut]), (expected.clone(), None), "cut at {cut}");
        }
        let all: Vec<usize> = (0..stream.len()).collect();
        assert_eq!(parse(stream, &all), (expected, None));
    }

    #[test]
    fn streams_that_are_no_resp() {
        use ProtocolError::*;
        let (long_inline, long_count) =
            (vec![b'a'; LINE_SIZE_MAX + 1], [b"*".as_slice(), &[b'1'; LINE_SIZE_MAX]].concat());
        let long_length = [b"*1\r\n$".as_slice(), &[b'1'; LINE_SIZE_MAX]].concat();
        for (stream, error) in [
            (b"*x\r\n".as_slice(), InvalidCount),
            (b"*1048577\r\n", InvalidCount),
            (b"*99999999999999999999\r\n", InvalidCount),
            (b"*+1\r\n", InvalidCount),
            (b"*1\r\nx\r\n", ExpectedBulk(b'x')),
            (b"*1\r\n$-1\r\n", InvalidLength),
            (b"*1\r\n$x\r\n", InvalidLength),
            (b"*1\r\n$536870913\r\n", InvalidLength),
            (b"\"abc\r\n", UnbalancedQuotes),
            (&long_inline, InlineTooBig),
            (&long_count, CountTooBig),
            (&long_length, LengthTooBig),
        ] {
            assert_eq!(parse(stream, &[]).1, Some(error), "{:?}", &stream[..stream.len().min(20)]);
        }
        assert_eq!(ExpectedBulk(b'x').to_string(), "ERR Protocol error: expected '$', got 'x'");
    }

    #[test]
    fn what_is_over_a_limit_is_dropped_and_the_stream_goes_on() {
        let long = vec![b'v'; 100_001];
        let half = vec![b'v'; 80_000];
        let mut stream = encode(&[b"SET".to_vec(), long, b"after".to_vec()]);
        stream.extend(encode(&[b"PING".to_vec()]));
        stream.extend(encode(&[b"MSET".to_vec(), half.clone(), half.clone()]));
        stream.extend(encode(&[b"SET".to_vec(), half.clone()]));
        let expected = vec![
            Parsed::Refused(Refusal::Argument { size: 100_001, size_max: 100_000 }),
            command(&["PING"]),
            Parsed::Refused(Refusal::Command { size_max: 150_000 }),
            Parsed::Command(vec![Bytes::from("SET"), Bytes::from(half)]),
        ];
        for step in [1, 7, 4096, stream.len()] {
            let cuts: Vec<usize> = (0..stream.len()).step_by(step).collect();
            assert_eq!(parse(&stream, &cuts), (expected.clone(), None), "pieces of {step}");
        }
    }

    fn commands() -> impl Strategy<Value = Vec<Vec<Vec<u8>>>> {
        let argument = prop_oneof![
            9 => prop::collection::vec(any::<u8>(), 0..40),
            1 => (LARGE_SIZE_MIN - 2..LARGE_SIZE_MIN + 2).prop_map(|size| vec![b'\r'; size]),
        ];
        prop::collection::vec(prop::collection::vec(argument, 1..5), 1..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn any_cutting_reads_the_same(commands in commands(), seed in prop::collection::vec(1usize..3000, 1..50)) {
            let stream: Vec<u8> = commands.iter().flat_map(|c| encode(c)).collect();
            let mut cuts = Vec::new();
            let mut at = 0;
            for step in seed.iter().cycle() {
                at += step;
                if at >= stream.len() {
                    break;
                }
                cuts.push(at);
            }
            // Four arguments of 32 KiB stay below the limit on a command.
            let expected: Vec<Parsed> =
                commands.into_iter().map(|c| Parsed::Command(c.into_iter().map(Bytes::from).collect())).collect();
            prop_assert_eq!(parse(&stream, &cuts), (expected, None));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(
            prop_oneof![any::<u8>(), prop::sample::select(b"*$\r\n0123456789-\"'\\ ".to_vec())], 0..300)) {
            let all: Vec<usize> = (0..bytes.len()).collect();
            prop_assert_eq!(parse(&bytes, &all), parse(&bytes, &[]));
        }
    }
}
