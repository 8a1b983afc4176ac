//! INFO and CONFIG: what a node says of itself, and what may be changed while it runs.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::shared::{ProfileSource, Shared};
use crate::device::Health;
use crate::engine::durability::Durability;
use crate::engine::io_queue::Class;
use crate::net::glob;
use crate::size;
use crate::sys::heap;

/// The Redis release whose commands, replies and error texts are followed; clients look at it to choose features.
const REDIS_VERSION: &str = "7.0.15";

const SECTIONS: [&str; 8] =
    ["server", "clients", "memory", "persistence", "stats", "cpu", "device", "keyspace"];

/// The text of INFO: the named sections, or all.
pub(super) fn info(shared: &Shared, sections: &[Bytes]) -> String {
    let all = sections.is_empty()
        || sections.iter().any(|name| {
            [&b"all"[..], b"default", b"everything"].iter().any(|word| name.eq_ignore_ascii_case(word))
        });
    let mut out = String::new();
    for section in SECTIONS {
        if all || sections.iter().any(|name| name.eq_ignore_ascii_case(section.as_bytes())) {
            if !out.is_empty() {
                out.push_str("\r\n");
            }
            let mut title = section.to_owned();
            title[..1].make_ascii_uppercase();
            let _ = write!(out, "# {title}\r\n");
            for (name, value) in section_fields(shared, section) {
                let _ = write!(out, "{name}:{value}\r\n");
            }
        }
    }
    out
}

