//! What can go wrong between the host and a guest. Sentences for a person who runs the cases by hand.

use std::path::PathBuf;
use std::time::Duration;

/// Result of everything here.
pub type Result<T> = std::result::Result<T, VmError>;

/// Why something about a virtual machine did not work.
#[derive(thiserror::Error)]
pub enum VmError {
    /// This machine can't run the cases at all; nothing is wrong with Basalt.
    #[error("the VM cases cannot run on this machine: {cause}")]
    Unsupported {
        /// What is missing, and how to get it.
        cause: String,
    },
    /// The operating system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Os {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A program of the host failed.
    #[error("{program} failed ({status}):\n{output}")]
    Program {
        /// With its arguments.
        program: String,
        /// Its exit status in words.
        status: String,
        /// What it printed.
        output: String,
    },
    /// Something took longer than its limit.
    #[error("{what}: nothing after {limit:?}\n{context}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long.
        limit: Duration,
        /// The console, or other output, up to then.
        context: String,
    },
    /// QEMU ended, or never started its guest.
    #[error("{what}\n{console}")]
    MachineEnded {
        /// What was going on.
        what: String,
        /// What QEMU and the guest's kernel said.
        console: String,
    },
    /// A command in the guest ended with another code than it should have.
    #[error("in the guest, `{command}` ended with {code} where {wanted} was wanted:\n{output}")]
    Guest {
        /// The command line.
        command: String,
        /// Its exit code.
        code: i32,
        /// The exit code that it should have had.
        wanted: i32,
        /// What it printed.
        output: String,
    },
    /// QEMU refused a command on its monitor.
    #[error("QEMU refused {command}: {reply}")]
    Monitor {
        /// The command.
        command: String,
        /// What it said.
        reply: String,
    },
    /// The node did not do what was expected of it.
    #[error("{what}\n{output}")]
    Node {
        /// What was expected and did not happen.
        what: String,
        /// What it printed.
        output: String,
    },
    /// A log of writes is not one.
    #[error("{}: {cause}", path.display())]
    WriteLog {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
}

impl VmError {
    /// For `map_err` on I/O.
    pub fn os(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> VmError {
        let path = path.into();
        move |source| VmError::Os { action, path, source }
    }
}

/// A test that returns an error shows it with `Debug`: a person should read the sentence there, with its line breaks.
impl std::fmt::Debug for VmError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}
