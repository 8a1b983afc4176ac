//! The online backup: a dump is of one moment whatever is written meanwhile, loads into an empty node, and lets go of its pins
//! whatever becomes of its reader.

#![cfg(test)]

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::exported::{Parsed, parse};
use common::node::{Ended, path_text};
use common::{Client, Node, Options, Reply, Rng, basalt, call, temp_dir, wait_until};

const PAIRS: usize = 400;
const ACCOUNTS: usize = 50;

fn on_node(command: &str, option: &str, file: &Path, node: &Node, more: &[&str]) -> Ended {
    let port = node.port().to_string();
    basalt(&[&[command, option, path_text(file), "--port", &port], more].concat())
}

fn dump(node: &Node, file: &Path, more: &[&str]) -> Ended {
    on_node("dump", "--to", file, node, more)
}

fn info(client: &mut Client, field: &str) -> String {
    let text = String::from_utf8(call!(client, "INFO", "persistence").bytes().unwrap()).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':').map(str::to_owned));
    line.unwrap_or_else(|| panic!("no {field} in {text}"))
}

/// Writes pairs of keys that always have the same value, until told to stop. Their keys are on different shards.
fn write_pairs(client: &mut Client, seed: u64, stop: &AtomicBool, count: &AtomicU64) {
    let mut rng = Rng::new(seed);
    while !stop.load(Ordering::Relaxed) {
        let pair = rng.below(PAIRS as u64);
        let size = [10, 200, 3_000][rng.below(3) as usize];
        let value = rng.bytes(size);
        let (a, b) = (format!("pair:{pair}:a"), format!("pair:{pair}:b"));
        assert_eq!(call!(client, "MSET", a, value, b, value), Reply::ok());
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Moves money between accounts, until told to stop. Each mover has its own accounts.
fn move_money(client: &mut Client, mover: u64, stop: &AtomicBool) {
    let mut rng = Rng::new(mover);
    while !stop.load(Ordering::Relaxed) {
        let account = |number: u64| format!("account:{mover}:{number}");
        let (from, to) = (rng.below(ACCOUNTS as u64), rng.below(ACCOUNTS as u64));
        let amount = rng.below(50).to_string();
        assert_eq!(call!(client, "MULTI"), Reply::ok());
        assert_eq!(call!(client, "DECRBY", account(from), amount), Reply::Simple("QUEUED".into()));
        assert_eq!(call!(client, "INCRBY", account(to), amount), Reply::Simple("QUEUED".into()));
        assert_eq!(call!(client, "EXEC").array().len(), 2);
    }
}

fn check(dumped: &Parsed) {
    let value = |key: &str| dumped.get(key.as_bytes()).map(|(value, _)| value);
    for pair in 0..PAIRS {
        let (a, b) = (value(&format!("pair:{pair}:a")), value(&format!("pair:{pair}:b")));
        assert!(a == b, "pair {pair}: half of an MSET is in the dump");
    }
    for mover in 0..2 {
        let of = |number: usize| {
            let text = value(&format!("account:{mover}:{number}")).expect("an account is missing");
            std::str::from_utf8(text).unwrap().parse::<i64>().unwrap()
        };
        let sum: i64 = (0..ACCOUNTS).map(of).sum();
        assert_eq!(sum, ACCOUNTS as i64 * 1_000, "mover {mover}: half of a transfer is in the dump");
    }
}

#[test]
fn a_dump_under_load_is_of_one_moment_and_restores() {
    let directory = temp_dir();
    let node = Options::new(directory.path().join("source.img")).size("256MiB").arg("--cores=0,1").start();
    let mut client = node.client();
    for mover in 0..2 {
        for number in 0..ACCOUNTS {
            assert_eq!(call!(client, "SET", format!("account:{mover}:{number}"), "1000"), Reply::ok());
        }
    }
    let every_byte: Vec<u8> = (0..=255).collect();
    assert_eq!(call!(client, "SET", every_byte, every_byte, "PXAT", "4102444800000"), Reply::ok());
    assert_eq!(call!(client, "SET", "", ""), Reply::ok());
    // Enough that a dump takes many steps, while which the writers go on.
    for number in 0..3_000 {
        assert_eq!(call!(client, "SET", format!("still:{number}"), vec![b's'; 2_000]), Reply::ok());
    }
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let file = directory.path().join("dump.resp");
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (mut pairs, mut mover, stop, count) = (node.client(), node.client(), &stop, &count);
            scope.spawn(move || write_pairs(&mut pairs, seed, stop, count));
            scope.spawn(move || move_money(&mut mover, seed, stop));
        }
        for round in 0..6 {
            let before = count.load(Ordering::Relaxed);
            let ended = dump(&node, &file, &["--force"]);
            if ended.code != Some(0) {
                stop.store(true, Ordering::Relaxed);
            }
            ended.expect_code(0, "a dump under load");
            check(&parse(&std::fs::read(&file).unwrap()));
            wait_until("the writers went on", 30, || count.load(Ordering::Relaxed) > before + 20 * round);
        }
        stop.store(true, Ordering::Relaxed);
    });
    // Without writers a dump has exactly what the node has.
    dump(&node, &file, &["--force"]).expect_code(0, "a dump at rest");
    let dumped = parse(&std::fs::read(&file).unwrap());
    assert_eq!(dumped.len() as i64, call!(client, "DBSIZE").int());

    let target = Options::new(directory.path().join("target.img")).size("256MiB").start();
    let restored = on_node("restore", "--from", &file, &target, &[]).expect_code(0, "restore");
    assert!(restored.stdout.contains(&format!("{} keys restored", dumped.len())), "{}", restored.stdout);
    let mut copy = target.client();
    assert_eq!(call!(copy, "DBSIZE").int(), dumped.len() as i64);
    for (key, (value, expiry)) in &dumped {
        assert!(call!(copy, "GET", key) == Reply::bulk(value), "{}", key.escape_ascii());
        assert!(call!(client, "GET", key) == Reply::bulk(value), "{}: not the source's", key.escape_ascii());
        if expiry.is_some() {
            assert_eq!(call!(copy, "PEXPIRETIME", key).int(), 4_102_444_800_000);
        }
    }
    assert!(dumped.values().any(|(_, expiry)| expiry.is_some()));

    // Into a node that has keys only when told so, and never from a file that is not whole.
    let refused = on_node("restore", "--from", &file, &target, &[]).expect_code(3, "the node has keys");
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    on_node("restore", "--from", &file, &target, &["--force"]).expect_code(0, "told so");
    let whole = std::fs::read(&file).unwrap();
    assert_eq!(call!(copy, "FLUSHALL"), Reply::ok());
    let cut = directory.path().join("cut.resp");
    for size in [0, 1, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&cut, &whole[..size]).unwrap();
        let refused = on_node("restore", "--from", &cut, &target, &[]).expect_code(1, "a file that was cut");
        assert!(refused.stderr.contains("nothing was restored"), "{}", refused.stderr);
    }
    assert_eq!(call!(copy, "DBSIZE").int(), 0);
    target.stop();
    node.stop();
}

