//! The machine, as far as it matters for figures.

use std::path::Path;
use std::process::Command;

use serde::Serialize;

/// Where it was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub processor: String,
    /// How many of them.
    pub cores: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// Its release.
    pub kernel: String,
    /// What the data is on.
    pub filesystem: String,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// What a program says of itself, its first line.
pub fn first_line(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(|line| line.trim().to_owned())
}

impl Machine {
    /// This one, with data in this directory.
    pub fn here(directory: &Path) -> Machine {
        let cpu = read("/proc/cpuinfo");
        let name =
            cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown processor");
        let memory = read("/proc/meminfo");
        let kib = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or("0 kB");
        let kib: u64 = kib.trim().trim_end_matches(" kB").trim().parse().unwrap_or(0);
        let directory = directory.to_string_lossy();
        let df = Command::new("df").args(["--output=fstype", &directory]).output();
        let filesystem = df.ok().and_then(|out| {
            String::from_utf8_lossy(&out.stdout).lines().nth(1).map(|line| line.trim().to_owned())
        });
        Machine {
            processor: name.trim_start_matches([' ', '\t', ':']).to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory: kib << 10,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            filesystem: filesystem.unwrap_or_else(|| "an unknown file system".to_owned()),
        }
    }

    /// In one line.
    pub fn text(&self) -> String {
        format!(
            "{} cores of {}, {:.1} GiB of memory, kernel {}, data on {}",
            self.cores,
            self.processor,
            self.memory as f64 / f64::from(1 << 30),
            self.kernel,
            self.filesystem
        )
    }
}
