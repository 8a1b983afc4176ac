//! What the tests that look at the node from outside share: starting and killing the real binary, a small blocking
//! client, seeded randomness, tools of the machine, and the linearizability checker.
//!
//! Each test file compiles this module on its own and uses a part of it, hence the one allowance below.

#![allow(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "each test file uses another part of this module"
)]

pub mod exported;
pub mod linear;
pub mod load;
pub mod node;
pub mod nvmf_target;
pub mod resp;
pub mod rng;
pub mod tools;

pub use node::{Node, Options, basalt, temp_dir};
pub(crate) use resp::call;
pub use resp::{Client, Reply};
pub use rng::Rng;

/// Polls `condition` until it holds; the deadline is for a test that has failed, never a statement about speed.
pub fn wait_until(what: &str, seconds: u64, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(seconds);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "after {seconds} s still waiting for: {what}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// A count from the environment, for longer runs; `default` otherwise.
pub fn count_from_env(name: &str, default: usize) -> usize {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a count")),
        Err(_) => default,
    }
}
