//! What is asked of a store: YCSB's workloads (Cooper and others, "Benchmarking Cloud Serving Systems with YCSB", SoCC 2010).

use std::time::Duration;

use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Zipf};
use serde::{Deserialize, Serialize};

use crate::Failure;

/// The longest latency that is told from longer ones.
const LATENCY_US_MAX: u64 = 1 << 32;

/// YCSB's constant.
const ZIPF_EXPONENT: f64 = 0.99;

/// A workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Overwrites of keys, each as likely as another.
    Overwrite,
    /// Reads, each key as likely as another.
    ReadUniform,
    /// Reads, Zipf-distributed: YCSB C.
    C,
    /// Reads of keys that are not there.
    ReadMissing,
    /// Half reads, half updates, Zipf-distributed.
    A,
    /// 95 % reads, 5 % updates, Zipf-distributed.
    B,
    /// Half reads, half read-modify-writes, Zipf-distributed.
    F,
    /// Records in the order of their keys, from one on that is as likely as another: the reads of YCSB E.
    Scan,
}

/// Records of a scan: YCSB's mean.
pub const SCAN_COUNT: usize = 50;

impl Workload {
    /// In the order in which they are run.
    pub const ALL: [Workload; 8] = [
        Workload::Scan,
        Workload::ReadUniform,
        Workload::C,
        Workload::ReadMissing,
        Workload::B,
        Workload::A,
        Workload::F,
        Workload::Overwrite,
    ];

    /// As a table calls it.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Overwrite => "overwrite, uniform, durable",
            Workload::ReadUniform => "read, uniform",
            Workload::C => "YCSB C: read, Zipf",
            Workload::ReadMissing => "read of missing keys",
            Workload::A => "YCSB A: 50 % read, 50 % durable update",
            Workload::B => "YCSB B: 95 % read, 5 % durable update",
            Workload::F => "YCSB F: 50 % read, 50 % read-modify-write",
            Workload::Scan => "scan of 50 records in the order of keys",
        }
    }

    /// Whether most of its time goes into durable writes.
    pub fn is_write(self) -> bool {
        matches!(self, Workload::Overwrite | Workload::A | Workload::F)
    }

    fn is_zipf(self) -> bool {
        matches!(self, Workload::A | Workload::B | Workload::C | Workload::F)
    }
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// What is asked.
    pub workload: Workload,
    /// Keys there are.
    pub keys: u64,
    /// Clients, each of which waits for an answer before it asks again.
    pub clients: usize,
    /// How long.
    pub time: Duration,
    /// What the choices start from.
    pub seed: u64,
}

/// What a client asks next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// A key that is there.
    Read(u64),
    /// A key that is not.
    Miss(u64),
    /// A new value for it.
    Update(u64),
    /// Its value, and then a new one.
    ReadModifyWrite(u64),
    /// `SCAN_COUNT` keys from this one on, as far as there are, with their values.
    Scan(u64),
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The right value, or rightly none.
    Read,
    /// It is durable.
    Written,
    /// Something else.
    Wrong,
}

/// Chooses what a client asks.
pub struct Client {
    random: SmallRng,
    zipf: Zipf<f64>,
}

impl Client {
    /// One of the load's.
    pub fn new(load: &Load, number: usize) -> Client {
        let seed = load.seed.wrapping_mul(1_000_003).wrapping_add(number as u64);
        let keys = load.keys.max(1) as f64;
        // Only a count below one or a negative exponent are refused.
        let zipf = Zipf::new(keys, ZIPF_EXPONENT).unwrap_or_else(|_| unreachable!("there is a key"));
        Client { random: SmallRng::seed_from_u64(seed), zipf }
    }

    /// What it asks.
    pub fn next(&mut self, load: &Load) -> Next {
        let number = if load.workload.is_zipf() {
            // Scattered, as hot keys are.
            let rank = self.zipf.sample(&mut self.random) as u64;
            rank.wrapping_mul(0x9e37_79b9_7f4a_7c15) % load.keys
        } else {
            self.random.random_range(0..load.keys)
        };
        let percent = self.random.random_range(0..100_u32);
        match load.workload {
            Workload::Overwrite => Next::Update(number),
            Workload::ReadUniform | Workload::C => Next::Read(number),
            Workload::Scan => Next::Scan(number),
            Workload::ReadMissing => Next::Miss(load.keys + number),
            Workload::A if percent < 50 => Next::Update(number),
            Workload::B if percent < 5 => Next::Update(number),
            Workload::F if percent < 50 => Next::ReadModifyWrite(number),
            Workload::A | Workload::B | Workload::F => Next::Read(number),
        }
    }
}

/// What was done, and how long it took.
pub struct Tally {
    /// Operations.
    pub count: u64,
    /// Of those, writes.
    pub writes: u64,
    /// From the first to the last.
    pub seconds: f64,
    /// Microseconds of each.
    pub latencies: Histogram<u64>,
}

impl Tally {
    /// Nothing yet.
    pub fn new() -> Tally {
        // One without bounds would count what is above its first ones at the lowest of them.
        let latencies = Histogram::new_with_max(LATENCY_US_MAX, 3)
            .unwrap_or_else(|_| unreachable!("three digits are allowed"));
        Tally { count: 0, writes: 0, seconds: 0.0, latencies }
    }

    /// One operation.
    pub fn add(&mut self, next: Next, took: Duration) {
        self.count += 1;
        self.writes += u64::from(matches!(next, Next::Update(_) | Next::ReadModifyWrite(_)));
        self.latencies.saturating_record(took.as_micros() as u64);
    }

