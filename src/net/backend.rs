//! What the network layer needs of a node: the only seam between them.

use bytes::Bytes;

use super::request::Request;
use super::resp::Response;
use crate::engine::op::{Clock, Direct, DirectReply, Reply, WatchedKey};

/// Names a connection of one server. The generation is never reused, so a late answer finds no wrong connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ConnectionId {
    /// Its place in the server's table; used again.
    pub index: u32,
    /// Unique; also what CLIENT ID says.
    pub generation: u64,
}

/// Names a reply that a connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u64);

/// The answer to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Completed {
    /// What the client is told.
    Reply(Response),
    /// What `Request::Watch` saw; the client is told OK.
    Watching(Vec<WatchedKey>),
}

impl From<Response> for Completed {
    fn from(response: Response) -> Self {
        Self::Reply(response)
    }
}

impl From<Reply> for Completed {
    fn from(reply: Reply) -> Self {
        Self::Reply(reply.into())
    }
}

/// What became of a request.
#[derive(Debug)]
pub enum Started {
    /// It is done.
    Now(Completed),
    /// Its answer comes through `complete`.
    Later,
    /// There is no room for it now: it is to be started again.
    Refused(Request),
}

/// A node, as a connection sees it.
pub trait Backend {
    /// Starts a request. For a `Batch` that is not done now, `locked` may be called once its keys are held, before
    /// `complete`.
    fn start(&mut self, connection: ConnectionId, slot: SlotId, request: Request) -> Started;
    /// Does requests in order, up to the first that can't be answered at once or until `tell`, which has the answers, wants no more.
    /// Returns how many it did. Only for a connection that is owed nothing: these may overtake what was started and is not done.
    fn run_at_once(
        &mut self,
        _requests: &[Direct<'_>],
        _tell: &mut dyn FnMut(DirectReply<'_>) -> bool,
    ) -> usize {
        0
    }
    /// Who would have read a connection's replies is gone: what it lists ends, without a reply. Whether there was a listing.
    fn abandon(&mut self, _connection: ConnectionId) -> bool {
        false
    }
    /// The text of INFO; no sections for the default ones.
    fn info(&mut self, sections: &[Bytes]) -> String;
    /// Parameters whose name matches a pattern (see `net::glob`), and their values.
    fn config_get(&mut self, pattern: &[u8]) -> Vec<(String, String)>;
    /// Sets parameters, all or none; else the error reply's whole text.
    fn config_set(&mut self, pairs: &[(Bytes, Bytes)]) -> Result<(), String>;
    /// CONFIG RESETSTAT.
    fn config_reset_stat(&mut self);
    /// The time of this loop.
    fn clock(&self) -> Clock;
    /// Whether nothing more is to be read from clients for now. Cheap: asked before every read.
    fn is_memory_short(&self) -> bool {
        false
    }
    /// Whether connections are to be closed for want of memory.
    fn must_evict(&self) -> bool {
        false
    }
    /// Bytes that one value may have.
    fn value_size_max(&self) -> u64;
    /// When everything was last known to be durable: seconds since the Unix epoch.
    fn last_save_unix_s(&self) -> u64;
}
