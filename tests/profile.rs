//! The profile of a disk: measured once, used by a node of which INFO says so, and refused where it is of something else.

#![cfg(test)]

mod common;

use std::path::Path;

use common::call;
use common::node::{Node, basalt_in};
use common::resp::Reply;
use common::temp_dir;

/// Files of a directory.
fn names_in(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}

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

    // Figures that are easily told from those that are assumed.
    let figures = [
        ("read_iops", "20000.0"),
        ("read_bytes_per_second", "500000000.0"),
        ("write_iops", "4000.0"),
        ("write_bytes_per_second", "250000000.0"),
        ("read_latency_p50_us", "300.0"),
        ("read_latency_p99_us", "2000.0"),
        ("durable_write_latency_p50_us", "3000.0"),
        ("durable_write_latency_p99_us", "4000.0"),
        ("read_depth", "40"),
    ];
    let path = directory.path().join("disk.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let text: Vec<String> = text
        .lines()
        .map(|line| {
            let name = line.split(" = ").next().unwrap_or_default();
            let figure = figures.iter().find(|(figure, _)| *figure == name);
            figure.map_or(line.to_owned(), |(name, value)| format!("{name} = {value}"))
        })
        .collect();
    std::fs::write(&path, text.join("\n")).unwrap();

    let engine = ["--engine", "sync", "--reactors", "2"];
    let node = Node::start_in(directory.path(), &[&NODE[..], &["disk.toml"], &engine].concat());
    assert_eq!(
        (info(&node, "io_profile"), info(&node, "io_scheduler")),
        ("measured".into(), "shares".into())
    );
    let number = |name: &str| info(&node, name).parse::<u64>().expect("a number");
    // A serial number says which disk it is, where the disk has one.
    let has_serial = text.iter().any(|line| line.starts_with("serial = "));
    let disk = if has_serial { "identified" } else { "unidentified" };
    assert_eq!(info(&node, "io_profile_disk"), disk);
    for (name, value) in [
        // One over the rate.
        ("io_read_cost_ns", 50_000),
        ("io_write_cost_ns", 250_000),
        // Twice what keeps the disk busy, and what one in a hundred reads takes: of both reactors together.
        ("io_depth_max", 80),
        ("io_background_us_max", 2_000),
        ("io_commit_deadline_us", 3_000),
        // Two of each fit into a reactor's half of that.
        ("io_background_read_bytes_max", 128 << 10),
        ("io_background_write_bytes_max", 64 << 10),
    ] {
        assert!(number(name).abs_diff(value) <= value / 1_000, "{name} is {}, not {value}", number(name));
    }
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
    let read_cost_ns = info(&node, "io_read_cost_ns").parse::<u64>().expect("a number");
    assert!(
        info(&node, "io_profile_disk") == "none" && read_cost_ns.abs_diff(10_000) <= 10,
        "{read_cost_ns}"
    );
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
        // No image was made for a node that is not served.
        assert!(!names_in(directory.path()).iter().any(|name| name.contains("img")), "{words}");
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
    std::fs::write(&path, &text).unwrap();
    // Without a wish it is whatever can be had here, which is not this one.
    serve(&[], "measured through sync, and the device is used through uring");
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
