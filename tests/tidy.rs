//! House rules that a machine can check: which way imports point, how long files grow, what documentation promises.

#![cfg(test)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::basalt;

/// What each top-level module may name of the crate. Downwards only: main -> cli -> node -> net -> reactor -> ring, and
/// node -> engine -> device and format. An entry with `::` allows that part alone.
const LAYERS: &[(&str, &[&str])] = &[
    (
        "cli",
        &[
            "node", "net", "reactor", "ring", "engine", "device", "format", "pci", "measure", "limits",
            "size", "sys",
        ],
    ),
    ("node", &["net", "reactor", "ring", "engine", "device", "format", "limits", "size", "sys"]),
    ("net", &["reactor", "ring", "engine::action", "engine::op", "format::slot", "limits", "owned"]),
    ("reactor", &["ring", "engine::op", "format::slot", "limits"]),
    ("ring", &["limits"]),
    (
        "engine",
        &["device", "format", "limits", "owned", "planted", "probe", "size", "sys::heap", "sys::prefetch"],
    ),
    ("device", &["limits", "pci::Bdf"]),
    // Loads on devices, beside the engine.
    ("measure", &["device", "sys"]),
    ("format", &["limits", "planted"]),
    // What sysfs says about controllers: a leaf, so that everything above may ask it.
    ("pci", &["limits"]),
    ("limits", &[]),
    ("owned", &[]),
    ("planted", &[]),
    ("probe", &[]),
    ("size", &[]),
    ("sys", &[]),
    // Deterministic simulation stands beside the node and sees all of it but the sockets.
    ("sim", &["node", "planted", "reactor", "ring", "engine", "device", "format", "limits", "probe"]),
];

/// Files that may be longer than `LINES_MAX`, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[];
const LINES_MAX: usize = 700;

/// Where `unsafe` may be allowed at all.
const UNSAFE_HOMES: &[&str] =
    &["src/device/", "src/ring/", "src/ring.rs", "src/reactor/affinity.rs", "src/sys"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every file under a directory whose name ends so, as paths relative to the project.
fn files(directory: &str, endings: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![root().join(directory)];
    while let Some(next) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&next) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && name != "__pycache__" && name != "corpus" {
                    open.push(path);
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                found.push(path.strip_prefix(root()).unwrap().to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    found
}

/// The code of a file: no comments, and nothing from its test module on, which may look wherever it wants.
fn code(path: &str) -> String {
    let text = read(&root().join(path));
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    code.lines().map(|line| line.split("//").next().unwrap_or_default().to_string() + "\n").collect()
}

/// The module that a path under `src/` belongs to: `src/engine/log.rs` and `src/engine.rs` to `engine`.
fn module_of(path: &str) -> &str {
    let inner = path.strip_prefix("src/").unwrap_or(path);
    inner.split('/').next().unwrap_or(inner).trim_end_matches(".rs")
}

/// Everything that code names after `crate::`, with groups taken apart: `crate::{a, b::c}` gives `a` and `b::c`.
fn crate_paths(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        // `$crate::` in a macro names the same crate; `my_crate::` would not.
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        expand("", rest, &mut paths);
    }
    paths
}

/// Appends the path at the start of `rest`, or each path of the group there. Returns what follows.
fn expand<'a>(prefix: &str, rest: &'a str, paths: &mut Vec<String>) -> &'a str {
    let rest = rest.trim_start();
    if let Some(mut group) = rest.strip_prefix('{') {
        loop {
            group = group.trim_start();
            if let Some(after) = group.strip_prefix('}') {
                return after;
            }
            let before = group.len();
            group = expand(prefix, group, paths).trim_start().trim_start_matches(',');
            if group.len() == before {
                return group;
            }
        }
    }
    let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).unwrap_or(rest.len());
    let path = format!("{prefix}{}", &rest[..end]);
    if path.ends_with("::") && rest[end..].starts_with('{') {
        return expand(&path, &rest[end..], paths);
    }
    paths.push(path.trim_end_matches("::").to_string());
    &rest[end..]
}

fn allowed(path: &str, allowances: &[&str]) -> bool {
    let inside = |whole: &str| path == whole || path.starts_with(&format!("{whole}::"));
    // Naming `engine::op` as `use crate::engine; engine::op::X` would hide the part: the whole needs the whole allowance.
    allowances.iter().any(|allowance| inside(allowance))
}

