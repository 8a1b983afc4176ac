//! The guest's first and only file system: busybox, kernel modules, `guest/init`, and the programs that a case brings.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cpio::Archive;
use crate::error::{Result, VmError};
use crate::host::{find_program, output};
use crate::packages::Packages;

/// The first process of every guest.
const INIT: &[u8] = include_bytes!("../guest/init");

/// What the guest needs from the kernel's modules, each after what it depends on; built-in ones are skipped.
const MODULES: &[&str] =
    &["virtio_pci", "virtio_net", "vfio", "vfio_iommu_type1", "vfio_pci", "uio_pci_generic"];

const LIMIT: Duration = Duration::from_secs(60);

/// Writes the guest's file system to `path`: `programs` go to `/bin`, with the libraries that they need.
pub fn write(path: &Path, packages: &Packages, programs: &[PathBuf]) -> Result<()> {
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "tmp", "run", "var/tmp", "mnt", "root", "etc"] {
        archive.directory(directory);
    }
    archive.link("var/run", "../run");
    // Output of the kernel's first process goes here before it has mounted anything.
    archive.character_device("dev/console", 5, 1);
    archive.character_device("dev/null", 1, 3);
    archive.file("init", 0o755, INIT.to_vec());
    archive.file("bin/busybox", 0o755, read(&packages.busybox())?);
    archive.link("bin/sh", "busybox");
    let mut names = String::new();
    for (name, contents) in Modules::open(&packages.modules()?)?.in_order(MODULES)? {
        archive.file(&format!("lib/modules/{name}.ko"), 0o644, contents);
        names += &format!("{name}\n");
    }
    archive.file("etc/modules", 0o644, names.into_bytes());
    for program in programs {
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("bin/{name}"), 0o755, read(program)?);
        for library in libraries(program)? {
            archive.file(&library.to_string_lossy(), 0o755, read(&library)?);
        }
    }
    std::fs::write(path, archive.bytes()).map_err(VmError::os("write", path))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(VmError::os("read", path))
}

/// The shared libraries of a program and its loader, where the host has them: the guest has them in the same places.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let text = output(Command::new("ldd").arg(program), LIMIT)?;
    let mut found = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [name, "=>", "not", "found", ..] => {
                let status = format!("the library {name} is not on this machine");
                return Err(VmError::Program {
                    program: program.display().to_string(),
                    status,
                    output: text,
                });
            }
            [_, "=>", path, ..] | [path, ..] if path.starts_with('/') => found.push(PathBuf::from(path)),
            _ => {}
        }
    }
    Ok(found)
}

/// The loadable modules of a kernel, by name.
struct Modules {
    files: HashMap<String, PathBuf>,
    built_in: Vec<String>,
}

impl Modules {
    fn open(root: &Path) -> Result<Modules> {
        let list = root.join("modules.builtin");
        let text = std::fs::read_to_string(&list).map_err(VmError::os("read", &list))?;
        let built_in = text.lines().filter_map(|line| module_name(Path::new(line))).collect();
        let mut files = HashMap::new();
        let mut open = vec![root.join("kernel")];
        while let Some(directory) = open.pop() {
            let entries = std::fs::read_dir(&directory).map_err(VmError::os("list", &directory))?;
            for path in entries.flatten().map(|entry| entry.path()) {
                if path.is_dir() {
                    open.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        Ok(Modules { files, built_in })
    }

    /// Contents of the modules and of what they depend on, in an order in which they can be loaded.
    fn in_order(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut loaded = Vec::new();
        for name in wanted {
            self.add(name, &mut loaded)?;
        }
        Ok(loaded)
    }

    fn add(&self, name: &str, loaded: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        if self.built_in.iter().any(|there| there == name) || loaded.iter().any(|(there, _)| there == name) {
            return Ok(());
        }
        let missing = || {
            let cause = format!("the guest's kernel has no module {name}");
            VmError::Unsupported { cause }
        };
        let contents = load(self.files.get(name).ok_or_else(missing)?)?;
        for dependency in dependencies(&contents) {
            self.add(&dependency, loaded)?;
        }
        loaded.push((name.to_string(), contents));
        Ok(())
    }
}

/// `vfio_pci` for `.../vfio-pci.ko` and `.../vfio-pci.ko.xz`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(name.replace('-', "_"))
}

/// A module's bytes, unpacked: busybox loads no compressed ones.
fn load(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|ending| ending == "xz") {
        let unpacked = tempfile::NamedTempFile::new().map_err(VmError::os("unpack", path))?;
        if find_program("xz").is_none() {
            let cause =
                "the kernel's modules are compressed, and there is no xz; it comes with xz-utils".into();
            return Err(VmError::Unsupported { cause });
        }
        let script = "exec xz -dc -- \"$1\" > \"$2\"";
        output(Command::new("sh").args(["-c", script, "sh"]).args([path, unpacked.path()]), LIMIT)?;
        return read(unpacked.path());
    }
    read(path)
}

/// What a module says that it depends on: a zero-terminated `depends=a,b` in its `.modinfo` section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const MARK: &[u8] = b"\0depends=";
    let Some(at) = module.windows(MARK.len()).position(|window| window == MARK) else { return Vec::new() };
    let list = &module[at + MARK.len()..];
    let end = list.iter().position(|byte| *byte == 0).unwrap_or(list.len());
    let list = String::from_utf8_lossy(&list[..end]).into_owned();
    list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_depend_on() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        std::fs::create_dir_all(root.join("kernel/drivers")).unwrap();
        std::fs::write(root.join("modules.builtin"), "kernel/fs/ext4.ko\nkernel/drivers/pci-core.ko\n")
            .unwrap();
        let write = |name: &str, depends: &str| {
            let contents = format!("ELF\0license=GPL\0depends={depends}\0name=x\0");
            std::fs::write(root.join("kernel/drivers").join(name), contents).unwrap();
        };
        write("vfio-pci.ko", "vfio-pci-core,vfio,pci_core");
        write("vfio-pci-core.ko", "vfio");
        write("vfio.ko", "");
        write("other.ko", "");
        let modules = Modules::open(root).unwrap();
        let names = |wanted: &[&str]| -> Vec<String> {
            modules.in_order(wanted).unwrap().into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(names(&["vfio_pci", "ext4", "vfio"]), ["vfio", "vfio_pci_core", "vfio_pci"]);
        assert!(modules.in_order(&["nothing"]).unwrap_err().to_string().contains("no module nothing"));
    }

    #[test]
    fn libraries_of_a_program_are_found_with_its_loader() {
        let found = libraries(&std::env::current_exe().unwrap()).unwrap();
        assert!(found.iter().any(|path| path.to_string_lossy().contains("libc.so")), "{found:?}");
        assert!(found.iter().any(|path| path.to_string_lossy().contains("ld-linux")), "{found:?}");
    }
}
