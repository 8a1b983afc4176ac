//! Devices that are full, damaged, cut short or somebody else's: never a wrong answer, never a silent one.

#![cfg(test)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::node::{check, path_text};
use common::{Client, Node, Options, Reply, Rng, basalt, call, temp_dir};

const BLOCK: usize = 4096;

/// Writes 8 KiB values until the device says that it is full; returns what was acknowledged.
fn fill(client: &mut Client) -> BTreeMap<String, Vec<u8>> {
    let mut rng = Rng::new(11);
    let mut acked = BTreeMap::new();
    for index in 0.. {
        let (key, value) = (format!("full:{index:06}"), rng.bytes(8 << 10));
        match call!(client, "SET", key, value) {
            Reply::Simple(ok) if ok == "OK" => acked.insert(key, value),
            Reply::Error(text) => {
                assert!(text.starts_with("OOM device is full"), "{text}");
                break;
            }
            other => panic!("SET answered {}", other.brief()),
        };
        assert!(index < 64 << 10, "a 64 MiB device took more than 512 MiB");
    }
    assert!(acked.len() > 500, "a 64 MiB device was full after {} values of 8 KiB", acked.len());
    acked
}

#[track_caller]
fn read_all(client: &mut Client, wanted: &BTreeMap<String, Vec<u8>>) {
    for (key, value) in wanted {
        let found = call!(client, "GET", key);
        assert!(found == Reply::bulk(value), "{key}: {}", found.brief());
    }
    assert_eq!(call!(client, "DBSIZE").int(), wanted.len() as i64);
}

#[test]
fn a_full_device_reads_and_deletes_and_restarts() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("full.img")).size("64MiB");
    let node = options.start();
    let mut client = node.client();
    let mut acked = fill(&mut client);
    read_all(&mut client, &acked);
    // Full stays full, on another connection too, for batches as well, and in whole.
    let mut other = node.client();
    // More than is left in the open extents of all shards.
    let big = vec![b'x'; 900_000];
    let names: Vec<String> = (0..30).map(|index| format!("big:{index}")).collect();
    let pairs = names.iter().flat_map(|name| [name.as_bytes(), &big]);
    let reply = other.call(&[&b"MSET"[..]].into_iter().chain(pairs).collect::<Vec<_>>());
    assert!(reply.error().starts_with("OOM"), "{reply:?}");
    let exists = [&b"EXISTS"[..]].into_iter().chain(names.iter().map(String::as_bytes));
    assert_eq!(other.call(&exists.collect::<Vec<_>>()).int(), 0, "a refused batch did nothing");
    assert_eq!(call!(other, "DEL", "full:000000").int(), 1, "deletes have reserved space");
    acked.remove("full:000000");
    node.kill9();

    let node = options.start();
    let mut client = node.client();
    read_all(&mut client, &acked);
    for index in 1..100 {
        let key = format!("full:{index:06}");
        assert_eq!(call!(client, "DEL", key).int(), 1, "{key}");
        acked.remove(&key);
    }
    node.stop();
    check(&options.device).expect_code(0, "check of a full device");
    let node = options.start();
    read_all(&mut node.client(), &acked);
    node.stop();
}

/// An image with known values, stopped cleanly, and where each value's bytes lie in it.
struct Canonical {
    directory: tempfile::TempDir,
    image: Vec<u8>,
    values: BTreeMap<String, Vec<u8>>,
    /// Blocks that `format` alone writes: superblock copies and partition table.
    format_blocks: Vec<usize>,
}

impl Canonical {
    fn new() -> Canonical {
        let directory = temp_dir();
        let path = directory.path().join("canonical.img");
        basalt(&["format", "--device", path_text(&path), "--size", "64MiB"]).expect_code(0, "format");
        let fresh = std::fs::read(&path).unwrap();
        let format_blocks: Vec<usize> = (0..fresh.len() / BLOCK)
            .filter(|b| fresh[b * BLOCK..][..BLOCK].iter().any(|x| *x != 0))
            .collect();
        assert!(format_blocks.len() >= 4, "format left only {} written blocks", format_blocks.len());
        let options = Options::new(&path);
        let node = options.start();
        let mut client = node.client();
        let mut rng = Rng::new(3);
        let mut values = BTreeMap::new();
        for index in 0..200 {
            let size = [64, 900, 5_000, 40_000][index % 4];
            let (key, value) = (format!("canon:{index:03}"), rng.bytes(size));
            assert_eq!(call!(client, "SET", key, value), Reply::ok());
            values.insert(key, value);
        }
        node.stop();
        let image = std::fs::read(&path).unwrap();
        Canonical { directory, image, values, format_blocks }
    }