fn section_fields(shared: &Shared, section: &str) -> Vec<(&'static str, String)> {
    let figure =
        |pick: fn(&super::shared::Figures) -> &std::sync::atomic::AtomicU64| shared.sum(pick).to_string();
    match section {
        "server" => {
            let port = shared.address.map_or(0, |address| address.port());
            vec![
                ("redis_version", REDIS_VERSION.into()),
                ("redis_mode", "standalone".into()),
                ("basalt_version", env!("CARGO_PKG_VERSION").into()),
                ("os", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH)),
                ("arch_bits", usize::BITS.to_string()),
                ("process_id", std::process::id().to_string()),
                ("tcp_port", port.to_string()),
                ("uptime_in_seconds", shared.uptime_s().to_string()),
                ("reactors", shared.reactor_count().to_string()),
                ("shards", shared.superblock.shard_count.to_string()),
                ("index", shared.superblock.index.to_string()),
            ]
        }
        "clients" => vec![
            ("connected_clients", figure(|f| &f.connections)),
            ("maxclients", shared.connection_count_max.to_string()),
        ],
        "memory" => {
            let resident = resident_bytes();
            let used = heap::allocated().unwrap_or(resident);
            let parts = [
                ("memory_index", shared.sum(|f| &f.index_memory)),
                ("memory_cache", shared.sum(|f| &f.cache_memory)),
                ("memory_log", shared.sum(|f| &f.log_memory)),
                ("memory_reads", shared.sum(|f| &f.reads_memory)),
                ("memory_connections", shared.sum(|f| &f.connections_memory)),
            ];
            let known: u64 = parts.iter().map(|(_, size)| size).sum();
            let plan = shared.memory;
            let mut fields = vec![
                ("used_memory", used.to_string()),
                ("used_memory_human", size::show(used)),
                ("used_memory_rss", resident.to_string()),
                ("maxmemory", plan.size_max.to_string()),
                ("maxmemory_human", size::show(plan.size_max)),
                ("maxmemory_policy", "noeviction".into()),
            ];
            fields.extend(parts.map(|(name, size)| (name, size.to_string())));
            // Buffers for the device, mailboxes, requests under way.
            fields.push(("memory_other", used.saturating_sub(known).to_string()));
            fields.push(("memory_index_max", plan.index_size_max().to_string()));
            fields.push(("memory_cache_max", plan.cache_size_max(parts[0].1).to_string()));
            fields.push(("memory_traffic_max", plan.traffic_size_max().to_string()));
            fields
        }
        "persistence" => vec![
            ("loading", "0".into()),
            ("durability", shared.durability().to_string()),
            ("aof_enabled", "1".into()),
            ("rdb_bgsave_in_progress", "0".into()),
            ("rdb_last_save_time", shared.last_save_s.load(Ordering::Relaxed).to_string()),
            ("groups_committed", figure(|f| &f.groups)),
            ("flushes", figure(|f| &f.flushes)),
            ("recovered_checkpoint_bytes", shared.recovery.checkpoint_bytes.to_string()),
            ("recovered_log_bytes", shared.recovery.log_bytes.to_string()),
            ("recovery_ms", shared.recovery.duration_ms.to_string()),
            ("recovery_damage", shared.recovery.damage_count.to_string()),
            ("checkpoints_written", figure(|f| &f.checkpoints)),
            ("checkpoint_bytes_written", figure(|f| &f.checkpoint_bytes)),
            ("checkpoints_skipped", figure(|f| &f.checkpoints_skipped)),
            ("records_appended", figure(|f| &f.records)),
            ("dump_in_progress", u8::from(shared.dump_running.load(Ordering::Relaxed)).to_string()),
        ],
        "stats" => {
            let commands = shared.sum(|f| &f.commands);
            let since = commands.saturating_sub(shared.commands_at_reset.load(Ordering::Relaxed));
            vec![
                ("total_connections_received", figure(|f| &f.accepted)),
                ("total_commands_processed", since.to_string()),
                ("total_net_input_bytes", figure(|f| &f.received_bytes)),
                ("total_net_output_bytes", figure(|f| &f.sent_bytes)),
                ("rejected_connections", figure(|f| &f.rejected)),
                ("evicted_clients", figure(|f| &f.evicted)),
                ("cache_hits", figure(|f| &f.cache_hits)),
                ("cache_misses", figure(|f| &f.cache_misses)),
                ("damaged_reads", figure(|f| &f.damaged_reads)),
                ("extents_left", figure(|f| &f.extents_left)),
            ]
        }
        "cpu" => {
            let (user, system) = cpu_seconds();
            vec![("used_cpu_sys", format!("{system:.6}")), ("used_cpu_user", format!("{user:.6}"))]
        }
        "device" => {
            let layout = shared.superblock.layout;
            let (written, user) = (shared.sum(|f| &f.bytes_written), shared.sum(|f| &f.user_bytes));
            let amplification = if user == 0 { 0.0 } else { written as f64 / user as f64 };
            let available = u64::from(shared.allocator.available_count());
            let mut fields = vec![
                ("device", shared.device.name.clone()),
                ("engine", shared.device.engine.into()),
                ("uuid", uuid::Uuid::from_bytes(shared.superblock.uuid).to_string()),
                ("boot", shared.superblock.boot.to_string()),
                ("device_bytes", layout.device_size.to_string()),
                ("extent_bytes", layout.extent_size.to_string()),
                ("extents", layout.extent_count.to_string()),
                ("extents_available", available.to_string()),
                ("available_bytes", (available * layout.extent_size).to_string()),
                ("reclaimable_bytes", shared.allocator.reclaimable().to_string()),
                ("live_bytes", figure(|f| &f.live_bytes)),
                ("user_bytes_written", user.to_string()),
                ("device_bytes_written", written.to_string()),
                ("device_bytes_read", figure(|f| &f.bytes_read)),
                ("scrub_bytes", figure(|f| &f.scrub_bytes)),
                ("scrub_passes", shared.least(|f| &f.scrub_passes).to_string()),
                ("scrub_last_pass_ms", shared.least(|f| &f.scrub_last_pass_ms).to_string()),
                ("scrub_damaged_records", figure(|f| &f.scrub_damaged)),
                ("write_amplification", format!("{amplification:.2}")),
                ("gc_extents_collected", figure(|f| &f.gc_extents_collected)),
                ("gc_extents_freed", figure(|f| &f.gc_extents_freed)),
                ("gc_bytes_moved", figure(|f| &f.gc_bytes_moved)),
                ("gc_bytes_trimmed", figure(|f| &f.gc_bytes_trimmed)),
                ("gc_abandoned", figure(|f| &f.gc_abandoned)),
            ];
            fields.extend(io_fields(shared));
            if let Some(health) = (shared.device.health)() {
                fields.extend(health_fields(&health));
            }
            fields
        }
        _ => {
            let keys = shared.sum(|f| &f.keys);
            if keys == 0 { Vec::new() } else { vec![("db0", format!("keys={keys},expires=0,avg_ttl=0"))] }
        }
    }
}

/// What became of commands to the device, by whom they were for.
fn io_fields(shared: &Shared) -> Vec<(&'static str, String)> {
    let (profile, disk) = match shared.device.profile {
        ProfileSource::Assumed => ("assumed", "none"),
        ProfileSource::Identified => ("measured", "identified"),
        ProfileSource::Unidentified => ("measured", "unidentified"),
    };
    let bounds = shared.io_bounds();
    let mut fields = vec![
        ("io_scheduler", shared.device.scheduler.to_string()),
        ("io_profile", profile.into()),
        ("io_profile_disk", disk.into()),
        ("io_read_cost_ns", bounds.read_ns.to_string()),
        ("io_write_cost_ns", bounds.write_ns.to_string()),
        ("io_depth_max", bounds.depth.to_string()),
        ("io_background_us_max", bounds.background_us.to_string()),
        ("io_background_read_bytes_max", bounds.read_piece_size.to_string()),
        ("io_background_write_bytes_max", bounds.write_piece_size.to_string()),
        ("io_commit_deadline_us", bounds.commit_deadline_us.to_string()),
    ];
    for class in Class::ALL {
        let at = class as usize;
        let [commands, bytes, waiting, wait_us_max] = io_field_names(class);
        fields.push((commands, shared.sum(|f| &f.io[at].commands).to_string()));
        fields.push((bytes, shared.sum(|f| &f.io[at].bytes).to_string()));
        fields.push((waiting, shared.sum(|f| &f.io[at].waiting).to_string()));
        fields.push((wait_us_max, shared.most(|f| &f.io[at].wait_us_max).to_string()));
    }
    fields
}

