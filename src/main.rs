//! The `basalt` program.

use std::process::ExitCode;

use basalt::cli::{self, Cli};
use basalt::sys::heap::CountingAllocator;
use clap::Parser;

/// What --memory bounds is counted here, whoever takes it.
#[global_allocator]
static HEAP: CountingAllocator = CountingAllocator;

fn main() -> ExitCode {
    cli::run(Cli::parse())
}
