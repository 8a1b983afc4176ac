//! Programs of the machine that tests drive the node with. A missing one is a failure with a cure, never a skip.

use std::path::PathBuf;
use std::process::Command;

/// The redis-py that the tests are written for; scripts/setup-test-tools installs exactly this one.
pub const REDIS_PY_VERSION: &str = "8.1.0";

/// A program by name.
#[track_caller]
pub fn tool(name: &str) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // mkfs.ext4 and sfdisk live where an ordinary user's PATH does not lead.
    let found = std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file());
    match found {
        Some(program) => Command::new(program),
        None => panic!("{name} is not installed: run scripts/setup-test-tools"),
    }
}

/// The Python interpreter of the environment that has redis-py.
#[track_caller]
pub fn python_with_redis() -> Command {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cache"))
    });
    let cache = cache.expect("HOME or XDG_CACHE_HOME is set");
    let python = cache.join(format!("basalt/redis-py-{REDIS_PY_VERSION}/bin/python"));
    if !python.is_file() {
        panic!("redis-py {REDIS_PY_VERSION} is not at {}: run scripts/setup-test-tools", python.display());
    }
    Command::new(python)
}
