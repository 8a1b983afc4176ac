//! Restarts from checkpoints, from outside: what is read of the log, and that nothing is lost whatever becomes of them.

#![cfg(test)]

mod common;

use std::os::unix::fs::FileExt;

use common::{Client, Node, Options, Reply, Rng, call, temp_dir};

const KEYS: usize = 3_000;
const VALUE_SIZE: usize = 2 << 10;

/// What the start read, of checkpoints and of the log.
fn recovered(client: &mut Client) -> (u64, u64) {
    let text = call!(client, "INFO", "persistence").bytes().expect("INFO");
    let text = String::from_utf8_lossy(&text).into_owned();
    let figure = |name: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|digits| digits.trim().parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    (figure("recovered_checkpoint_bytes"), figure("recovered_log_bytes"))
}

fn value_of(key: usize, round: u64) -> Vec<u8> {
    Rng::new(key as u64 * 1_000 + round).bytes(VALUE_SIZE)
}

fn key_of(key: usize) -> String {
    format!("key:{key}")
}

fn write(client: &mut Client, keys: std::ops::Range<usize>, round: u64) {
    for chunk in keys.collect::<Vec<_>>().chunks(100) {
        let args: Vec<Vec<u8>> = [b"MSET".to_vec()]
            .into_iter()
            .chain(chunk.iter().flat_map(|key| [key_of(*key).into_bytes(), value_of(*key, round)]))
            .collect();
        assert_eq!(client.call(&args.iter().map(Vec::as_slice).collect::<Vec<_>>()), Reply::ok());
    }
}

/// Every key has the value of its round; 0 for none.
fn verify(node: &Node, rounds: &[u64]) {
    let mut client = node.client();
    for (key, round) in rounds.iter().enumerate() {
        let wanted = (*round > 0).then(|| value_of(key, *round));
        assert_eq!(call!(client, "GET", key_of(key)).bytes(), wanted, "key {key}");
    }
    let there = rounds.iter().filter(|round| **round > 0).count();
    assert_eq!(call!(client, "DBSIZE").int(), there as i64);
}

fn options(directory: &std::path::Path) -> Options {
    Options::new(directory.join("checkpoints.img")).size("128MiB")
}

#[test]
fn after_a_clean_stop_only_checkpoints_are_read() {
    let directory = temp_dir();
    let options = options(directory.path());
    let node = options.start();
    let mut rounds = vec![1; KEYS];
    write(&mut node.client(), 0..KEYS, 1);
    for (key, round) in rounds.iter_mut().enumerate().take(100) {
        assert_eq!(call!(node.client(), "DEL", key_of(key)).int(), 1);
        *round = 0;
    }
    node.stop();
    options.check().expect_code(0, "check of the image");
    let node = options.start();
    let (checkpoints, log) = recovered(&mut node.client());
    assert!(checkpoints > 0 && log == 0, "{checkpoints} bytes of checkpoints and {log} of log were read");
    verify(&node, &rounds);
    // What is written now is behind the checkpoint.
    write(&mut node.client(), 100..200, 2);
    rounds[100..200].fill(2);
    node.kill9();
    let node = options.start();
    let (checkpoints, log) = recovered(&mut node.client());
    assert!(checkpoints > 0 && log > 0, "{checkpoints} bytes of checkpoints and {log} of log were read");
    assert!(log < 2 << 20, "{log} bytes of log for 200 KiB of values");
    verify(&node, &rounds);
    node.stop();
}

#[test]
fn save_writes_a_checkpoint_from_which_a_start_after_a_kill_goes_on() {
    let directory = temp_dir();
    let options = options(directory.path());
    let node = options.start();
    let mut rounds = vec![1; KEYS];
    write(&mut node.client(), 0..KEYS, 1);
    assert_eq!(call!(node.client(), "SAVE"), Reply::ok());
    write(&mut node.client(), 0..50, 2);
    rounds[..50].fill(2);
    node.kill9();
    options.check().expect_code(0, "check of the image");
    let node = options.start();
    let (checkpoints, log) = recovered(&mut node.client());
    assert!(checkpoints > 0 && log > 0 && log < 2 << 20, "{checkpoints} and {log} bytes were read");
    verify(&node, &rounds);
    node.stop();
}

#[test]
fn checkpoints_come_by_bytes_and_a_damaged_one_costs_only_time() {
    damaged_checkpoints_cost_only_time("hash");
}

#[test]
fn so_it_is_where_keys_are_known_by_name() {
    damaged_checkpoints_cost_only_time("ordered");
}

fn damaged_checkpoints_cost_only_time(index: &str) {
    let directory = temp_dir();
    let options =
        options(directory.path()).arg("--checkpoint-interval").arg("1MiB").arg("--index").arg(index);
    let node = options.start();
    let mut rounds = vec![0; KEYS];
    for round in 1..4 {
        write(&mut node.client(), 0..KEYS, round);
        rounds.fill(round);
    }
    let text = call!(node.client(), "INFO", "persistence").bytes().expect("INFO");
    let text = String::from_utf8_lossy(&text).into_owned();
    let written = text.lines().find_map(|line| line.strip_prefix("checkpoints_written:"));
    let written: u32 = written.and_then(|count| count.trim().parse().ok()).expect("a count");
    assert!(written > 2, "{written} checkpoints");
    node.stop();
    // Breaks every chunk of every checkpoint: their magic is at the start of a block.
    let image = std::fs::read(&options.device).expect("the image");
    let file = std::fs::OpenOptions::new().write(true).open(&options.device).expect("the image");
    let chunks = (0..image.len()).step_by(4096).filter(|at| image[*at..].starts_with(b"CHNK"));
    let mut broken = 0;
    for at in chunks {
        file.write_all_at(&[image[at + 30] ^ 1], at as u64 + 30).expect("a byte is written");
        broken += 1;
    }
    assert!(broken > 0, "there are checkpoints");
    options.check().expect_code(0, "a checkpoint that can't be read is no damage");
    let node = options.start();
    let (_, log) = recovered(&mut node.client());
    assert!(log > (KEYS * VALUE_SIZE) as u64, "{log} bytes of log were read");
    verify(&node, &rounds);
    let listed = call!(node.client(), "KEYS", "key:*").array().len();
    assert_eq!(listed, KEYS, "keys that are listed");
    node.stop();
}