    /// Where the first bytes of a value lie; exactly one place holds a value that was written once.
    fn places(&self, key: &str) -> Vec<usize> {
        let needle = &self.values[key][..32];
        memchr::memmem::find_iter(&self.image, needle).collect()
    }

    /// A copy with some bytes changed.
    fn damaged(&self, name: &str, flips: &[(usize, u8)]) -> PathBuf {
        let path = self.directory.path().join(name);
        write_sparse(&path, &self.image);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        for (at, mask) in flips {
            file.write_all_at(&[self.image[*at] ^ mask], *at as u64).unwrap();
        }
        path
    }

    /// Starts on a damaged copy. Whatever is damaged, no answer may be wrong: the right value, or a damage error, or no
    /// start at all with a sentence. Returns how many keys answered with an error; `None` when it refused to start.
    #[track_caller]
    fn read_back(&self, path: &Path, what: &str) -> Option<usize> {
        let node = match Options::new(path).try_start() {
            Ok(node) => node,
            Err(failure) => {
                let refused = failure.code.is_some_and(|code| code == 1 || code == 3);
                assert!(refused && !failure.stderr.trim().is_empty(), "{what}: {failure}");
                assert!(!failure.stderr.contains("panicked"), "{what}: {failure}");
                return None;
            }
        };
        let errors = self.verify(&node, what);
        node.stop();
        Some(errors)
    }

    #[track_caller]
    fn verify(&self, node: &Node, what: &str) -> usize {
        let mut client = node.client();
        let mut errors = 0;
        for (key, value) in &self.values {
            match call!(client, "GET", key) {
                Reply::Bulk(bytes) if bytes == *value => {}
                Reply::Error(text) => {
                    assert!(text.starts_with("IOERR") && text.contains("damaged"), "{what}: {key}: {text}");
                    errors += 1;
                }
                other => panic!("{what}: {key} answered {}", other.brief()),
            }
        }
        errors
    }
}

/// Most of an image is zeros: written as holes, hundreds of copies cost little.
fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (index, block) in bytes.chunks(BLOCK).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, (index * BLOCK) as u64).unwrap();
        }
    }
}

#[test]
fn a_damaged_record_is_reported_and_never_served() {
    let canonical = Canonical::new();
    let mut rng = Rng::from_env("damaged records");
    for (round, index) in [0, 1, 2, 3, 57, 102, 158, 199].into_iter().enumerate() {
        let key = format!("canon:{index:03}");
        let places = canonical.places(&key);
        assert!(!places.is_empty(), "{key} is not on the device in the clear");
        let within = rng.below(canonical.values[&key].len() as u64) as usize;
        let flips: Vec<(usize, u8)> = places.iter().map(|at| (at + within, 1 << rng.below(8))).collect();
        let path = canonical.damaged("record.img", &flips);
        let what = format!("{key}, byte {within} of its value changed");

        let ended = check(&path).expect_code(4, &what);
        let text = ended.text();
        let named = text.contains(&key) || text.contains("extent") || text.contains("byte");
        assert!(named, "{what}: check names neither key nor range: {text}");
        let json = basalt(&["check", "--device", path_text(&path), "--json"]).expect_code(4, &what);
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(&json.stdout);
        assert!(parsed.is_ok_and(|value| value.is_object()), "{what}: {}", json.stdout);

        let errors = canonical.read_back(&path, &what);
        assert!(errors.is_none_or(|count| count >= 1), "{what}: the damaged value was served");
        println!("round {round}: {what}: {errors:?} keys answered with an error");
    }
}

