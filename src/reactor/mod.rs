//! One thread per core that runs everything to completion: the loop, how it sleeps, and how reactors talk.
//!
//! - [`cores`]: which cores, and pinning.
//! - [`thread`]: starting a reactor's thread, with pin errors for the starter.
//! - [`mod@run`]: the loop. It polls its [`Work`], spins for a short while when there is nothing to do, then sleeps.
//! - [`sleeper`], [`poller`], [`wake`]: what it sleeps on, and what ends the sleep.
//! - [`mailbox`]: the mesh of rings between reactors, and between reactors and in-process clients.
//! - [`control`]: rare messages from anywhere, such as stop.
//!
//! Invariants:
//! - Nothing here blocks a reactor except the sleep itself.
//! - A reactor sleeps only after a poll of its work, made *after* it announced the sleep, found nothing (see
//!   [`crate::ring::park`]). So whoever publishes something for a reactor and then uses its waker is heard.
//! - Nothing is allocated per message or per pass.

pub mod control;
pub mod cores;
pub mod mailbox;
pub mod poller;
pub mod run;
pub mod sleeper;
pub mod thread;
pub mod wake;

pub use mailbox::{ClientEnd, MeshEnd, mesh, mesh_with_clients};
pub use poller::{Event, Interest, Poller};
pub use run::{Progress, SpinPolicy, Work, run};
pub use sleeper::Sleeper;
pub use wake::Waker;

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
