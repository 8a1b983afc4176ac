//! The `basalt` program.

use std::process::ExitCode;

use basalt::cli::{self, Cli};
use clap::Parser;

fn main() -> ExitCode {
    cli::run(Cli::parse())
}