/// Follows the cursors, and those that errors name. Gives the keys and the errors.
fn scan(client: &mut Client, count: usize) -> (BTreeSet<String>, Vec<String>) {
    let (mut keys, mut errors, mut cursor) = (BTreeSet::new(), Vec::new(), "0".to_owned());
    loop {
        cursor = match call!(client, "SCAN", cursor, "COUNT", count.to_string()) {
            Reply::Array(parts) => {
                let [Reply::Bulk(next), Reply::Array(found)] = &parts[..] else {
                    panic!("a scan answers {parts:?}")
                };
                let named = |key: &Reply| match key {
                    Reply::Bulk(key) => String::from_utf8(key.clone()).unwrap(),
                    other => panic!("a scan lists {other:?}"),
                };
                keys.extend(found.iter().map(named));
                String::from_utf8(next.clone()).unwrap()
            }
            Reply::Error(text) => {
                let next = text.split("SCAN ").nth(1).and_then(|rest| rest.split(' ').next());
                let next = next.unwrap_or_else(|| panic!("where to go on is not said: {text}")).to_owned();
                errors.push(text);
                next
            }
            other => panic!("a scan answers {}", other.brief()),
        };
        if cursor == "0" {
            return (keys, errors);
        }
    }
}

#[test]
fn a_scan_lists_every_key_but_those_whose_records_cannot_be_read() {
    let canonical = Canonical::new();
    let lost = ["canon:004", "canon:081"];
    // Keys stand right before their values.
    let flips: Vec<(usize, u8)> =
        lost.iter().flat_map(|key| canonical.places(key)).map(|at| (at - 1, 1)).collect();
    let path = canonical.damaged("keys.img", &flips);
    let node = Options::new(&path).start();
    let mut client = node.client();
    let mut expected: BTreeSet<String> = canonical.values.keys().cloned().collect();
    expected.retain(|key| !lost.contains(&key.as_str()));
    for count in [1, 10, 1_000] {
        let (keys, errors) = scan(&mut client, count);
        assert_eq!(errors.len(), lost.len(), "COUNT {count}: {errors:?}");
        assert!(errors.iter().all(|text| text.starts_with("IOERR")), "{errors:?}");
        assert_eq!(keys, expected, "COUNT {count}");
    }
    match call!(client, "KEYS", "*") {
        Reply::Error(text) => assert!(text.starts_with("IOERR") && text.contains("SCAN lists"), "{text}"),
        other => panic!("KEYS answers {}", other.brief()),
    }
    node.stop();
}

#[test]
fn damage_anywhere_never_gives_a_wrong_answer() {
    let canonical = Canonical::new();
    let mut rng = Rng::from_env("damage anywhere");
    let written: Vec<usize> = (0..canonical.image.len() / BLOCK)
        .filter(|b| canonical.image[b * BLOCK..][..BLOCK].iter().any(|x| *x != 0))
        .collect();
    let mut blocks: Vec<usize> = (0..16).map(|_| *rng.pick(&written)).collect();
    let stride = canonical.format_blocks.len().div_ceil(12);
    blocks.extend(canonical.format_blocks.iter().step_by(stride));
    let (mut refused, mut served) = (0, 0);
    for block in blocks {
        let flips = [(block * BLOCK + rng.below(BLOCK as u64) as usize, 1 << rng.below(8))];
        let path = canonical.damaged("anywhere.img", &flips);
        let what = format!("block {block}, byte {} changed", flips[0].0);
        let code = check(&path).code;
        // Padding and copies that nothing needs may be damaged without a finding; the check itself always runs.
        assert!(matches!(code, Some(0 | 4)), "{what}: check ended with {code:?}");
        match canonical.read_back(&path, &what) {
            None => refused += 1,
            Some(errors) => {
                served += 1;
                assert!(
                    errors == 0 || code == Some(4),
                    "{what}: keys are damaged, but check ended with {code:?}"
                );
            }
        }
    }
    println!("{served} damaged images served, {refused} refused");
    assert!(served > 0, "no damaged image was ever served: one changed byte must not take everything");
}

