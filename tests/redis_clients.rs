//! Programs that speak to Redis speak to the node unchanged: redis-cli, redis-benchmark, redis-py.

#![cfg(test)]

mod common;

use std::io::{Seek, Write};

use common::node::run;
use common::tools::{python_with_redis, tool};
use common::{Node, Options, call, temp_dir};

fn start() -> (tempfile::TempDir, Node) {
    let directory = temp_dir();
    let node = Options::new(directory.path().join("clients.img")).size("512MiB").start();
    (directory, node)
}

#[track_caller]
fn redis_cli(node: &Node, args: &[&str]) -> String {
    let mut command = tool("redis-cli");
    command.args(["-h", "127.0.0.1", "-p", &node.port().to_string()]).args(args);
    let ended = run(command, None).expect_code(0, &format!("redis-cli {args:?}"));
    ended.stdout.trim_end().to_string()
}

#[test]
fn redis_cli_drives_simple_commands() {
    let (_directory, node) = start();
    let table: &[(&[&str], &str)] = &[
        (&["PING"], "PONG"),
        (&["ECHO", "hello"], "hello"),
        (&["SET", "greeting", "hello world"], "OK"),
        (&["GET", "greeting"], "hello world"),
        (&["STRLEN", "greeting"], "11"),
        (&["APPEND", "greeting", "!"], "12"),
        (&["GETRANGE", "greeting", "-6", "-1"], "world!"),
        (&["SETRANGE", "greeting", "6", "there"], "12"),
        (&["GET", "greeting"], "hello there!"),
        (&["TYPE", "greeting"], "string"),
        (&["GET", "nothing"], ""),
        (&["INCR", "counter"], "1"),
        (&["INCRBY", "counter", "41"], "42"),
        (&["DECRBY", "counter", "2"], "40"),
        (&["INCRBYFLOAT", "ratio", "1.5"], "1.5"),
        (&["SET", "counter", "x", "NX"], ""),
        (&["SETNX", "counter", "x"], "0"),
        (&["MSET", "a", "1", "b", "2", "c", "3"], "OK"),
        (&["MGET", "a", "b", "c", "d"], "1\n2\n3\n"),
        (&["EXISTS", "a", "b", "nothing"], "2"),
        (&["EXPIRE", "a", "1000"], "1"),
        (&["PERSIST", "a"], "1"),
        (&["TTL", "a"], "-1"),
        (&["TTL", "nothing"], "-2"),
        (&["GETDEL", "a"], "1"),
        (&["DEL", "b", "c", "nothing"], "2"),
        (&["DBSIZE"], "3"),
        (&["FLUSHALL"], "OK"),
        (&["DBSIZE"], "0"),
    ];
    for (args, wanted) in table {
        // redis-cli ends a list with an empty line for a null; only that much of the layout is trimmed.
        assert_eq!(redis_cli(&node, args), wanted.trim_end(), "{args:?}");
    }
    assert!(redis_cli(&node, &["INFO"]).contains("redis_version:"), "INFO is what tools read a version from");
    let error = redis_cli(&node, &["NOSUCHCOMMAND"]);
    assert!(error.contains("ERR unknown command"), "{error}");
    let error = redis_cli(&node, &["GET"]);
    assert!(error.contains("wrong number of arguments"), "{error}");
    node.stop();
}

#[test]
fn redis_cli_speaks_resp3() {
    let (_directory, node) = start();
    assert_eq!(redis_cli(&node, &["-3", "SET", "k", "v"]), "OK");
    assert_eq!(redis_cli(&node, &["-3", "GET", "k"]), "v");
    let hello = redis_cli(&node, &["-3", "HELLO", "3"]);
    assert!(hello.contains("proto") && hello.contains('3'), "{hello}");
    node.stop();
}

#[test]
fn redis_cli_reads_commands_from_its_input() {
    let (_directory, node) = start();
    let mut script = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    script.write_all(b"MULTI\nSET a 1\nINCR a\nEXEC\nGET a\n").unwrap();
    script.rewind().unwrap();
    let mut command = tool("redis-cli");
    command.args(["-p", &node.port().to_string()]);
    let ended = run(command, Some(script)).expect_code(0, "redis-cli with a script");
    assert_eq!(ended.stdout.lines().collect::<Vec<_>>(), ["OK", "QUEUED", "QUEUED", "OK", "2", "2"]);
    node.stop();
}

