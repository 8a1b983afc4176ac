//! Direct requests at the front of what a client sent, read where they are: nothing is copied, nothing is kept.
//!
//! Only what clients usually write is seen here: GET of a key and SET of a key to a value, without options, each line with its proper
//! end, short, and all of it there. Everything else is the parser's, from its first byte on, so the two can't disagree about where a
//! request ends.

use crate::engine::op::Direct;

/// Requests that are looked at together.
pub const DIRECT_COUNT_MAX: usize = 32;

/// An argument whose length has more digits is left to the parser.
const LENGTH_DIGITS_MAX: usize = 4;

/// The direct requests that input begins with.
#[derive(Debug, Clone, Copy)]
pub struct DirectRun<'a> {
    requests: [Direct<'a>; DIRECT_COUNT_MAX],
    /// Where each ends in the input.
    ends: [usize; DIRECT_COUNT_MAX],
    count: usize,
}

impl<'a> DirectRun<'a> {
    /// Those that are whole, with arguments of up to `argument_size_max` bytes, up to the first that is anything else.
    pub fn read(input: &'a [u8], argument_size_max: usize) -> Self {
        let mut run = DirectRun {
            requests: [Direct::Get { key: &[] }; DIRECT_COUNT_MAX],
            ends: [0; DIRECT_COUNT_MAX],
            count: 0,
        };
        let mut rest = input;
        while run.count < DIRECT_COUNT_MAX
            && let Some((request, behind)) = direct(rest, argument_size_max)
        {
            rest = behind;
            run.requests[run.count] = request;
            run.ends[run.count] = input.len() - rest.len();
            run.count += 1;
        }
        run
    }

    /// In order.
    pub fn requests(&self) -> &[Direct<'a>] {
        &self.requests[..self.count]
    }

    /// Bytes of the first `count` of them.
    pub fn size_of_first(&self, count: usize) -> usize {
        count.checked_sub(1).map_or(0, |last| self.ends[last])
    }
}

/// The request that input begins with, and what is behind it.
fn direct(input: &[u8], argument_size_max: usize) -> Option<(Direct<'_>, &[u8])> {
    let (head, rest) = input.split_first_chunk::<13>()?;
    let (count, name) = (&head[..8], &head[8..]);
    if count == b"*2\r\n$3\r\n" && name.eq_ignore_ascii_case(b"GET\r\n") {
        let (key, rest) = argument(rest, argument_size_max)?;
        Some((Direct::Get { key }, rest))
    } else if count == b"*3\r\n$3\r\n" && name.eq_ignore_ascii_case(b"SET\r\n") {
        let (key, rest) = argument(rest, argument_size_max)?;
        let (value, rest) = argument(rest, argument_size_max)?;
        Some((Direct::Set { key, value }, rest))
    } else {
        None
    }
}

/// The argument that input begins with, and what is behind it.
fn argument(input: &[u8], size_max: usize) -> Option<(&[u8], &[u8])> {
    let mut rest = input.strip_prefix(b"$")?;
    let mut size = 0;
    let mut digits = 0;
    while let Some((digit @ b'0'..=b'9', behind)) = rest.split_first() {
        size = size * 10 + usize::from(digit - b'0');
        digits += 1;
        if digits > LENGTH_DIGITS_MAX {
            return None;
        }
        rest = behind;
    }
    if digits == 0 || size > size_max {
        return None;
    }
    let (argument, rest) = rest.strip_prefix(b"\r\n")?.split_at_checked(size)?;
    Some((argument, rest.strip_prefix(b"\r\n")?))
}

#[cfg(test)]
mod tests {
    use bytes::{Bytes, BytesMut};
    use proptest::prelude::*;

    use super::*;
    use crate::net::resp::{Parsed, RequestLimits, RequestParser};

