//! The programs under test, built as a user would build them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use crate::error::{Result, VmError};

/// `basalt` with these features, built once a process. Each set of features has its own copy: the next build replaces
/// cargo's.
pub fn basalt(features: &[&str]) -> Result<PathBuf> {
    static BUILT: Mutex<Option<HashMap<String, PathBuf>>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built.get_or_insert_default();
    let key = if features.is_empty() { "default".into() } else { features.join("-") };
    if let Some(path) = built.get(&key) {
        return Ok(path.clone());
    }
    let path = build(features, &key)?;
    built.insert(key, path.clone());
    Ok(path)
}

fn build(features: &[&str], key: &str) -> Result<PathBuf> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--release", "--locked", "--package", "basalt", "--bin", "basalt"]);
    command.args(["--features", &features.join(",")]);
    command.args(["--message-format", "json-render-diagnostics"]).current_dir(&project);
    // Cargo's own progress goes to the terminal.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let ended = command.output().map_err(VmError::os("start cargo in", &project))?;
    let text = String::from_utf8_lossy(&ended.stdout);
    let executable = text.lines().filter_map(executable_in).next_back();
    let Some(executable) = executable.filter(|_| ended.status.success()) else {
        let program = format!("cargo build --release --features '{}'", features.join(","));
        return Err(VmError::Program {
            program,
            status: ended.status.to_string(),
            output: "see above".into(),
        });
    };
    // Beside `release` in the build directory.
    let directory = executable.ancestors().nth(2).unwrap_or(&project).join("vm-test").join(key);
    std::fs::create_dir_all(&directory).map_err(VmError::os("create", &directory))?;
    let (fresh, path) = (directory.join("basalt.unfinished"), directory.join("basalt"));
    std::fs::copy(&executable, &fresh).map_err(VmError::os("copy the program to", &fresh))?;
    std::fs::rename(&fresh, &path).map_err(VmError::os("put the program at", &path))?;
    Ok(path)
}

/// The program that one of cargo's messages tells of.
fn executable_in(line: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(line).ok()?;
    let is_ours = message["reason"] == "compiler-artifact" && message["target"]["name"] == "basalt";
    let path = message["executable"].as_str().filter(|_| is_ours)?;
    Some(path.into())
}