/// One superblock copy may be lost without losing the node; all of them at once are a refusal in words.
#[test]
fn superblock_copies_stand_in_for_each_other() {
    let canonical = Canonical::new();
    let all = &canonical.format_blocks;
    for block in [all[0], all[all.len() / 2], all[all.len() - 1]] {
        let flips: Vec<(usize, u8)> = (0..BLOCK).map(|byte| (block * BLOCK + byte, 0xff)).collect();
        let path = canonical.damaged("superblock.img", &flips);
        let what = format!("block {block} lost in whole");
        assert!(canonical.read_back(&path, &what).is_some(), "{what}: one lost block took the node");
    }
    let flips: Vec<(usize, u8)> =
        all.iter().flat_map(|block| (0..BLOCK).map(move |byte| (block * BLOCK + byte, 0x55))).collect();
    let path = canonical.damaged("superblocks.img", &flips);
    assert_eq!(canonical.read_back(&path, "all superblocks lost"), None, "it started without any superblock");
    let code = check(&path).code;
    assert!(matches!(code, Some(4 | 8)), "check without any superblock ended with {code:?}");
    // What may be saved comes before what destroys it, and is said once.
    let (device, to) = (path_text(&path), canonical.directory.path().join("keys.resp"));
    for command in [
        &["serve", "--listen", "127.0.0.1:0", "--device", device][..],
        &["check", "--device", device],
        &["salvage", "--device", device, "--to", path_text(&to)],
    ] {
        let said = basalt(command).stderr;
        let one = |words: &str| {
            let places: Vec<usize> = said.match_indices(words).map(|(at, _)| at).collect();
            assert_eq!(places.len(), 1, "{command:?} says {words:?} {} times: {said}", places.len());
            places[0]
        };
        assert!(one("`basalt salvage` needs one of them") < one("basalt format"), "{command:?}: {said}");
        assert!(one("all 4 copies are gone") < one("destroys what is there"), "{command:?}: {said}");
    }
}

/// Refuses to serve and to check, in words, and leaves every byte alone.
#[track_caller]
fn expect_refusal(path: &Path, what: &str) {
    let before = std::fs::read(path).unwrap();
    match Options::new(path).try_start() {
        Ok(_) => panic!("{what}: it was served"),
        Err(failure) => {
            assert!(matches!(failure.code, Some(1 | 3)), "{what}: {failure}");
            assert!(failure.stderr.contains(path_text(path)), "{what}: the device is not named: {failure}");
            assert!(!failure.stderr.contains("panicked"), "{what}: {failure}");
        }
    }
    let ended = check(path);
    assert!(matches!(ended.code, Some(4 | 8)), "{what}: check ended with {:?}: {}", ended.code, ended.text());
    assert!(std::fs::read(path).unwrap() == before, "{what}: a refused device was written to");
}

#[test]
fn what_is_not_a_whole_basalt_device_is_refused() {
    let canonical = Canonical::new();
    let directory = canonical.directory.path();
    for size in [32 << 20, (64 << 20) - BLOCK, 1 << 20, 100_000, 1] {
        let path = directory.join("truncated.img");
        write_sparse(&path, &canonical.image[..size]);
        expect_refusal(&path, &format!("an image cut to {size} bytes"));
    }
    let text = directory.join("text.img");
    std::fs::write(&text, "somebody's letters\n".repeat(400_000)).unwrap();
    expect_refusal(&text, "a file of text");
    let noise = directory.join("noise.img");
    std::fs::write(&noise, Rng::new(1).bytes(8 << 20)).unwrap();
    expect_refusal(&noise, "a file of noise");
    let zeros = directory.join("zeros.img");
    std::fs::File::create(&zeros).unwrap().set_len(64 << 20).unwrap();
    expect_refusal(&zeros, "an image of zeros");
    expect_refusal_of_missing(directory);
}

#[track_caller]
fn expect_refusal_of_missing(directory: &Path) {
    let missing = directory.join("no/such/directory/x.img");
    let failure = Options::new(&missing).try_start().expect_err("a device in no directory");
    assert_eq!(failure.code, Some(1), "{failure}");
    check(&directory.join("missing.img")).expect_code(8, "check of what is not there");
    assert!(!directory.join("missing.img").exists(), "check made a file");
}

