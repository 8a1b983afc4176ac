//! Finds SPDK, generates the bindings, compiles the shim and says what to link. Does nothing without the feature `link`.

fn main() {
    #[cfg(feature = "link")]
    link::main();
}

#[cfg(feature = "link")]
mod link {
    use std::env;
    use std::panic::AssertUnwindSafe;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Every function that Rust calls. Nothing else of SPDK is bound.
    const FUNCTIONS: &[&str] = &[
        "basalt_.*",
        "spdk_zmalloc",
        "spdk_free",
        "spdk_nvme_transport_available_by_name",
        "spdk_nvme_transport_id_parse",
        "spdk_nvme_detach",
        "spdk_nvme_ctrlr_get_ns",
        "spdk_nvme_ctrlr_get_first_active_ns",
        "spdk_nvme_ctrlr_get_next_active_ns",
        "spdk_nvme_ns_is_active",
        "spdk_nvme_ctrlr_process_admin_completions",
        "spdk_nvme_ctrlr_register_aer_callback",
        "spdk_nvme_ctrlr_cmd_get_log_page",
        "spdk_nvme_ctrlr_cmd_abort",
        "spdk_nvme_ctrlr_reset",
        "spdk_nvme_ctrlr_fail",
        "spdk_nvme_ctrlr_is_failed",
        "spdk_nvme_ctrlr_free_io_qpair",
        "spdk_nvme_qpair_process_completions",
        "spdk_nvme_qpair_add_cmd_error_injection",
        "spdk_nvme_qpair_remove_cmd_error_injection",
        "spdk_nvme_ns_cmd_read",
        "spdk_nvme_ns_cmd_write",
        "spdk_nvme_ns_cmd_flush",
    ];

    const TYPES: &[&str] = &[
        "basalt_.*",
        "spdk_nvme_transport_type",
        "spdk_nvme_status_code_type",
        "spdk_nvme_generic_command_status_code",
        "spdk_nvme_media_error_status_code",
        "spdk_nvme_path_status_code",
        "spdk_nvme_nvm_opcode",
        "spdk_nvme_log_page",
        "spdk_nvme_dealloc_logical_block_read_value",
    ];

    const VARIABLES: &[&str] = &[
        "BASALT_.*",
        "SPDK_MALLOC_DMA",
        "SPDK_ENV_(LCORE|SOCKET|NUMA)_ID_ANY",
        "SPDK_NVME_IO_FLAGS_FORCE_UNIT_ACCESS",
    ];

    /// Types that Rust only passes on, or that have bit fields inside packed structs, which bindgen can't lay out.
    const OPAQUE: &[&str] =
        &["spdk_nvme_ctrlr", "spdk_nvme_qpair", "spdk_nvme_ns", "spdk_nvme_cpl", "spdk_nvme_status"];

    /// Linked whole, because constructors in them register what nobody calls by name: the PCIe and TCP transports, the
    /// sockets beneath TCP, the PCI bus, the memory pool's ring.
    const WHOLE: &[&str] = &[
        "spdk_nvme",
        "spdk_sock_posix",
        "spdk_env_dpdk",
        "rte_eal",
        "rte_mempool",
        "rte_ring",
        "rte_mempool_ring",
        "rte_pci",
        "rte_bus_pci",
        "rte_telemetry",
        "rte_kvargs",
        "rte_mbuf",
        "rte_log",
        "rte_argparse",
    ];

    /// In the order of their dependencies.
    const PLAIN: &[&str] = &[
        "spdk_keyring",
        "spdk_sock",
        "spdk_trace",
        "spdk_thread",
        "spdk_dma",
        "spdk_rpc",
        "spdk_jsonrpc",
        "spdk_json",
        "spdk_util",
        "spdk_log",
        "spdk_vfio_user",
        "isal",
        "isal_crypto",
    ];

    const SYSTEM: &[&str] = &["numa", "uuid", "ssl", "crypto", "dl", "rt", "m", "pthread"];

