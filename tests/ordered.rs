//! Keys in order, from outside: ranges, prefixes and restarts of devices with the index `ordered`, and what others say of it.

#![cfg(test)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use common::{Client, Options, Reply, Rng, basalt, call, temp_dir};

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

fn ordered(directory: &Path) -> Options {
    Options::new(directory.join("ordered.img")).size("128MiB").arg("--index").arg("ordered")
}

fn set(client: &mut Client, model: &mut Model, key: &str, value: &[u8]) {
    assert_eq!(client.call(&[b"SET", key.as_bytes(), value]), Reply::ok());
    model.insert(key.as_bytes().to_vec(), value.to_vec());
}

/// Keys of several tenants, some much longer than others, with values of every length up to those in chunks.
fn fill(client: &mut Client, model: &mut Model) {
    let mut rng = Rng::new(5);
    for i in 0..1_200 {
        let key = match i % 4 {
            0 => format!("user:{i:05}"),
            1 => format!("user:{}:name", i * 7 % 500),
            2 => format!("order:{i}"),
            _ => format!("x{}", "long".repeat(i % 50)),
        };
        let value = rng.bytes([0, 10, 200, 3_000][i % 4]);
        set(client, model, &key, &value);
    }
}

fn flat(reply: Reply) -> Vec<Vec<u8>> {
    reply.array().into_iter().map(|one| one.bytes().expect("a bulk string")).collect()
}

fn names(reply: Reply) -> Vec<String> {
    flat(reply).into_iter().map(|one| String::from_utf8_lossy(&one).into_owned()).collect()
}

/// Everything, page by page, as it is to be done: from behind the last key on, until nothing comes.
fn pages(client: &mut Client, limit: &str, is_back: bool) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut found: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    loop {
        let start = match found.last() {
            Some((last, _)) => [b"(", &last[..]].concat(),
            None if is_back => b"+".to_vec(),
            None => b"-".to_vec(),
        };
        let end: &[u8] = if is_back { b"-" } else { b"+" };
        let mut args: Vec<&[u8]> = vec![b"KV.RANGE", &start, end, b"LIMIT", limit.as_bytes()];
        if is_back {
            args.push(b"REV");
        }
        let page = flat(client.call(&args));
        if page.is_empty() {
            return found;
        }
        found.extend(page.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())));
    }
}

fn verify(client: &mut Client, model: &Model) {
    let expected: Vec<_> = model.clone().into_iter().collect();
    assert!(pages(client, "1000", false) == expected);
    let mut back = pages(client, "77", true);
    back.reverse();
    assert!(back == expected);
    assert_eq!(call!(client, "DBSIZE").int(), model.len() as i64);
    let all: Vec<_> = model.keys().cloned().collect();
    assert!(flat(call!(client, "KEYS", "*")).into_iter().collect::<BTreeSet<_>>().into_iter().eq(all));
    for pattern in ["user:*", "user:1*", "order:1?", "x*", "u[a-t]er:*:name", "nothing*", "\\x*"] {
        let prefix = pattern.split(['*', '?', '[']).next().unwrap().replace('\\', "");
        let matching = |key: &[u8]| {
            let text = String::from_utf8_lossy(key);
            text.starts_with(&prefix)
                && (pattern != "order:1?" || text.len() == 8)
                && (!pattern.ends_with("name") || text.starts_with("user:") && text.ends_with(":name"))
        };
        let expected: BTreeSet<Vec<u8>> = model.keys().filter(|key| matching(key)).cloned().collect();
        let listed: BTreeSet<Vec<u8>> = flat(call!(client, "KEYS", pattern)).into_iter().collect();
        assert!(listed == expected, "KEYS {pattern}");
        assert!(scan(client, pattern, "20") == expected, "SCAN of {pattern}");
    }
}

fn scan(client: &mut Client, pattern: &str, count: &str) -> BTreeSet<Vec<u8>> {
    let (mut cursor, mut found) = ("0".to_string(), BTreeSet::new());
    loop {
        let mut step = call!(client, "SCAN", cursor, "MATCH", pattern, "COUNT", count).array();
        found.extend(flat(step.pop().unwrap()));
        cursor = String::from_utf8(step.pop().unwrap().bytes().unwrap()).unwrap();
        assert!(cursor.parse::<u64>().is_ok());
        if cursor == "0" {
            return found;
        }
    }
}

