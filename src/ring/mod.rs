//! Lock-free rings between two threads, and the handshake by which one of them may sleep.
//!
//! [`channel`] makes a bounded single-producer single-consumer ring. [`park`] lets the reading side sleep without ever
//! missing what the writing side published. Both are generic over what travels and over how a thread is woken, and
//! import nothing else of the program.

pub mod park;
mod spsc;
mod sync;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;

pub use spsc::{Consumer, Full, Producer, channel};
