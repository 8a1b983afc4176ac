//! Real data from the machine itself: Debian's package index, every package a key and its stanza the value, loaded through
//! `redis-cli --pipe`, compared byte for byte after kill -9 and a restart.

#![cfg(test)]

mod common;

use std::collections::HashMap;
use std::io::{BufWriter, Seek, Write};

use common::node::run;
use common::tools::tool;
use common::{Client, Options, Reply, call, temp_dir};

/// The index as apt knows it: whatever compression its files have is apt's business.
fn stanzas() -> HashMap<String, Vec<u8>> {
    let output = tool("apt-cache").arg("dumpavail").output().unwrap();
    assert!(output.status.success(), "apt-cache dumpavail: {}", String::from_utf8_lossy(&output.stderr));
    let mut packages = HashMap::new();
    let mut rest = &output.stdout[..];
    while !rest.is_empty() {
        let end = rest.windows(2).position(|w| w == b"\n\n").map_or(rest.len(), |at| at + 1);
        let stanza = &rest[..end];
        rest = rest.get(end + 1..).unwrap_or_default();
        if let Some(key) = key_of(stanza) {
            packages.insert(key, stanza.to_vec());
        }
    }
    packages
}

/// Name, version and architecture together are unique; the same stanza from two sources is one package.
fn key_of(stanza: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(stanza);
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::to_string);
    Some(format!("{}={}:{}", field("Package: ")?, field("Version: ")?, field("Architecture: ")?))
}

#[test]
fn the_debian_package_index_survives_a_kill_byte_for_byte() {
    let packages = stanzas();
    let bytes: usize = packages.values().map(Vec::len).sum();
    assert!(
        packages.len() > 1_000,
        "apt knows only {} packages here: run scripts/setup-test-tools (apt-get update)",
        packages.len()
    );
    println!("{} packages, {bytes} bytes", packages.len());

    let directory = temp_dir();
    let options = Options::new(directory.path().join("debian.img")).size("1GiB");
    let node = options.start();
    let mut input = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut writer = BufWriter::new(&input);
    for (key, stanza) in &packages {
        writer.write_all(&common::resp::encode(&[b"SET", key.as_bytes(), stanza])).unwrap();
    }
    writer.flush().unwrap();
    drop(writer);
    input.rewind().unwrap();
    let mut command = tool("redis-cli");
    command.args(["-p", &node.port().to_string(), "--pipe"]);
    let ended = run(command, Some(input)).expect_code(0, "redis-cli --pipe");
    let wanted = format!("errors: 0, replies: {}", packages.len());
    assert!(ended.stdout.contains(&wanted), "wanted {wanted:?} in\n{}", ended.text());
    // Every reply has been read by now, so every package is acknowledged.
    node.kill9();

    let node = options.start();
    let mut client = node.client();
    assert_eq!(call!(client, "DBSIZE").int(), packages.len() as i64);
    compare(&mut client, &packages);
    node.stop();
    common::node::check(&options.device).expect_code(0, "check of the loaded image");
}

fn compare(client: &mut Client, packages: &HashMap<String, Vec<u8>>) {
    let packages: Vec<_> = packages.iter().collect();
    for page in packages.chunks(100) {
        let mut args: Vec<&[u8]> = vec![b"MGET"];
        args.extend(page.iter().map(|(key, _)| key.as_bytes()));
        let values = client.call(&args).array();
        assert_eq!(values.len(), page.len());
        for ((key, stanza), value) in page.iter().zip(values) {
            assert!(value == Reply::bulk(stanza), "{key} came back as {}", value.brief());
        }
    }
}