#[test]
fn the_import_scanner_sees_through_groups() {
    let code =
        "use crate::{engine::{op::Key, log}, limits};\nlet x = crate::net::resp::parse; my_crate::no();";
    assert_eq!(crate_paths(code), ["engine::op::Key", "engine::log", "limits", "net::resp::parse"]);
    assert!(allowed("engine::op::Key", &["engine::op"]) && !allowed("engine::log", &["engine::op"]));
    assert!(!allowed("engine", &["engine::op"]) && !allowed("engine::opera", &["engine::op"]));
}

#[test]
fn imports_point_downwards_only() {
    let mut wrong = Vec::new();
    for path in files("src", &[".rs"]) {
        let module = module_of(&path);
        if matches!(module, "lib" | "main") {
            continue;
        }
        let Some((_, allowances)) = LAYERS.iter().find(|(name, _)| *name == module) else {
            wrong.push(format!("{path}: module {module} has no place in LAYERS of tests/tidy.rs"));
            continue;
        };
        for named in crate_paths(&code(&path)) {
            let top = named.split("::").next().unwrap_or_default();
            // Macros and items of the crate root are no layer.
            let is_module = LAYERS.iter().any(|(name, _)| *name == top);
            if is_module && top != module && !allowed(&named, allowances) {
                wrong.push(format!("{path} names crate::{named}"));
            }
        }
    }
    assert!(wrong.is_empty(), "imports that point upwards or sideways:\n{}", wrong.join("\n"));
}