#[test]
fn redis_cli_pipe_loads_in_bulk() {
    let (_directory, node) = start();
    let mut commands = Vec::new();
    for index in 0..20_000u32 {
        let (key, value) = (format!("bulk:{index}"), vec![b'v'; (index % 600) as usize]);
        common::resp::encode_into(&mut commands, &[b"SET", key.as_bytes(), &value]);
    }
    let mut input = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    input.write_all(&commands).unwrap();
    input.rewind().unwrap();
    let mut command = tool("redis-cli");
    command.args(["-p", &node.port().to_string(), "--pipe"]);
    let ended = run(command, Some(input)).expect_code(0, "redis-cli --pipe");
    assert!(ended.stdout.contains("errors: 0, replies: 20000"), "{}", ended.text());
    let mut client = node.client();
    assert_eq!(call!(client, "DBSIZE").int(), 20_000);
    for index in (0..20_000).step_by(37) {
        assert_eq!(call!(client, "STRLEN", format!("bulk:{index}")).int(), index % 600, "bulk:{index}");
    }
    node.stop();
}

#[track_caller]
fn redis_benchmark(node: &Node, args: &[&str]) -> String {
    let mut command = tool("redis-benchmark");
    command.args(["-h", "127.0.0.1", "-p", &node.port().to_string()]).args(args);
    let ended = run(command, None).expect_code(0, &format!("redis-benchmark {args:?}"));
    let text = ended.text();
    // A node without CONFIG GET is fine for redis-benchmark, and it says so; any other error is not.
    let lines = text.lines().flat_map(|line| line.rsplit('\r'));
    let errors: Vec<&str> =
        lines.filter(|line| line.to_lowercase().contains("error") && !line.contains("CONFIG")).collect();
    assert!(errors.is_empty(), "redis-benchmark {args:?} reported {errors:?}");
    text
}

#[test]
fn redis_benchmark_runs_without_an_error() {
    let (_directory, node) = start();
    let args = ["-t", "set,get,incr,mset", "-n", "20000", "-r", "10000", "-P", "16", "-c", "50", "-q"];
    let text = redis_benchmark(&node, &args);
    for test in ["SET:", "GET:", "INCR:", "MSET"] {
        assert!(text.contains(test), "no figure for {test} in:\n{text}");
    }
    let mut client = node.client();
    // Keys are drawn from 10000 per test: 20000 draws of SET, 20000 of INCR, 200000 of MSET leave between these.
    let count = call!(client, "DBSIZE").int();
    assert!((10_000..=30_000).contains(&count), "{count} keys after redis-benchmark");
    let key = "key:000000000001";
    let value = call!(client, "GET", key).bytes();
    assert!(value.is_none_or(|bytes| bytes.len() == 3), "{key} holds a strange value");
    node.stop();
}

#[test]
fn redis_benchmark_runs_unpipelined_and_with_long_values() {
    let (_directory, node) = start();
    redis_benchmark(&node, &["-t", "ping,set,get", "-n", "3000", "-r", "500", "-c", "20", "-q"]);
    let args = ["-t", "set,get", "-n", "400", "-r", "100", "-d", "100000", "-c", "10", "-P", "4", "-q"];
    redis_benchmark(&node, &args);
    let mut client = node.client();
    let keys = call!(client, "KEYS", "key:*").array();
    let lengths = keys.into_iter().map(|key| call!(client, "STRLEN", key.bytes().unwrap()).int());
    assert!(lengths.into_iter().any(|length| length == 100_000), "no long value was stored");
    node.stop();
}

fn redis_py(protocol: &str) {
    let (_directory, node) = start();
    let mut command = python_with_redis();
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/redis_py/test_client.py"));
    command.args([&node.port().to_string(), protocol]);
    let ended = run(command, None).expect_code(0, "tests/redis_py/test_client.py");
    // Without this line a script that did nothing would pass.
    assert!(ended.stdout.contains("checks passed"), "{}", ended.text());
    node.stop();
}

#[test]
fn redis_py_over_resp2() {
    redis_py("2");
}

#[test]
fn redis_py_over_resp3() {
    redis_py("3");
}
