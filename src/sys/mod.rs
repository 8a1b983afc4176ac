//! Thin layers over what the system gives: a leaf.

pub mod heap;
pub mod prefetch;
pub mod usage;
