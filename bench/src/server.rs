//! A node beside redis-server.

use crate::report::Report;
use crate::{Failure, Plan};

/// Measures both.
pub fn run(_plan: &Plan, _report: &mut Report) -> Result<(), Failure> {
    Ok(())
}