#[test]
fn a_dump_lets_go_whatever_becomes_of_its_reader() {
    let directory = temp_dir();
    let node = Options::new(directory.path().join("reader.img")).size("128MiB").start();
    let mut client = node.client();
    let mut values = BTreeMap::new();
    for number in 0..2_000 {
        let (key, value) = (format!("key:{number}").into_bytes(), vec![b'a' + (number % 26) as u8; 1_000]);
        assert_eq!(call!(client, "SET", key, value), Reply::ok());
        values.insert(key, value);
    }
    let file = directory.path().join("dump.resp");

    // A reader that is there, and another one that comes.
    let mut reader = node.client();
    let number = call!(reader, "BASALT.DUMP", "BEGIN").int().to_string();
    assert_eq!(info(&mut client, "dump_in_progress"), "1");
    assert!(call!(reader, "BASALT.DUMP", "NEXT", number).array().len() > 3);
    let refused = dump(&node, &file, &[]).expect_code(1, "another dump is under way");
    assert!(refused.stderr.contains("another dump"), "{}", refused.stderr);
    assert!(!file.exists(), "a dump that was refused left a file");
    assert!(call!(client, "BASALT.DUMP", "NEXT", "17").error().starts_with("ERR"));
    assert_eq!(call!(reader, "BASALT.DUMP", "END", number), Reply::ok());
    assert_eq!(info(&mut client, "dump_in_progress"), "0");
    assert!(call!(reader, "BASALT.DUMP", "NEXT", number).error().starts_with("ERR"), "it has ended");

    // One that goes away without a word.
    let mut reader = node.client();
    let number = call!(reader, "BASALT.DUMP", "BEGIN").int().to_string();
    call!(reader, "BASALT.DUMP", "NEXT", number);
    drop(reader);
    assert_eq!(call!(client, "SET", "key:0", "written under a pin"), Reply::ok());
    wait_until("the dump is given up", 60, || info(&mut client, "dump_in_progress") == "0");
    values.insert(b"key:0".to_vec(), b"written under a pin".to_vec());
    dump(&node, &file, &[]).expect_code(0, "after a reader that went away");
    let dumped = parse(&std::fs::read(&file).unwrap());
    assert!(
        dumped.into_iter().map(|(key, (value, _))| (key, value)).eq(values),
        "other keys than were written"
    );

    // A FLUSHALL in between: told, rather than half a dump.
    let mut reader = node.client();
    let number = call!(reader, "BASALT.DUMP", "BEGIN").int().to_string();
    assert_eq!(call!(client, "FLUSHALL"), Reply::ok());
    assert!(call!(reader, "BASALT.DUMP", "NEXT", number).error().contains("FLUSHALL"));
    wait_until("its pins are gone", 60, || info(&mut client, "dump_in_progress") == "0");

    // A node stops while somebody reads.
    let number = call!(reader, "BASALT.DUMP", "BEGIN").int();
    assert!(number > 0);
    reader.set_timeout(Duration::from_secs(60));
    node.stop();
}