#[test]
fn ranges_are_in_order_within_their_bounds() {
    let directory = temp_dir();
    let node = ordered(directory.path()).start();
    let mut client = node.client();
    assert_eq!(names(call!(client, "KV.RANGE", "-", "+")), Vec::<String>::new());
    for key in ["b", "a", "c", "ab", "d", ""] {
        assert_eq!(call!(client, "SET", key, format!("v{key}")), Reply::ok());
    }
    let all = ["", "v", "a", "va", "ab", "vab", "b", "vb", "c", "vc", "d", "vd"];
    assert_eq!(names(call!(client, "KV.RANGE", "-", "+")), all);
    let keys = |client: &mut Client, args: &[&str]| {
        let args: Vec<&[u8]> =
            ["KV.RANGE"].iter().chain(args).chain(&["keys"]).map(|arg| arg.as_bytes()).collect();
        names(client.call(&args)).join(" ")
    };
    for (args, expected) in [
        (&["[ab", "[c"][..], "ab b c"),
        (&["(ab", "(c"], "b"),
        (&["(ab", "+"], "b c d"),
        (&["-", "(ab"], " a"),
        (&["[aa", "[bb"], "ab b"),
        (&["[c", "[a"], ""),
        (&["+", "-"], ""),
        (&["+", "[z"], ""),
        (&["+", "-", "REV"], "d c b ab a "),
        (&["[c", "(a", "REV"], "c b ab"),
        (&["(c", "[ab", "rev", "limit", "1"], "b"),
        (&["[ab", "[c", "REV"], ""),
        (&["-", "+", "LIMIT", "2"], " a"),
        (&["[", "(", "LIMIT", "2"], ""),
        (&["[", "[", "LIMIT", "2"], ""),
    ] {
        assert_eq!(keys(&mut client, args), expected, "{args:?}");
    }
    for (args, word) in [
        (&["a", "+"][..], "min or max"),
        (&["-", ""], "min or max"),
        (&["-", "+", "LIMIT"], "syntax"),
        (&["-", "+", "LIMIT", "0"], "1 to 10000"),
        (&["-", "+", "LIMIT", "10001"], "1 to 10000"),
        (&["-", "+", "LIMIT", "x"], "not an integer"),
        (&["-", "+", "WITHOUT"], "syntax"),
        (&["-"], "wrong number"),
    ] {
        let args: Vec<&[u8]> = ["KV.RANGE"].iter().chain(args).map(|arg| arg.as_bytes()).collect();
        let reply = client.call(&args);
        assert!(reply.error().contains(word), "{args:?}: {reply:?}");
    }
    let docs = call!(client, "COMMAND", "DOCS", "kv.range").array();
    assert_eq!(docs[0].clone().bytes().as_deref(), Some(&b"kv.range"[..]));
    let info = String::from_utf8(call!(client, "INFO", "server").bytes().unwrap()).unwrap();
    assert!(info.contains("\r\nindex:ordered\r\n"), "{info}");
}

#[test]
fn every_restart_lists_the_same_keys() {
    let directory = temp_dir();
    let options = ordered(directory.path());
    let mut model = Model::new();
    let node = options.start();
    let mut client = node.client();
    fill(&mut client, &mut model);
    verify(&mut client, &model);
    drop(client);
    node.stop();
    options.check().expect_code(0, "check of the image");
    // From checkpoints alone.
    let node = options.start();
    let mut client = node.client();
    let info = String::from_utf8(call!(client, "INFO", "persistence").bytes().unwrap()).unwrap();
    assert!(info.contains("\r\nrecovered_log_bytes:0\r\n"), "{info}");
    verify(&mut client, &model);
    let gone: Vec<_> = model.keys().step_by(3).cloned().collect();
    for key in &gone {
        assert_eq!(client.call(&[b"DEL", key]).int(), 1);
        model.remove(key);
    }
    (0..300).for_each(|i| set(&mut client, &mut model, &format!("new:{}", i * 31 % 1_000), b"new"));
    let batch: Vec<Vec<u8>> = (0..100).map(|i| format!("batch:{i}").into_bytes()).collect();
    let args: Vec<&[u8]> =
        [&b"MSET"[..]].into_iter().chain(batch.iter().flat_map(|key| [&key[..], b"together"])).collect();
    assert_eq!(client.call(&args), Reply::ok());
    model.extend(batch.iter().map(|key| (key.clone(), b"together".to_vec())));
    drop(client);
    node.kill9();
    // From checkpoints and the log behind them.
    let node = options.start();
    let mut client = node.client();
    verify(&mut client, &model);
    // A long value is given by itself, and names without values are not cut.
    let long = vec![7; 5 << 20];
    set(&mut client, &mut model, "order:long", &long);
    verify(&mut client, &model);
    let alone = flat(call!(client, "KV.RANGE", "[order:long", "+"));
    assert!(alone == [&b"order:long"[..], &long], "{} strings", alone.len());
    let listed = flat(call!(client, "KV.RANGE", "-", "+", "LIMIT", "10000", "KEYS"));
    assert!(listed.iter().eq(model.keys()));
    drop(client);
    node.kill9();
    let node = options.start();
    let mut client = node.client();
    verify(&mut client, &model);
    assert_eq!(call!(client, "FLUSHALL"), Reply::ok());
    model.clear();
    verify(&mut client, &model);
    set(&mut client, &mut model, "after", b"all");
    drop(client);
    node.stop();
    let node = options.start();
    verify(&mut node.client(), &model);
    drop(node);
    options.check().expect_code(0, "check of the image");
}

