//! Rare messages to one reactor from any thread: stop, reload, report. Many senders, so not one of our rings.

use std::sync::Arc;

use crossbeam_queue::ArrayQueue;

use super::wake::Waker;
use crate::ring::Full;

/// Makes the two sides. Sending wakes the reactor that `waker` belongs to.
///
/// # Panics
/// When `capacity` is zero.
pub fn channel<M: Send>(capacity: usize, waker: Waker) -> (ControlSender<M>, ControlReceiver<M>) {
    let queue = Arc::new(ArrayQueue::new(capacity));
    (ControlSender { queue: queue.clone(), waker }, ControlReceiver { queue })
}

/// Sends from any thread.
pub struct ControlSender<M> {
    queue: Arc<ArrayQueue<M>>,
    waker: Waker,
}

impl<M: Send> ControlSender<M> {
    /// Sends a message and wakes the reactor. Gives the message back when too many are waiting.
    pub fn send(&self, message: M) -> Result<(), Full<M>> {
        let result = self.queue.push(message).map_err(Full);
        // Also when it is full: whatever fills it waits for the reactor.
        self.waker.wake();
        result
    }
}

impl<M> Clone for ControlSender<M> {
    fn clone(&self) -> Self {
        ControlSender { queue: self.queue.clone(), waker: self.waker.clone() }
    }
}

/// The reactor's side.
pub struct ControlReceiver<M> {
    queue: Arc<ArrayQueue<M>>,
}

impl<M: Send> ControlReceiver<M> {
    /// Takes the oldest message.
    pub fn receive(&mut self) -> Option<M> {
        self.queue.pop()
    }
}