/// Where these bytes are in an image, once.
#[track_caller]
fn place_of(image: &[u8], bytes: &[u8]) -> usize {
    let places: Vec<usize> = memchr::memmem::find_iter(image, bytes).collect();
    assert_eq!(places.len(), 1, "{} is {} times on the device", bytes.escape_ascii(), places.len());
    places[0]
}

#[test]
fn what_a_dump_leaves_out_is_named_as_far_as_anybody_knows_it() {
    let directory = temp_dir();
    let path = directory.path().join("damaged.img");
    let options = Options::new(&path).size("64MiB");
    let node = options.start();
    let mut client = node.client();
    let mut rng = Rng::new(7);
    let (of_key, of_value) = (rng.bytes(3_000), rng.bytes(3_000));
    for (key, value) in
        [("nameless", &of_key), ("named", &of_value), ("whole", &rng.bytes(100)), ("", &vec![])]
    {
        assert_eq!(call!(client, "SET", key, value), Reply::ok());
    }
    node.stop();
    let image = std::fs::read(&path).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    // A key stands right before its value.
    for at in [place_of(&image, &of_key) - 1, place_of(&image, &of_value)] {
        file.write_all_at(&[image[at] ^ 1], at as u64).unwrap();
    }
    drop(file);
    let node = options.start();
    let to = directory.path().join("dump.resp");
    let ended = dump(&node, &to, &[]).expect_code(4, "a dump of damaged records");
    assert!(
        ended.stdout.contains("2 keys") && ended.stdout.contains("2 that can't be read"),
        "{}",
        ended.stdout
    );
    let lost: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("lost: ")).collect();
    for words in ["a record whose key cannot be read: the stored record", "key 'named': the stored record"] {
        assert_eq!(lost.iter().filter(|line| line.contains(words)).count(), 1, "{words}: {lost:?}");
    }
    assert!(
        lost.len() == 2 && !ended.stderr.contains("IOERR") && !ended.stderr.contains("''"),
        "{}",
        ended.stderr
    );
    let dumped = parse(&std::fs::read(&to).unwrap());
    assert!(dumped.contains_key(&b""[..]) && dumped.contains_key(&b"whole"[..]), "the others are there");
    node.stop();
}