#[test]
fn damage_that_a_start_found_is_in_info() {
    let directory = temp_dir();
    let path = directory.path().join("found.img");
    let options = Options::new(&path).size("64MiB");
    let node = options.start();
    let value = Rng::new(9).bytes(5_000);
    assert_eq!(call!(node.client(), "SET", "key", value), Reply::ok());
    // Killed, so that the next start reads the log.
    node.kill9();
    let found = |options: &Options| {
        let node = options.start();
        let info = call!(node.client(), "INFO", "persistence").bytes().expect("INFO is a string");
        let info = String::from_utf8(info).unwrap();
        node.kill9();
        info.lines().find_map(|line| line.strip_prefix("recovery_damage:")).map(str::to_owned)
    };
    assert_eq!(found(&options).as_deref(), Some("0"));
    let image = std::fs::read(&path).unwrap();
    let at = memchr::memmem::find(&image, &value).expect("the value is on the device");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[image[at] ^ 1], at as u64).unwrap();
    assert_eq!(found(&options).as_deref(), Some("1"));
}

/// Fills extents of a key's shard with what is garbage at once, so that the key's own are full, and has garbage collected.
fn seal_and_compact(client: &mut Client, key: &str) {
    // The same slot, by its hash tag.
    let filler = format!("{{{key}}}:filler");
    for _ in 0..40 {
        assert_eq!(call!(client, "SET", filler, vec![b'f'; 100_000]), Reply::ok());
    }
    assert_eq!(call!(client, "DEL", filler).int(), 1);
    assert_eq!(call!(client, "COMPACT"), Reply::ok());
}

#[test]
fn damage_that_was_written_over_is_none_and_what_is_lost_stays() {
    let canonical = Canonical::new();
    for (index, kills, deletes) in [(1, false, false), (2, true, false), (3, true, true), (5, false, true)] {
        let key = format!("canon:{index:03}");
        let what = format!("{key}, kills: {kills}, deletes: {deletes}");
        let flips: Vec<(usize, u8)> = canonical.places(&key).iter().map(|at| (at + 20, 1)).collect();
        let options = Options::new(canonical.damaged("written-over.img", &flips));
        let end = |node: Node| if kills { node.kill9() } else { node.stop() };
        let is_lost = |client: &mut Client| match call!(client, "GET", key) {
            Reply::Error(text) => text.starts_with("IOERR"),
            other => panic!("{what}: GET answers {}", other.brief()),
        };
        for round in 0..2 {
            let node = options.start();
            let mut client = node.client();
            assert!(is_lost(&mut client));
            seal_and_compact(&mut client, &key);
            assert!(is_lost(&mut client), "{what}: COMPACT in round {round}");
            end(node);
            let text = check(&options.device).expect_code(4, &what).text();
            assert!(text.contains(&format!("key '{key}'")) && text.contains("write or delete"), "{text}");
        }

        let node = options.start();
        let mut client = node.client();
        assert_eq!(call!(client, "SET", key, "new"), Reply::ok());
        if deletes {
            assert_eq!(call!(client, "DEL", key).int(), 1);
        }
        end(node);
        let text = check(&options.device).expect_code(0, &what).text();
        assert!(text.contains("superseded") && text.contains(&format!("key '{key}'")), "{what}: {text}");
        let json = basalt(&["check", "--device", path_text(&options.device), "--json"]).expect_code(0, &what);
        let json: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
        let count = |of: &str| json[of].as_array().map(Vec::len);
        let counts = (count("damage"), count("superseded"), json["clean"].as_bool());
        assert_eq!(counts, (Some(0), Some(1), Some(true)), "{what}: {json}");

        let node = options.start();
        seal_and_compact(&mut node.client(), &key);
        end(node);
        let text = check(&options.device).expect_code(0, &what).text();
        assert!(!text.contains("superseded"), "{what}: {text}");
        let expected = if deletes { Reply::Nil } else { Reply::bulk(b"new") };
        let node = options.start();
        assert_eq!(call!(node.client(), "GET", key), expected, "{what}");
        node.stop();
    }
}
