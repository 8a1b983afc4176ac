//! What can be asked of the `uring` engine beyond the plain ring, and the names of such rings.

/// Whether I/O buffers are registered with the kernel, which then need not pin their pages for each operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RegisteredBuffers {
    /// Where the limit of locked memory allows it; a note says where it does not.
    #[default]
    Preferred,
    /// Or the engine is refused.
    Required,
    /// Not.
    Never,
}

/// What a ring is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UringOptions {
    /// Whether I/O buffers are registered.
    pub buffers: RegisteredBuffers,
    /// IORING_SETUP_SQPOLL: a thread of the kernel looks for submissions, so that submitting is no system call.
    pub sqpoll: bool,
    /// IORING_SETUP_IOPOLL: completions are looked for at the drive, without interrupts. Needs a drive with poll queues.
    pub iopoll: bool,
}

impl UringOptions {
    /// The engine's name with the options, as `Geometry` and the command line have it.
    pub fn engine(&self) -> &'static str {
        use RegisteredBuffers::{Never, Preferred, Required};
        match (self.buffers, self.sqpoll, self.iopoll) {
            (Preferred, false, false) => "uring",
            (Preferred, true, false) => "uring+sqpoll",
            (Preferred, false, true) => "uring+iopoll",
            (Preferred, true, true) => "uring+sqpoll+iopoll",
            (Required, false, false) => "uring+registered",
            (Required, true, false) => "uring+registered+sqpoll",
            (Required, false, true) => "uring+registered+iopoll",
            (Required, true, true) => "uring+registered+sqpoll+iopoll",
            (Never, false, false) => "uring+unregistered",
            (Never, true, false) => "uring+unregistered+sqpoll",
            (Never, false, true) => "uring+unregistered+iopoll",
            (Never, true, true) => "uring+unregistered+sqpoll+iopoll",
        }
    }

    /// Adds an option by its name. The error says what is wrong with it.
    pub fn add(&mut self, name: &str) -> Result<(), String> {
        match name {
            "sqpoll" => self.sqpoll = true,
            "iopoll" => self.iopoll = true,
            "registered" | "unregistered" if self.buffers != RegisteredBuffers::Preferred => {
                return Err("say only one of registered and unregistered, once".to_owned());
            }
            "registered" => self.buffers = RegisteredBuffers::Required,
            "unregistered" => self.buffers = RegisteredBuffers::Never,
            _ => {
                return Err(format!(
                    "uring has no option '{name}': it has registered, unregistered, sqpoll and iopoll"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_read_as_the_options_that_it_was_made_of() {
        use RegisteredBuffers::{Never, Preferred, Required};
        let mut seen = std::collections::BTreeSet::new();
        for buffers in [Preferred, Required, Never] {
            for (sqpoll, iopoll) in [(false, false), (false, true), (true, false), (true, true)] {
                let options = UringOptions { buffers, sqpoll, iopoll };
                let mut parts = options.engine().split('+');
                assert_eq!(parts.next(), Some("uring"));
                let mut read = UringOptions::default();
                parts.for_each(|part| read.add(part).unwrap());
                assert_eq!(read, options);
                assert!(seen.insert(options.engine()));
            }
        }
        let mut both = UringOptions { buffers: Never, ..UringOptions::default() };
        assert!(
            both.add("registered").is_err() && both.add("fast").unwrap_err().contains("no option 'fast'")
        );
    }
}
