//! The configuration file: the options of `serve` under their own names, in TOML.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{ServeArgs, Trim};
use crate::limits::{CONNECTION_COUNT_MAX, REACTOR_COUNT_MAX};
use crate::size;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ConfigFile {
    device: Option<PathBuf>,
    engine: Option<String>,
    size: Option<String>,
    index: Option<String>,
    listen: Option<SocketAddr>,
    cores: Option<Cores>,
    reactors: Option<u32>,
    durability: Option<String>,
    trim: Option<String>,
    checkpoint_interval: Option<String>,
    max_clients: Option<u32>,
    memory: Option<String>,
    scrub_rate: Option<String>,
    profile: Option<PathBuf>,
    scheduler: Option<String>,
    allow_remote_clients: Option<bool>,
}

/// `cores = "0,1-3"` as on the command line, `cores = [0, 1]` as TOML would have it, or one number.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Cores {
    Text(String),
    One(usize),
    List(Vec<usize>),
}

impl Cores {
    fn text(&self) -> String {
        match self {
            Cores::Text(text) => text.clone(),
            Cores::One(core) => core.to_string(),
            Cores::List(cores) => cores.iter().map(usize::to_string).collect::<Vec<_>>().join(","),
        }
    }
}

/// Fills in what the command line left open. The error says which file, which setting and what is wrong.
pub(super) fn apply(args: &mut ServeArgs, path: &Path) -> Result<(), String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read the configuration file {}: {error}", path.display()))?;
    let file: ConfigFile = toml::from_str(&text).map_err(|error| {
        format!("in the configuration file {}: {}", path.display(), error.to_string().trim_end())
    })?;
    let wrong =
        |name: &str, error: String| format!("in the configuration file {}: {name}: {error}", path.display());
    args.device = args.device.take().or(file.device);
    args.listen = args.listen.or(file.listen);
    args.profile = args.profile.take().or(file.profile);
    args.allow_remote_clients |= file.allow_remote_clients.unwrap_or(false);
    if let (None, Some(engine)) = (args.engine, file.engine) {
        args.engine = Some(engine.parse().map_err(|error| wrong("engine", error))?);
    }
    if let (None, Some(policy)) = (args.scheduler, file.scheduler) {
        args.scheduler = Some(policy.parse().map_err(|error| wrong("scheduler", error))?);
    }
    if let (None, Some(text)) = (args.size, file.size) {
        args.size = Some(size::parse(&text).map_err(|error| wrong("size", error.to_string()))?);
    }
    if let (None, Some(index)) = (args.index, file.index) {
        args.index = Some(index.parse().map_err(|error| wrong("index", error))?);
    }
    if let (None, Some(text)) = (args.memory, file.memory) {
        args.memory = Some(size::parse(&text).map_err(|error| wrong("memory", error.to_string()))?);
    }
    if let (None, Some(text)) = (args.scrub_rate, file.scrub_rate) {
        args.scrub_rate = Some(size::parse(&text).map_err(|error| wrong("scrub-rate", error.to_string()))?);
    }
    if let (Some(_), Some(_)) = (&file.cores, file.reactors) {
        return Err(wrong("cores", "leave it out or leave reactors out".to_owned()));
    }
    if let (None, None, Some(count)) = (args.reactors, &args.cores, file.reactors) {
        if !(1..=REACTOR_COUNT_MAX as u32).contains(&count) {
            return Err(wrong("reactors", format!("{count} is not in 1..={REACTOR_COUNT_MAX}")));
        }
        args.reactors = Some(count);
    }
    if let (None, None, Some(cores)) = (&args.cores, args.reactors, file.cores) {
        args.cores = Some(cores.text().parse().map_err(|error| wrong("cores", format!("{error}")))?);
    }
    if let (None, Some(mode)) = (args.durability, file.durability) {
        args.durability = Some(mode.parse().map_err(|error| wrong("durability", format!("{error}")))?);
    }
    if let (None, Some(text)) = (args.checkpoint_interval, file.checkpoint_interval) {
        let parsed = size::parse(&text).map_err(|error| wrong("checkpoint-interval", error.to_string()))?;
        args.checkpoint_interval = Some(parsed);
    }
    if let (None, Some(trim)) = (args.trim, file.trim) {
        let parsed = <Trim as clap::ValueEnum>::from_str(&trim, false);
        args.trim = Some(parsed.map_err(|_| wrong("trim", format!("'{trim}' is not one of auto, on, off")))?);
    }
    if let (None, Some(count)) = (args.max_clients, file.max_clients) {
        if !(1..=CONNECTION_COUNT_MAX as u32).contains(&count) {
            return Err(wrong("max-clients", format!("{count} is not in 1..={CONNECTION_COUNT_MAX}")));
        }
        args.max_clients = Some(count);
    }
    Ok(())
}
