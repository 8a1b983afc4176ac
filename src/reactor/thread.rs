//! Starting a reactor's thread.

use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use super::cores::{CoreError, pin_current};

/// Why a reactor's thread did not start. Nothing of its work has run.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The operating system gave no thread.
    #[error("cannot start the thread of reactor {index}: {source}")]
    Thread {
        /// Which reactor.
        index: usize,
        /// The cause.
        source: std::io::Error,
    },
    /// It could not be pinned to its core.
    #[error("cannot pin reactor {index}: {source}")]
    Pin {
        /// Which reactor.
        index: usize,
        /// The cause, which names the core.
        source: CoreError,
    },
}

/// A reactor's thread that has started and is where it should be.
#[derive(Debug)]
pub struct ReactorThread<T>(JoinHandle<Option<T>>);

impl<T> ReactorThread<T> {
    /// Waits for its end. `Err` is its panic.
    pub fn join(self) -> std::thread::Result<T> {
        self.0
            .join()
            .map(|result| result.expect("the body ran: `spawn` returned only after the pinning succeeded"))
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

/// Starts the thread of reactor `index`, pins it to `core` if one is given, and only then runs `body` on it: memory that it
/// touches first is then close to its core. Waits until the pinning is settled, and reports if it failed.
pub fn spawn<T: Send + 'static>(
    index: usize,
    core: Option<usize>,
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<ReactorThread<T>, SpawnError> {
    let (settled, settlement) = mpsc::sync_channel(1);
    let thread = Builder::new()
        .name(format!("{name}-{index}"))
        .spawn(move || {
            let pinned = core.map_or(Ok(()), pin_current);
            let go = pinned.is_ok();
            // The starter waits below, so there is someone to receive it.
            let _ = settled.send(pinned);
            go.then(body)
        })
        .map_err(|source| SpawnError::Thread { index, source })?;
    // The thread sends before it does anything that could fail.
    match settlement.recv().expect("the thread reports its pinning first") {
        Ok(()) => Ok(ReactorThread(thread)),
        Err(source) => Err(SpawnError::Pin { index, source }),
    }
}
