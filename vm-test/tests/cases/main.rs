//! Cases that run in a virtual machine. `vm-test/run [CASE...]` runs them, one at a time.
//!
//! They share the load, its model and the client with the tests of the project: what must be true of a killed process must
//! be true of a drive that lost its power.

#![cfg(test)]

#[path = "../../../tests/common/load.rs"]
mod load;
#[path = "../../../tests/common/resp.rs"]
#[expect(dead_code, unused_imports, unused_macros, reason = "cases use a part of it")]
mod resp;
#[path = "../../../tests/common/rng.rs"]
mod rng;

mod binding;
mod faults;
mod power_cut;
mod shapes;
mod smoke;
#[cfg(feature = "spdk")]
mod spdk;

use std::path::{Path, PathBuf};

use vm_test::error::Result;
use vm_test::host::say;

/// Runs a case with a directory of its own, which stays when the case fails: images and logs tell what happened.
fn case(name: &str, body: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    // On the disk that holds the build: O_DIRECT, which the engines use on the host, does not work on tmpfs.
    let directory = tempfile::Builder::new()
        .prefix(&format!("vm-{name}-"))
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .expect("a directory in the build directory");
    let from = std::time::Instant::now();
    say(format!("{name}: begins"));
    let mut kept = Kept { path: directory.keep(), is_wanted: true };
    let result = body(&kept.path);
    kept.is_wanted = result.is_err();
    say(format!("{name}: {} after {:.0?}", if result.is_ok() { "done" } else { "FAILED" }, from.elapsed()));
    result
}

/// A directory that is removed unless it is wanted, by a failed case or a panic.
struct Kept {
    path: PathBuf,
    is_wanted: bool,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.is_wanted {
            say(format!("images and logs of the failed case are in {}", self.path.display()));
        } else {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// A count from the environment, for longer runs.
fn count_from_env(name: &str, default: usize) -> usize {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a count")),
        Err(_) => default,
    }
}