fn io_field_names(class: Class) -> [&'static str; 4] {
    match class {
        Class::Read => ["io_read_commands", "io_read_bytes", "io_read_waiting", "io_read_wait_us_max"],
        Class::Commit => {
            ["io_commit_commands", "io_commit_bytes", "io_commit_waiting", "io_commit_wait_us_max"]
        }
        Class::Checkpoint => [
            "io_checkpoint_commands",
            "io_checkpoint_bytes",
            "io_checkpoint_waiting",
            "io_checkpoint_wait_us_max",
        ],
        Class::Collect => ["io_gc_commands", "io_gc_bytes", "io_gc_waiting", "io_gc_wait_us_max"],
        Class::Scrub => ["io_scrub_commands", "io_scrub_bytes", "io_scrub_waiting", "io_scrub_wait_us_max"],
    }
}

/// What a controller says of itself; other devices say nothing.
fn health_fields(health: &Health) -> [(&'static str, String); 7] {
    [
        ("health_critical_warning", format!("{:#04x}", health.critical_warning)),
        ("health_temperature_celsius", health.temperature_celsius().to_string()),
        ("health_available_spare_percent", health.available_spare_percent.to_string()),
        ("health_used_percent", health.used_percent.to_string()),
        ("health_media_errors", health.media_errors.to_string()),
        ("health_unsafe_shutdowns", health.unsafe_shutdowns.to_string()),
        ("health_power_on_hours", health.power_on_hours.to_string()),
    ]
}

/// Bytes of this process that are in memory.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// User and system time of this process, in seconds.
fn cpu_seconds() -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The name in parentheses may hold anything, so fields are counted from its end.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    (ticks(11) / per_second, ticks(12) / per_second)
}

fn parameters(shared: &Shared, value_size_max: u64) -> Vec<(&'static str, String)> {
    let durability = shared.durability();
    let appendfsync = match durability {
        Durability::Always => "always",
        Durability::Interval(_) | Durability::Bytes(_) => "everysec",
        Durability::Never => "no",
    };
    let (bind, port) =
        shared.address.map_or((String::new(), 0), |address| (address.ip().to_string(), address.port()));
    vec![
        ("durability", durability.to_string()),
        ("appendonly", "yes".into()),
        ("appendfsync", appendfsync.into()),
        ("save", String::new()),
        ("bind", bind),
        ("port", port.to_string()),
        ("databases", "1".into()),
        ("maxclients", shared.connection_count_max.to_string()),
        ("maxmemory", shared.memory.size_max.to_string()),
        ("maxmemory-policy", "noeviction".into()),
        ("timeout", "0".into()),
        ("proto-max-bulk-len", value_size_max.to_string()),
        ("device", shared.device.name.clone()),
        ("engine", shared.device.engine.into()),
        ("shards", shared.superblock.shard_count.to_string()),
    ]
}

/// CONFIG GET: parameters whose names match.
pub(super) fn config_get(shared: &Shared, value_size_max: u64, pattern: &[u8]) -> Vec<(String, String)> {
    let pattern = pattern.to_ascii_lowercase();
    parameters(shared, value_size_max)
        .into_iter()
        .filter(|(name, _)| glob::matches(&pattern, name.as_bytes()))
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// CONFIG SET: `durability`, or `appendfsync` in Redis's words. All pairs or none.
pub(super) fn config_set(shared: &Shared, pairs: &[(Bytes, Bytes)]) -> Result<(), String> {
    let mut wanted = None;
    for (name, value) in pairs {
        let (name, value) =
            (String::from_utf8_lossy(name).to_ascii_lowercase(), String::from_utf8_lossy(value));
        let failed =
            |why: String| format!("ERR CONFIG SET failed (possibly related to argument '{name}') - {why}");
        wanted = Some(match name.as_str() {
            "durability" => value.parse::<Durability>().map_err(|error| failed(error.to_string()))?,
            "appendfsync" => match value.as_ref() {
                "always" => Durability::Always,
                "everysec" => Durability::Interval(1_000),
                "no" => Durability::Never,
                _ => {
                    return Err(failed(
                        "argument(s) must be one of the following: everysec, always, no".into(),
                    ));
                }
            },
            known if parameters(shared, 0).iter().any(|(name, _)| *name == known) => {
                return Err(failed("can't set immutable config".into()));
            }
            _ => return Err(format!("ERR Unknown option or number of arguments for CONFIG SET - '{name}'")),
        });
    }
    if let Some(durability) = wanted {
        shared.set_durability(durability);
    }
    Ok(())
}