    /// Libraries without which nothing works; the others exist in some versions only.
    const NEEDED: &[&str] =
        &["spdk_nvme", "spdk_sock_posix", "spdk_env_dpdk", "spdk_util", "spdk_log", "rte_eal", "rte_bus_pci"];

    /// Where SPDK is.
    struct Spdk {
        include: PathBuf,
        libraries: Vec<PathBuf>,
    }

    pub(super) fn main() {
        for name in
            ["SPDK_DIR", "BASALT_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "PKG_CONFIG_PATH", "LIBCLANG_PATH"]
        {
            println!("cargo::rerun-if-env-changed={name}");
        }
        for file in ["build.rs", "wrapper.h", "shim.h", "shim.c"] {
            println!("cargo::rerun-if-changed={file}");
        }
        if let Err(sentence) = find().and_then(|spdk| build(&spdk)) {
            println!("cargo::error={sentence}");
        }
    }

    fn find() -> Result<Spdk, String> {
        if let Some(directory) = env::var_os("SPDK_DIR").filter(|value| !value.is_empty()) {
            let directory = PathBuf::from(directory);
            return tree(&directory).ok_or_else(|| {
                format!(
                    "SPDK_DIR is {}, but there is no built SPDK in it (build/lib/libspdk_nvme.a or lib/libspdk_nvme.a): \
                     build it, or unset SPDK_DIR and run scripts/setup-spdk",
                    directory.display()
                )
            });
        }
        let found = from_pkg_config().or_else(from_cache);
        found.ok_or_else(|| {
            "the feature `spdk` needs SPDK, and there is none: run scripts/setup-spdk, or set SPDK_DIR to a built tree"
                .to_owned()
        })
    }

    /// A build tree, or the prefix of an installation.
    fn tree(directory: &Path) -> Option<Spdk> {
        let libraries: Vec<PathBuf> =
            ["build/lib", "dpdk/build/lib", "isa-l/.libs", "isa-l-crypto/.libs", "lib", "lib64"]
                .iter()
                .map(|inner| directory.join(inner))
                .filter(|path| path.is_dir())
                .collect();
        let spdk = Spdk { include: directory.join("include"), libraries };
        let is_whole = spdk.library("spdk_nvme") && spdk.include.join("spdk/nvme.h").exists();
        is_whole.then_some(spdk)
    }

    fn from_pkg_config() -> Option<Spdk> {
        let ask = |argument: &str, prefix: &str, packages: &[&str]| -> Vec<PathBuf> {
            let output = Command::new("pkg-config").arg(argument).args(packages).output().ok();
            let output = output.filter(|output| output.status.success());
            let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            let words = text.iter().flat_map(|text| text.split_whitespace());
            words.filter_map(|word| word.strip_prefix(prefix)).map(PathBuf::from).collect()
        };
        let mut spdk = ask("--libs-only-L", "-L", &["spdk_nvme"])
            .iter()
            .flat_map(|path| path.ancestors().skip(1).take(2))
            .find_map(tree)?;
        spdk.libraries.extend(ask("--variable=libdir", "", &["libdpdk"]));
        spdk.library("rte_eal").then_some(spdk)
    }

    /// What scripts/setup-spdk has built: the newest version, and of that the newest build.
    fn from_cache() -> Option<Spdk> {
        let cache = env::var_os("BASALT_CACHE_DIR").map(PathBuf::from).or_else(|| {
            let caches = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            caches
                .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
                .map(|caches| caches.join("basalt"))
        })?;
        let mut built: Vec<_> = std::fs::read_dir(cache)
            .ok()?
            .filter_map(|entry| {
                let path = entry.ok()?.path();
                let name = path.file_name()?.to_str()?.to_owned();
                let version = name.strip_prefix("spdk-")?.split('-').next()?.to_owned();
                let at = path.join(".basalt-libraries").metadata().and_then(|data| data.modified()).ok()?;
                Some((version, at, path))
            })
            .collect();
        built.sort();
        tree(&built.pop()?.2)
    }

    impl Spdk {
        fn library(&self, name: &str) -> bool {
            self.libraries.iter().any(|path| path.join(format!("lib{name}.a")).exists())
        }

        /// Major and minor.
        fn version(&self) -> Result<(u32, u32), String> {
            let path = self.include.join("spdk/version.h");
            println!("cargo::rerun-if-changed={}", path.display());
            let text = std::fs::read_to_string(&path)
                .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
            let part = |name: &str| {
                text.lines()
                    .filter_map(|line| line.strip_prefix("#define "))
                    .filter_map(|line| line.split_once(char::is_whitespace))
                    .find(|(word, _)| *word == name)
                    .and_then(|(_, value)| value.trim().parse().ok())
            };
            part("SPDK_VERSION_MAJOR")
                .zip(part("SPDK_VERSION_MINOR"))
                .ok_or_else(|| format!("{} does not say which version of SPDK it is", path.display()))
        }
    }

    fn build(spdk: &Spdk) -> Result<(), String> {
        for name in NEEDED {
            if !spdk.library(name) {
                let list: Vec<String> =
                    spdk.libraries.iter().map(|path| path.display().to_string()).collect();
                return Err(format!(
                    "SPDK is not whole: there is no lib{name}.a in {}; build it, or run scripts/setup-spdk",
                    list.join(", ")
                ));
            }
        }
        let (major, minor) = spdk.version()?;
        if (major, minor) < (20, 7) {
            return Err(format!(
                "SPDK {major}.{minor:02} is too old: 20.07 is the first that Basalt can drive"
            ));
        }
        // The versions that the tests run against differ in what a few of them can expect.
        println!("cargo::rustc-check-cfg=cfg(spdk_before_21)");
        if major < 21 {
            println!("cargo::rustc-cfg=spdk_before_21");
        }
        println!("cargo::metadata=version={major}.{minor:02}");
        bind(&spdk.include)?;
        cc::Build::new()
            .file("shim.c")
            .include(&spdk.include)
            .include(".")
            .flag("-std=gnu11")
            .warnings(true)
            .extra_warnings(false)
            .try_compile("basalt_shim")
            .map_err(|error| format!("the C shim of spdk-sys does not compile: {error}"))?;
        link(spdk);
        Ok(())
    }

    fn bind(include: &Path) -> Result<(), String> {
        let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("bindings.rs");
        let mut builder = bindgen::Builder::default()
            .header("wrapper.h")
            .clang_arg(format!("-I{}", include.display()))
            .clang_arg("-I.")
            .default_enum_style(bindgen::EnumVariation::ModuleConsts)
            .derive_default(true)
            .layout_tests(true)
            .generate_comments(false)
            .allowlist_recursively(true);
        for name in FUNCTIONS {
            builder = builder.allowlist_function(name);
        }
        for name in TYPES {
            builder = builder.allowlist_type(name);
        }
        for name in VARIABLES {
            builder = builder.allowlist_var(name);
        }
        for name in OPAQUE {
            builder = builder.opaque_type(name);
        }
        // Without libclang bindgen panics rather than returning an error.
        let generated = std::panic::catch_unwind(AssertUnwindSafe(|| builder.generate()));
        let bindings = match generated {
            Ok(Ok(bindings)) => bindings,
            Ok(Err(error)) => return Err(format!("SPDK's headers could not be read: {error}")),
            Err(_) => {
                return Err("bindgen needs libclang: install libclang1-14 and libclang-common-14-dev (scripts/setup-spdk \
                            does), or set LIBCLANG_PATH"
                    .to_owned());
            }
        };
        bindings.write_to_file(&out).map_err(|error| format!("cannot write {}: {error}", out.display()))
    }

    fn link(spdk: &Spdk) {
        for path in &spdk.libraries {
            println!("cargo::rustc-link-search=native={}", path.display());
        }
        for name in WHOLE.iter().filter(|name| spdk.library(name)) {
            println!("cargo::rustc-link-lib=static:+whole-archive,-bundle={name}");
        }
        for name in PLAIN.iter().filter(|name| spdk.library(name)) {
            println!("cargo::rustc-link-lib=static:-bundle={name}");
        }
        for name in SYSTEM {
            println!("cargo::rustc-link-lib={name}");
        }
    }
}
