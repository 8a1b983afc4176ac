//! The profile of a disk: measured once, used by a node of which INFO says so, and refused where it is of something else.

#![cfg(test)]

mod common;

use std::path::Path;

use common::call;
use common::node::{Node, basalt_in};
use common::resp::Reply;
use common::temp_dir;

const NODE: [&str; 6] = ["serve", "--listen", "127.0.0.1:0", "--size", "64MiB", "--profile"];

fn measured(directory: &Path, file: &str) -> common::node::Ended {
    let args = ["qualify", "--size", "32MiB", "--engine", "sync", "--seconds", "0.02", "--profile", file];
    basalt_in(directory, &args)
}

fn info(node: &Node, name: &str) -> String {
    let info = call!(node.client(), "INFO", "device").bytes().expect("INFO is a string");
    let info = String::from_utf8(info).expect("INFO is text");
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("INFO has no {name}:\n{info}")).trim().to_owned()
}

#[test]
fn a_node_goes_by_what_was_measured() {
    let directory = temp_dir();
    let ended = measured(directory.path(), "disk.toml").expect_code(0, "qualify");
    assert!(ended.stderr.contains("--profile disk.toml"), "{}", ended.stderr);
    // Measured anew, it takes the place of the earlier one.
    measured(directory.path(), "disk.toml").expect_code(0, "qualify");

    let engine = ["--engine", "sync"];
    let node = Node::start_in(directory.path(), &[&NODE[..], &["disk.toml"], &engine].concat());
    assert_eq!(
        (info(&node, "io_profile"), info(&node, "io_scheduler")),
        ("measured".into(), "shares".into())
    );
    let number = |name: &str| info(&node, name).parse::<u64>().expect("a number");
    let before = (number("io_commit_commands"), number("io_commit_bytes"));
    let mut client = node.client();
    for key in 0..20 {
        assert_eq!(call!(client, "SET", format!("key:{key}"), "value"), Reply::ok());
    }
    common::wait_until("the writes are counted", 10, || number("io_commit_commands") >= before.0 + 40);
    assert!(number("io_commit_bytes") >= before.1 + 20 * 4096, "{} bytes", number("io_commit_bytes"));
    assert_eq!(number("io_commit_waiting"), 0);
    node.stop();

    let config = directory.path().join("node.toml");
    std::fs::write(&config, "profile = \"disk.toml\"\nscheduler = \"fifo\"\nengine = \"sync\"\n").unwrap();
    let node =
        Node::start_in(directory.path(), &["serve", "--listen", "127.0.0.1:0", "--config", "node.toml"]);
    assert_eq!((info(&node, "io_profile"), info(&node, "io_scheduler")), ("measured".into(), "fifo".into()));
    node.stop();
    let node = Node::start_in(directory.path(), &["serve", "--listen", "127.0.0.1:0"]);
    assert_eq!((info(&node, "io_profile"), info(&node, "io_scheduler")), ("assumed".into(), "shares".into()));
    node.stop();
}

#[test]
fn what_is_of_something_else_is_refused_in_words() {
    let directory = temp_dir();
    measured(directory.path(), "disk.toml").expect_code(0, "qualify");
    let path = directory.path().join("disk.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let serve = |more: &[&str], words: &str| {
        let args = [&NODE[..], &["disk.toml"], more].concat();
        let ended = basalt_in(directory.path(), &args).expect_code(2, words);
        assert!(ended.stderr.contains(words) && ended.stderr.contains("disk.toml"), "{}", ended.stderr);
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(last.contains(words) && last.contains("basalt qualify --profile"), "{}", ended.stderr);
    };
    serve(&["--engine", "pool"], "measured through sync, and the device is used through pool");
    for (other, words) in [
        (text.replace("profile_version = 1", "profile_version = 7"), "of version 7"),
        (
            text.replace("read_depth", "depth_of_reads"),
            "read_depth is missing: it must be a whole number from 1 to 65536",
        ),
        (text.replace("read_iops = ", "read_iops = -"), "it must be a number from 1 to 1000000000"),
        (
            text.replace("read_iops = ", "read_iops = \"fast\" # "),
            "read_iops is of the type string: it must be a number",
        ),
        (text.replace("[disk]", "[disk]\nserial = \"of another\""), "measured of"),
        ("SET key value".to_owned(), "no profile"),
    ] {
        // A disk that has a serial number says another one.
        let other = match other.matches("serial = ").count() {
            2 => text.replace("serial = \"", "serial = \"not "),
            _ => other,
        };
        std::fs::write(&path, other).unwrap();
        serve(&["--engine", "sync"], words);
    }
    std::fs::remove_file(&path).unwrap();
    serve(&["--engine", "sync"], "cannot use the profile");
    let ended = basalt_in(directory.path(), &["serve", "--scheduler", "lottery"]).expect_code(2, "lottery");
    assert!(ended.stderr.contains("not one of shares, fifo"), "{}", ended.stderr);
}

#[test]
fn nothing_but_a_profile_is_written_over() {
    let directory = temp_dir();
    let path = directory.path().join("letter");
    std::fs::write(&path, "Dear reader").unwrap();
    let ended = measured(directory.path(), "letter").expect_code(3, "a letter");
    assert!(ended.stderr.contains("letter is there and is no profile"), "{}", ended.stderr);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "Dear reader");
    let ended = measured(directory.path(), "nowhere/disk.toml").expect_code(2, "no directory");
    assert!(ended.stderr.contains("nowhere"), "{}", ended.stderr);
}
