//! What a guest is made of: QEMU, a kernel and busybox from the machine's own Debian archive.
//!
//! The packages are downloaded and unpacked, not installed: that needs no root and leaves the machine as it is. They stay in
//! the cache directory under a name that changes with any package's version. A QEMU that is installed is used as it is.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::error::{Result, VmError};
use crate::host::{Ended, find_program, output, run, say};

const QEMU: &str = "qemu-system-x86_64";
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// For queries of the package system; a download gets `DOWNLOAD_LIMIT`.
const QUERY_LIMIT: Duration = Duration::from_secs(120);
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(600);

/// QEMU and what boots in it.
#[derive(Debug, Clone)]
pub struct Packages {
    /// Where the packages were unpacked.
    root: PathBuf,
    qemu_is_installed: bool,
}

impl Packages {
    /// Finds everything in the cache or puts it there.
    pub fn get() -> Result<Packages> {
        check_machine()?;
        let qemu_is_installed = find_program(QEMU).is_some();
        let mut names = vec!["busybox-static".to_string(), kernel_package()?];
        if !qemu_is_installed {
            names.extend(qemu_packages()?);
        }
        let files = file_names(&names)?;
        let root = cache_directory()?.join(format!("vm-{:016x}", fnv(files.join("\n").as_bytes())));
        if !root.is_dir() {
            fetch(&names, files.len(), &root)?;
        }
        Ok(Packages { root, qemu_is_installed })
    }

    /// A command that runs QEMU, ended by the kernel together with the thread that starts it.
    pub fn qemu(&self) -> Command {
        let mut command = crate::host::tied_to_this_thread(&self.qemu_program());
        if !self.qemu_is_installed {
            let libraries = self.root.join("usr/lib/x86_64-linux-gnu");
            command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
            command.env("LD_LIBRARY_PATH", libraries);
            for firmware in ["usr/share/seabios", "usr/share/qemu", "usr/lib/ipxe/qemu"] {
                command.arg("-L").arg(self.root.join(firmware));
            }
        }
        command
    }

    fn qemu_program(&self) -> PathBuf {
        if self.qemu_is_installed { QEMU.into() } else { self.root.join("usr/bin").join(QEMU) }
    }

    /// The kernel's file.
    pub fn kernel(&self) -> Result<PathBuf> {
        only_entry(&self.root.join("boot"), "vmlinuz-")
    }

    /// The directory of the kernel's modules.
    pub fn modules(&self) -> Result<PathBuf> {
        let directory = self.root.join("lib/modules");
        let directory = if directory.is_dir() { directory } else { self.root.join("usr/lib/modules") };
        only_entry(&directory, "")
    }

    /// A busybox that needs no libraries.
    pub fn busybox(&self) -> PathBuf {
        let program = self.root.join("bin/busybox");
        if program.is_file() { program } else { self.root.join("usr/bin/busybox") }
    }
}

/// `$BASALT_CACHE_DIR`, else `basalt` in the user's cache directory.
pub fn cache_directory() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("BASALT_CACHE_DIR")
        .or_else(|| Some(set("XDG_CACHE_HOME")?.join("basalt")))
        .or_else(|| Some(set("HOME")?.join(".cache/basalt")))
        .ok_or_else(|| {
            unsupported("neither BASALT_CACHE_DIR, XDG_CACHE_HOME nor HOME is set, so there is no cache")
        })
}

fn unsupported(cause: impl Into<String>) -> VmError {
    VmError::Unsupported { cause: cause.into() }
}

fn check_machine() -> Result<()> {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Err(unsupported("the guest is a Linux on x86-64, and so must be the host"));
    }
    for (program, package) in [
        ("apt-get", "apt, on Debian or a system made from it"),
        ("dpkg-deb", "dpkg, on Debian or a system made from it"),
        ("setpriv", "util-linux"),
        ("ldd", "libc-bin"),
    ] {
        if find_program(program).is_none() {
            return Err(unsupported(format!("there is no {program}; it comes with {package}")));
        }
    }
    Ok(())
}

/// The package that the newest cloud kernel's name stands for.
fn kernel_package() -> Result<String> {
    let text =
        output(Command::new("apt-cache").args(["depends", KERNEL_PACKAGE]), QUERY_LIMIT).unwrap_or_default();
    let found = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    found.map(str::to_owned).ok_or_else(|| {
        unsupported(format!(
            "the package lists name no {KERNEL_PACKAGE}; run `apt-get update` as root, on Debian"
        ))
    })
}

/// QEMU and those libraries that this machine has not installed.
fn qemu_packages() -> Result<Vec<String>> {
    let mut command = Command::new("apt-get");
    command.args(["install", "--simulate", "--no-install-recommends", "qemu-system-x86"]);
    let Ended { code, stdout, stderr } = run(&mut command, QUERY_LIMIT)?;
    if code != Some(0) {
        return Err(unsupported(format!("apt-get can't find what qemu-system-x86 needs: {}", stderr.trim())));
    }
    let named = |line: &str| Some(line.strip_prefix("Inst ")?.split(' ').next()?.to_owned());
    Ok(stdout.lines().filter_map(named).collect())
}

/// The names of the packages' files, which carry their versions, sorted.
fn file_names(packages: &[String]) -> Result<Vec<String>> {
    let mut command = Command::new("apt-get");
    command.args(["-qq", "download", "--print-uris"]).args(packages);
    let text = output(&mut command, QUERY_LIMIT)?;
    let mut names: Vec<String> =
        text.lines().filter_map(|line| line.split(' ').nth(1)).map(str::to_owned).collect();
    names.sort();
    if names.len() < packages.len() {
        return Err(unsupported(format!("apt-get names files only for {names:?} of {packages:?}")));
    }
    Ok(names)
}

/// Downloads and unpacks beside the final place, then moves there: whoever comes second at the same time finds it done.
fn fetch(packages: &[String], count: usize, root: &Path) -> Result<()> {
    let cache = root.parent().unwrap_or(root);
    std::fs::create_dir_all(cache).map_err(VmError::os("create", cache))?;
    let temporary = tempfile::Builder::new()
        .prefix("vm-unfinished-")
        .tempdir_in(cache)
        .map_err(VmError::os("write to", cache))?;
    let (debs, tree) = (temporary.path().join("debs"), temporary.path().join("tree"));
    for directory in [&debs, &tree] {
        std::fs::create_dir(directory).map_err(VmError::os("create", directory))?;
    }
    say(format!("downloading {count} Debian packages (QEMU, a kernel, busybox), about 45 MB, once"));
    let mut download = Command::new("apt-get");
    // apt's own user can't enter this directory, and would say so.
    download.args(["-qq", "-o", "APT::Sandbox::User=root", "download"]).args(packages).current_dir(&debs);
    output(&mut download, DOWNLOAD_LIMIT)?;
    let entries = std::fs::read_dir(&debs).map_err(VmError::os("list", &debs))?;
    for entry in entries.flatten() {
        output(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(&tree), QUERY_LIMIT)?;
    }
    match std::fs::rename(&tree, root) {
        Err(_) if root.is_dir() => Ok(()),
        moved => moved.map_err(VmError::os("put the unpacked packages at", root)),
    }
}

fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = std::fs::read_dir(directory).map_err(VmError::os("list", directory))?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
    found.pop().ok_or_else(|| VmError::os("find the kernel in", directory)(missing()))
}

/// FNV-1a: names a set of versions; the same in every build of this crate.
fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}