    /// What the parser makes of as many requests, and the bytes of them.
    fn parsed(input: &[u8], count: usize) -> (Vec<Vec<Bytes>>, usize) {
        let limits = RequestLimits { argument_size_max: 1 << 20, command_size_max: 1 << 20 };
        let mut parser = RequestParser::new(limits);
        let mut buffer = BytesMut::from(input);
        let mut commands = Vec::new();
        while commands.len() < count {
            match parser.next(&mut buffer) {
                Ok(Some(Parsed::Command(args))) => commands.push(args),
                other => panic!("no command where a direct request was seen: {other:?}"),
            }
        }
        (commands, input.len() - buffer.len())
    }

    #[test]
    fn direct_requests_are_seen_and_nothing_else() {
        let input = b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n*2\r\n$3\r\nget\r\n$0\r\n\r\n\
            *3\r\n$3\r\nSet\r\n$1\r\na\r\n$2\r\n\r\n\r\n*2\r\n$3\r\nDEL\r\n$1\r\na\r\n";
        let run = DirectRun::read(input, 100);
        let expected =
            [Direct::Get { key: b"a" }, Direct::Get { key: b"" }, Direct::Set { key: b"a", value: b"\r\n" }];
        assert_eq!(run.requests(), expected);
        assert_eq!([0, 1, 2, 3].map(|count| run.size_of_first(count)), [0, 20, 39, 67]);
        for other in [
            b"".as_slice(),
            b"*2\r\n$3\r\nGET\r\n$1\r\na\r",
            b"*2\r\n$3\r\nGET\r\n$2\r\na\r\n",
            b"*2\r\n$3\r\nGET\r\n$\r\na\r\n",
            b"*2\r\n$3\r\nGET\r\n$-1\r\na\r\n",
            b"*2\r\n$3\r\nGET\r\n$00001\r\na\r\n",
            b"*2\r\n$3\r\nGET\r\n$101\r\na\r\n",
            b"*3\r\n$3\r\nGET\r\n$1\r\na\r\n$1\r\na\r\n",
            b"*2\r\n$3\r\nSET\r\n$1\r\na\r\n",
            b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\n",
            b"*5\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\na\r\n$2\r\nEX\r\n$1\r\n1\r\n",
            b"*2\r\n$5\r\nGETEX\r\n$1\r\na\r\n",
            b"GET a\r\n",
        ] {
            let run = DirectRun::read(other, 100);
            assert!(run.requests().is_empty(), "{}", other.escape_ascii());
        }
        assert!(DirectRun::read(b"*2\r\n$3\r\nGET\r\n$3\r\nabc\r\n", 2).requests().is_empty());
    }

    proptest! {
        #[test]
        fn what_is_seen_is_what_the_parser_reads(
            commands in prop::collection::vec(
                (any::<bool>(), prop::collection::vec(any::<u8>(), 0..12), prop::collection::vec(any::<u8>(), 0..12)),
                0..40,
            ),
            spoilt in any::<prop::sample::Index>(),
            byte in prop_oneof![any::<u8>(), prop::sample::select(b"*$\r\n0123GETS".to_vec())],
        ) {
            let mut input = Vec::new();
            for (is_set, key, value) in &commands {
                let args: &[&[u8]] = if *is_set { &[b"SET", key, value] } else { &[b"GET", key] };
                input.extend_from_slice(format!("*{}\r\n", args.len()).as_bytes());
                for arg in args {
                    input.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
                    input.extend_from_slice(arg);
                    input.extend_from_slice(b"\r\n");
                }
            }
            let count = commands.len().min(DIRECT_COUNT_MAX);
            prop_assert_eq!(DirectRun::read(&input, 100).requests().len(), count);
            if !input.is_empty() {
                let at = spoilt.index(input.len());
                input[at] = byte;
            }
            let run = DirectRun::read(&input, 100);
            let count = run.requests().len();
            let (commands, size) = parsed(&input, count);
            prop_assert_eq!(size, run.size_of_first(count));
            for (command, request) in commands.iter().zip(run.requests()) {
                let (name, args): (&[u8], Vec<&[u8]>) = match request {
                    Direct::Get { key } => (b"GET", vec![key]),
                    Direct::Set { key, value } => (b"SET", vec![key, value]),
                };
                prop_assert!(command[0].eq_ignore_ascii_case(name));
                prop_assert_eq!(&command[1..], args);
            }
        }
    }
}
