//! The Redis serialization protocol: requests read piece by piece, responses written as RESP2 or RESP3.

mod direct;
mod encode;
mod inline;
mod request;

pub use direct::DirectRun;
pub(super) use encode::put_bulk;
pub use encode::{Response, Version};
pub use request::{Parsed, ProtocolError, Refusal, RequestLimits, RequestParser};
