//! Deterministic simulation: a node of several engines on a simulated disk, with everything that a run depends on drawn
//! from one seed. No sockets, no threads, no clock of the machine.
//!
//! [`node`] is the node: it boots as the real one does and carries messages between engines with random delays. [`world`]
//! runs clients against it with a model beside, and crashes it. [`probe`] counts the situations that a run came to,
//! [`promise`] names what is promised.

#[cfg(any(test, feature = "planted-bugs"))]
pub mod collisions;
pub mod node;
pub mod probe;
pub mod promise;
pub mod world;
