//! The server side of the Redis protocol: bytes to requests, requests to a node, replies to bytes.
//!
//! Nothing here knows how a node works: `Backend` is what it must offer.

pub mod command;
pub mod glob;
pub mod request;
pub mod resp;
