//! The Redis serialization protocol: requests read piece by piece, responses written as RESP2 or RESP3.

mod encode;
mod inline;
mod request;

pub use encode::{Response, Version};
pub use request::{Parsed, ProtocolError, Refusal, RequestLimits, RequestParser};