    /// Another thread's as well.
    pub fn merge(&mut self, other: &Tally) {
        self.count += other.count;
        self.writes += other.writes;
        self.latencies += &other.latencies;
    }
}

/// The key of a number below a million millions. Written by hand: it is part of what every operation of every store takes.
pub fn key_of(number: u64) -> String {
    let (mut key, mut left) = (*b"user000000000000", number);
    for digit in key[4..].iter_mut().rev() {
        *digit = b'0' + (left % 10) as u8;
        left /= 10;
    }
    String::from_utf8(key.to_vec()).unwrap_or_else(|_| unreachable!("these are digits"))
}

/// Values: they say whose they are, and do not compress.
#[derive(Debug, Clone)]
pub struct Values {
    filling: Vec<u8>,
}

impl Values {
    /// Of so many bytes, 16 at least.
    pub fn new(size: usize) -> Values {
        let mut random = SmallRng::seed_from_u64(5);
        Values { filling: (0..size.max(16)).map(|_| random.random()).collect() }
    }

    /// A value of a key.
    pub fn of(&self, number: u64) -> Vec<u8> {
        let mut value = self.filling.clone();
        value[..8].copy_from_slice(&number.to_le_bytes());
        value
    }

    /// Whether this is one.
    pub fn is_of(&self, number: u64, value: &[u8]) -> bool {
        value.len() == self.filling.len() && value[..8] == number.to_le_bytes()
    }
}

/// What a scan gives, looked at as it comes.
pub struct Scanned {
    first: u64,
    count: u64,
    is_right: bool,
}

impl Scanned {
    /// One that begins with a key that is there.
    pub fn from(first: u64) -> Scanned {
        Scanned { first, count: 0, is_right: true }
    }

    /// The next record.
    pub fn take(&mut self, values: &Values, key: &[u8], value: &[u8]) {
        let number = self.first + self.count;
        self.is_right &= key == key_of(number).as_bytes() && values.is_of(number, value);
        self.count += 1;
    }

    /// That was the last one, of so many keys there are.
    pub fn end(self, keys: u64) -> Result<(), Failure> {
        let wanted = (keys - self.first).min(SCAN_COUNT as u64);
        if self.is_right && self.count == wanted {
            return Ok(());
        }
        let (first, count) = (self.first, self.count);
        Err(format!("a scan from key {first} on gave {count} records of {wanted}, or others").into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_numbers_of_twelve_digits() {
        for number in [0, 7, 90, 123_456_789_012, 999_999_999_999] {
            assert_eq!(key_of(number), format!("user{number:012}"));
        }
    }

    #[test]
    fn workloads_ask_what_they_say() {
        let share = |workload: Workload, is: fn(&Next) -> bool| {
            let load = Load { workload, keys: 1_000, clients: 1, time: Duration::ZERO, seed: 1 };
            let mut client = Client::new(&load, 0);
            let asked: Vec<Next> = (0..10_000).map(|_| client.next(&load)).collect();
            asked.iter().filter(|next| is(next)).count() / 100
        };
        let is_update = |next: &Next| matches!(next, Next::Update(_));
        assert!((48..=52).contains(&share(Workload::A, is_update)));
        assert!((4..=6).contains(&share(Workload::B, is_update)));
        assert!((48..=52).contains(&share(Workload::F, |next| matches!(next, Next::ReadModifyWrite(_)))));
        assert_eq!(share(Workload::Overwrite, is_update), 100);
        assert_eq!(share(Workload::C, |next| matches!(next, Next::Read(_))), 100);
        assert_eq!(share(Workload::Scan, |next| matches!(next, Next::Scan(n) if *n < 1_000)), 100);
        assert_eq!(share(Workload::ReadMissing, |next| matches!(next, Next::Miss(n) if *n >= 1_000)), 100);
        // One key in a thousand gets more than a tenth of what is Zipf-distributed.
        let hottest = |workload: Workload| {
            let load = Load { workload, keys: 1_000, clients: 1, time: Duration::ZERO, seed: 2 };
            let mut client = Client::new(&load, 0);
            let mut counts = vec![0; 1_000];
            for _ in 0..10_000 {
                if let Next::Read(number) = client.next(&load) {
                    counts[number as usize] += 1;
                }
            }
            counts.into_iter().max().unwrap_or(0)
        };
        assert!(hottest(Workload::C) > 1_000);
        assert!(hottest(Workload::ReadUniform) < 40);
    }

    #[test]
    fn a_scan_is_what_is_wanted_or_an_error() {
        let values = Values::new(16);
        let scan = |first: u64, numbers: &[u64], keys: u64| {
            let mut scanned = Scanned::from(first);
            for number in numbers {
                scanned.take(&values, key_of(*number).as_bytes(), &values.of(*number));
            }
            scanned.end(keys).is_ok()
        };
        let whole: Vec<u64> = (7..57).collect();
        assert!(scan(7, &whole, 1_000) && scan(998, &[998, 999], 1_000));
        assert!(!scan(7, &whole[..49], 1_000) && !scan(998, &[998], 1_000) && !scan(8, &whole, 1_000));
        let mut scanned = Scanned::from(999);
        scanned.take(&values, key_of(999).as_bytes(), &values.of(998));
        assert!(scanned.end(1_000).is_err());
    }

    #[test]
    fn a_value_says_whose_it_is() {
        let values = Values::new(100);
        assert!(values.is_of(7, &values.of(7)));
        assert!(!values.is_of(8, &values.of(7)));
        assert!(!values.is_of(7, &values.of(7)[..99]));
    }
}
