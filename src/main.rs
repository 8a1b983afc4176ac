//! The `basalt` program.

use std::process::ExitCode;

use basalt::cli::{self, Cli};
use basalt::sys::heap::{self, CountingAllocator};
use clap::Parser;

/// What --memory bounds is counted here, whoever takes it.
#[global_allocator]
static HEAP: CountingAllocator = CountingAllocator;

fn main() -> ExitCode {
    heap::set_up();
    cli::run(Cli::parse())
}
