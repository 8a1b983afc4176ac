//! `basalt doctor`: looks at the machine and says, a sentence each, what is there, what is missing and what to do about it.
//!
//! What `serve` on a file needs decides the exit code. What only SPDK needs is a warning, unless `--spdk` asks for it.

mod machine;
mod spdk;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{Exit, say};
use crate::pci::system::System;

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Where an image file would be
    #[arg(long, value_name = "PATH", default_value = ".")]
    directory: PathBuf,
    /// Fail on what only SPDK needs, too.
    #[arg(long)]
    spdk: bool,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warn,
    Fail,
}

/// What a check is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Scope {
    File,
    Spdk,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    scope: Scope,
    status: Status,
    what: String,
    remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, scope: Scope, what: impl Into<String>) -> Check {
        Check { name, scope, status: Status::Ok, what: what.into(), remedy: None }
    }

    /// Works, but not as well as it could.
    fn warn(name: &'static str, scope: Scope, what: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check { name, scope, status: Status::Warn, what: what.into(), remedy: Some(remedy.into()) }
    }

    /// Does not work.
    fn fail(name: &'static str, scope: Scope, what: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check { name, scope, status: Status::Fail, what: what.into(), remedy: Some(remedy.into()) }
    }
}

pub(super) fn doctor(args: &DoctorArgs) -> Exit {
    let system = System::host();
    let file = machine::probe(&args.directory);
    let checks = examine(&system, &file, args.spdk);
    let is_well = checks.iter().all(|check| check.status != Status::Fail);
    say(if args.json { json(&checks, is_well) } else { text(&checks, is_well, args.spdk) });
    if is_well { Exit::Done } else { Exit::Failed }
}

/// All checks. Failures of what only SPDK needs count only where SPDK is wanted.
fn examine(system: &System, file: &machine::FileProbe, with_spdk: bool) -> Vec<Check> {
    let mut checks = machine::checks(system, file);
    let mut spdk = spdk::checks(system);
    if !with_spdk {
        for check in &mut spdk {
            check.status = check.status.min(Status::Warn);
        }
    }
    checks.extend(spdk);
    checks
}

fn json(checks: &[Check], is_well: bool) -> String {
    serde_json::json!({ "ok": is_well, "checks": checks }).to_string()
}

fn text(checks: &[Check], is_well: bool, with_spdk: bool) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for (scope, title) in
        [(Scope::File, "For a file or a kernel block device:"), (Scope::Spdk, "For NVMe through SPDK:")]
    {
        out += &format!("{title}\n");
        for check in checks.iter().filter(|check| check.scope == scope) {
            let status = match check.status {
                Status::Ok => "ok  ",
                Status::Warn => "warn",
                Status::Fail => "FAIL",
            };
            out += &format!("  {status}  {:width$}  {}\n", check.name, check.what);
            if let Some(remedy) = &check.remedy {
                out += &format!("        {:width$}  -> {remedy}\n", "");
            }
        }
    }
    out + match (is_well, with_spdk) {
        (true, true) => "Ready for SPDK.",
        (true, false) => "`basalt serve` on a file works here.",
        (false, _) => "Something that is needed is missing: see FAIL.",
    }
}
