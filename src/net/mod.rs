//! The server side of the Redis protocol: bytes to requests, requests to a node, replies to bytes.
//!
//! Nothing here knows how a node works: `Backend` is what it must offer.

mod backend;
pub mod command;
pub mod connection;
pub mod glob;
pub mod port;
pub mod request;
pub mod resp;
pub mod server;
mod session;

pub use backend::{Backend, Completed, ConnectionId, SlotId, Started};
pub use connection::Connection;
pub use request::Request;
pub use resp::{RequestLimits, Response};