#[test]
fn what_has_expired_is_not_listed_however_it_went() {
    let directory = temp_dir();
    let options = ordered(directory.path());
    let node = options.start();
    let mut client = node.client();
    let mut model = Model::new();
    for i in 0..2_000 {
        let key = format!("key:{i:04}");
        if i % 4 == 0 {
            set(&mut client, &mut model, &key, b"stays");
        } else {
            assert_eq!(call!(client, "SET", key, "goes", "PX", "150"), Reply::ok());
        }
    }
    // DBSIZE reaps what is due.
    while call!(client, "DBSIZE").int() > model.len() as i64 {
        std::thread::yield_now();
    }
    verify(&mut client, &model);
    // A name that is left over comes to be a key's again.
    for i in (1..2_000).step_by(4) {
        set(&mut client, &mut model, &format!("key:{i:04}"), b"back");
    }
    verify(&mut client, &model);
    assert_eq!(call!(client, "SAVE"), Reply::ok());
    drop(client);
    node.kill9();
    verify(&mut options.start().client(), &model);
}

#[test]
fn a_scan_of_a_prefix_misses_nothing_while_others_write() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("ordered.img"));
    // Few shards, so that the prefix has few keys in each at first, and then many.
    let format = ["--size", "128MiB", "--quick", "--index", "ordered", "--shards", "4"];
    options.format(&format).expect_code(0, "formatting");
    let node = options.start();
    let mut client = node.client();
    let mut model = Model::new();
    (0..3_000).for_each(|i| set(&mut client, &mut model, &format!("stays:{i}"), b"v"));
    let stays: BTreeSet<Vec<u8>> = model.keys().cloned().collect();
    let mut writer = node.client();
    let (mut cursor, mut found, mut round) = ("0".to_string(), BTreeSet::new(), 0);
    loop {
        let mut step = call!(client, "SCAN", cursor, "MATCH", "stays:*", "COUNT", "10").array();
        found.extend(flat(step.pop().unwrap()));
        cursor = String::from_utf8(step.pop().unwrap().bytes().unwrap()).unwrap();
        if cursor == "0" {
            break;
        }
        // In the middle the prefix has so many keys that the scan goes another way, and then few again.
        round += 1;
        let keys: Vec<String> = (0..20_000).map(|i| format!("stays:more:{i}")).collect();
        if round == 10 {
            for some in keys.chunks(1_000) {
                let args: Vec<&[u8]> = [&b"MSET"[..]]
                    .into_iter()
                    .chain(some.iter().flat_map(|key| [key.as_bytes(), b"v"]))
                    .collect();
                assert_eq!(writer.call(&args), Reply::ok());
            }
        } else if round == 60 {
            for some in keys.chunks(1_000) {
                let args: Vec<&[u8]> =
                    [&b"DEL"[..]].into_iter().chain(some.iter().map(String::as_bytes)).collect();
                assert_eq!(writer.call(&args).int(), 1_000);
            }
        }
    }
    assert!(round > 60, "{round} rounds");
    assert!(stays.is_subset(&found), "{} of {} are missing", stays.difference(&found).count(), stays.len());
}

#[test]
fn the_index_is_chosen_once() {
    let directory = temp_dir();
    let hash = Options::new(directory.path().join("hash.img")).size("64MiB");
    let node = hash.start();
    let mut client = node.client();
    let reply = call!(client, "KV.RANGE", "-", "+");
    assert!(reply.error().contains("basalt format --index ordered"), "{reply:?}");
    drop(client);
    node.stop();
    let failure =
        hash.clone().arg("--index").arg("ordered").try_start().expect_err("it must not start").to_string();
    assert!(failure.contains("formatted with the index 'hash'"), "{failure}");
    hash.clone().arg("--index").arg("hash").start().stop();

    let image = directory.path().join("made.img");
    let made = image.to_str().unwrap();
    let args = ["format", "--device", made, "--size", "64MiB", "--quick", "--index"];
    let refused = basalt(&[&args[..], &["sorted"]].concat()).expect_code(2, "an index that there is not");
    assert!(refused.text().contains("'sorted' is no index"), "{}", refused.text());
    let done = basalt(&[&args[..], &["ordered"]].concat()).expect_code(0, "formatting");
    assert!(done.text().contains("index ordered"), "{}", done.text());
    let shown = basalt(&["inspect", "superblock", "--device", made, "--json"]).expect_code(0, "inspect");
    assert!(
        shown.text().contains("\"index\": \"ordered\"") || shown.text().contains("\"index\":\"ordered\"")
    );
    let options = Options::new(&image);
    let failure =
        options.clone().arg("--index").arg("hash").try_start().expect_err("it must not start").to_string();
    assert!(failure.contains("formatted with the index 'ordered'"), "{failure}");
    // What is not said is what is there.
    let node = options.start();
    assert_eq!(names(call!(node.client(), "KV.RANGE", "-", "+")), Vec::<String>::new());
    node.stop();
    // And the configuration file says it as well.
    let config = directory.path().join("basalt.toml");
    std::fs::write(&config, "index = \"hash\"\n").unwrap();
    let with_file = options.clone().arg("--config").arg(config.to_str().unwrap());
    assert!(with_file.try_start().is_err());
    std::fs::write(&config, "index = \"ordered\"\n").unwrap();
    with_file.start().stop();
}