/// Time, seeds and bytes come into these as arguments; otherwise no simulation could be repeated.
#[test]
fn the_engine_and_the_format_name_no_clock_thread_socket_or_randomness() {
    let forbidden = [
        "std::thread",
        "std::net",
        "Instant",
        "SystemTime",
        "RandomState",
        "TcpStream",
        "spdk",
        "thread_rng",
        "getrandom",
    ];
    let mut wrong = Vec::new();
    let mut paths = files("src/engine", &[".rs"]);
    paths.extend(files("src/format", &[".rs"]));
    assert!(!paths.is_empty());
    for path in paths {
        let code = code(&path);
        wrong.extend(forbidden.iter().filter(|w| code.contains(**w)).map(|word| format!("{path}: {word}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_lives_where_it_may() {
    let mut wrong = Vec::new();
    for path in files("src", &[".rs"]) {
        let code = code(&path);
        let uses = code.contains("unsafe {") || code.contains("unsafe impl") || code.contains("unsafe fn");
        if uses && !UNSAFE_HOMES.iter().any(|home| path.starts_with(home)) {
            wrong.push(path);
        }
    }
    assert!(wrong.is_empty(), "unsafe outside its homes: {wrong:?}");
}

#[test]
fn files_stay_readable() {
    let mut wrong = Vec::new();
    for path in ["src", "tests", "vm-test"].iter().flat_map(|directory| files(directory, &[".rs"])) {
        let text = read(&root().join(&path));
        let lines = text.lines().count();
        let listed = LONG_FILES.iter().any(|(name, _)| *name == path);
        if lines > LINES_MAX && !listed {
            wrong.push(format!(
                "{path} has {lines} lines: look for the next noun, or list it with its reason"
            ));
        }
        if !text.starts_with("//!") {
            wrong.push(format!("{path} does not begin with what it is for (//!)"));
        }
    }
    for (path, _) in LONG_FILES {
        let lines = read(&root().join(path)).lines().count();
        if lines <= LINES_MAX {
            wrong.push(format!("{path} is listed as long and has {lines} lines"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn nothing_is_left_for_later_and_no_machine_is_named() {
    // Taken apart, so that this file does not contain what it looks for.
    let unfinished = [concat!("to", "do"), concat!("fix", "me"), concat!("xx", "x:")];
    let machines =
        [concat!("/ro", "ot/"), concat!("/wo", "rk/"), concat!("/ho", "me/"), concat!("/tmp/", "w/")];
    let mut wrong = Vec::new();
    let mut paths = Vec::new();
    for directory in ["src", "tests", "bench", "benches", "spdk-sys", "vm-test", "scripts", ".ci", "fuzz"] {
        paths.extend(files(directory, &[""]));
    }
    for name in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "Cargo.toml"] {
        paths.push(name.to_string());
    }
    for path in paths {
        // Corpora and other bytes are not prose.
        let Ok(text) = std::fs::read_to_string(root().join(&path)) else { continue };
        for (index, line) in text.lines().enumerate() {
            let lower = line.to_lowercase();
            let words: Vec<&str> = lower.split(|c: char| !c.is_alphanumeric() && c != ':').collect();
            let lint = line.trim_end().ends_with("= \"deny\"");
            if !lint
                && words.iter().any(|word| {
                    unfinished.iter().any(|u| word.trim_end_matches(':') == u.trim_end_matches(':'))
                })
            {
                wrong.push(format!("{path}:{}: {line}", index + 1));
            }
            if machines.iter().any(|machine| lower.contains(machine)) {
                wrong.push(format!("{path}:{}: a path of one machine: {line}", index + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_map_names_every_module() {
    let map = read(&root().join("ARCHITECTURE.md"));
    let mut missing = Vec::new();
    for entry in std::fs::read_dir(root().join("src")).unwrap() {
        let name = entry.unwrap().file_name().to_string_lossy().into_owned();
        if !map.contains(&format!("`src/{name}")) {
            missing.push(format!("src/{name}"));
        }
    }
    assert!(missing.is_empty(), "ARCHITECTURE.md has no entry for {missing:?}");
}

/// README's list of commands, by group, and those that it says are not there.
#[test]
fn the_readme_lists_the_commands_that_there_are() {
    let readme = read(&root().join("README.md"));
    let section = readme.split("\n## Commands\n").nth(1).and_then(|rest| rest.split("\n## ").next());
    let mut listed: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in section.expect("README has a section on commands").lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if let ["", group, names, ""] = cells[..]
            && !matches!(group, "group" | "---")
        {
            let names = names.split(", ").map(str::to_owned).collect();
            assert!(listed.insert(group.to_owned(), names).is_none(), "README lists {group} twice");
        }
    }
    let absent = listed.remove("not there").expect("README says which commands are not there");
    let mut known: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for command in ::basalt::net::command::COMMANDS {
        known.entry(command.group.to_owned()).or_default().push(command.name.to_ascii_uppercase());
    }
    assert_eq!(listed, known, "README's list (left) is not the table of commands (right)");
    let wrong: Vec<&String> =
        absent.iter().filter(|name| known.values().flatten().any(|one| one == *name)).collect();
    assert!(wrong.is_empty(), "README says that {wrong:?} are not there");
    let is_name = |name: &String| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_uppercase());
    assert!(absent.len() > 20 && absent.iter().all(is_name) && absent.is_sorted(), "{absent:?}");
}

/// The lines of README's code blocks.
fn readme_commands() -> Vec<String> {
    let readme = read(&root().join("README.md"));
    let mut inside = false;
    let mut lines = Vec::new();
    for line in readme.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if inside {
            lines.push(line.trim_start_matches("$ ").to_string());
        }
    }
    lines
}

#[test]
fn the_readme_names_commands_that_exist() {
    let mut seen = 0;
    for line in readme_commands() {
        let words: Vec<&str> = line.split('#').next().unwrap_or_default().split_whitespace().collect();
        if let Some(script) = words.iter().find(|word| word.starts_with("scripts/")) {
            assert!(root().join(script).is_file(), "README names {script}, which is not there");
            seen += 1;
        }
        let args = match words.as_slice() {
            ["cargo", "run", "--release", "--", args @ ..] | ["basalt", args @ ..] => args,
            _ => continue,
        };
        // These have commands of their own.
        let command = if matches!(args[0], "device" | "inspect" | "bench") { &args[..2] } else { &args[..1] };
        let help = basalt(&[command, &["--help"]].concat()).expect_code(0, &format!("README: {line}"));
        for option in args.iter().filter(|arg| arg.starts_with("--")) {
            let name = option.split('=').next().unwrap_or(option);
            assert!(help.stdout.contains(name), "README: {line}: {command:?} has no {name}");
        }
        seen += 1;
    }
    assert!(seen >= 4, "README shows only {seen} commands that could be checked");
}
