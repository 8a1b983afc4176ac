//! The program as a person at a terminal meets it: options, exit codes, and the words of every refusal.

#![cfg(test)]

mod common;

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use common::node::{check, path_text, run};
use common::tools::tool;
use common::{Node, Options, Reply, basalt, call, temp_dir, wait_until};
use rustix::process::Signal;

/// Ends with `code` and says something that contains each of `words`, on stderr and not as a panic.
#[track_caller]
fn refused(args: &[&str], code: i32, words: &[&str]) {
    let directory = temp_dir();
    let ended = common::node::basalt_in(directory.path(), args).expect_code(code, &format!("{args:?}"));
    assert!(!ended.stderr.contains("panicked"), "{args:?}: {}", ended.stderr);
    for word in words {
        assert!(ended.stderr.contains(word), "{args:?} does not say {word:?}: {}", ended.stderr);
    }
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert!(left.is_empty(), "{args:?} was refused and still made {left:?}");
}

#[test]
fn help_names_every_command_and_option() {
    let top = basalt(&["--help"]).expect_code(0, "--help");
    for command in ["serve", "format", "check", "device", "doctor", "bench", "qualify"] {
        assert!(top.stdout.contains(command), "{command} is not in --help: {}", top.stdout);
    }
    let table: &[(&str, &[&str])] = &[
        (
            "serve",
            &[
                "--device",
                "--engine",
                "--size",
                "--listen",
                "--cores",
                "--reactors",
                "--durability",
                "--config",
            ],
        ),
        ("format", &["--device", "--size", "--force", "--quick"]),
        ("check", &["--device", "--json"]),
        ("device", &["list", "bind", "unbind", "identify"]),
        ("doctor", &["--json", "--spdk", "--directory"]),
        ("bench", &["device"]),
        ("qualify", &["--device", "--dir", "--destroy", "--json"]),
    ];
    for (command, options) in table {
        let help = basalt(&[command, "--help"]).expect_code(0, command);
        for option in *options {
            assert!(help.stdout.contains(option), "{command} --help does not name {option}: {}", help.stdout);
        }
    }
    let serve = basalt(&["serve", "--help"]).stdout;
    for word in ["uring", "sync", "always", "interval", "bytes", "never"] {
        assert!(serve.contains(word), "serve --help does not name {word}");
    }
    let version = basalt(&["--version"]).expect_code(0, "--version");
    assert!(version.stdout.contains(env!("CARGO_PKG_VERSION")), "{}", version.stdout);
}

#[test]
fn wrong_usage_exits_with_2_and_leaves_nothing_behind() {
    let table: &[&[&str]] = &[
        &["nonsense"],
        &["serve", "--nonsense"],
        &["serve", "--engine", "floppy"],
        &["serve", "--size", "lots"],
        &["serve", "--size", "-1"],
        &["serve", "--listen", "nowhere"],
        &["serve", "--listen", "127.0.0.1"],
        &["serve", "--listen", "127.0.0.1:99999"],
        &["serve", "--cores", "zero"],
        &["serve", "--cores", ""],
        &["serve", "--reactors", "0"],
        &["serve", "--reactors", "two"],
        &["serve", "--reactors", "1", "--cores", "0"],
        &["serve", "--durability", "sometimes"],
        &["serve", "--durability", "interval"],
        &["serve", "--durability", "interval=soon"],
        &["serve", "--durability", "bytes=-5"],
        &["serve", "--device"],
        &["format"],
        &["check", "--device", "x.img", "extra"],
        &["salvage"],
        &["inspect"],
        &["device", "bind"],
        &["device", "bind", "nvme0"],
        &["device", "bind", "0000:01:00.0", "--force"],
        &["device", "bind", "0000:01:00.0", "--driver", "floppy"],
        &["device", "unbind", "/dev/nvme0n1"],
    ];
    for args in table {
        refused(args, 2, &[]);
    }
    refused(&["serve", "--engine", "floppy"], 2, &["floppy", "uring"]);
    refused(&["serve", "--engine", "uring+fast"], 2, &["no option 'fast'", "sqpoll"]);
    refused(&["serve", "--durability", "sometimes"], 2, &["sometimes", "always"]);
}

/// On whatever machine this runs: the list is JSON, an address without a device is an error, and the doctor agrees with
/// `serve`, which the other tests start right here.
#[test]
fn the_machine_is_listed_and_examined() {
    let list = basalt(&["device", "list", "--json"]).expect_code(0, "device list");
    let value: serde_json::Value = serde_json::from_str(&list.stdout).unwrap();
    assert!(value["controllers"].is_array(), "{value}");
    // A domain that no machine has.
    refused(&["device", "identify", "fffffffe:00:00.0"], 1, &["no PCI device", "device list"]);
    let serve = |device, options: &[&str], texts: &[&str]| {
        refused(&[&["serve", "--listen", "127.0.0.1:0", "--device", device], options].concat(), 1, texts);
    };
    serve("fffffffe:00:00.0", &[], &["no PCI device", "device list"]);
    serve("trtype:PCIe traddr:fffffffe:00:00.0 ns:1", &[], &["no PCI device", "device list"]);
    // Neither a mistyped address nor a file for an engine that drives none becomes an image here.
    serve("0000:00:04", &[], &["not a PCI address such as"]);
    serve("new.img", &["--engine", "spdk"], &["neither files nor", "leave --engine out"]);
    let directory = temp_dir();
    let args = ["doctor", "--json", "--directory", path_text(directory.path())];
    let report = basalt(&args).expect_code(0, "doctor");
    let value: serde_json::Value = serde_json::from_str(&report.stdout).unwrap();
    assert_eq!(value["ok"], true, "{value}");
    let report = basalt(&["doctor", "--directory", "/nowhere"]).expect_code(1, "doctor in no directory");
    assert!(report.stdout.contains("FAIL  image file"), "{}", report.stdout);
}

#[test]
fn a_mapping_is_never_served_formatted_or_checked_through() {
    let why = ["SIGBUS", "write-back", "page table", "leave --engine out"];
    refused(&["serve", "--engine", "mmap"], 3, &why);
    refused(&["format", "--device", "a.img", "--engine", "mmap"], 3, &why);
    refused(&["check", "--device", "a.img", "--engine", "mmap"], 3, &why);
    let directory = temp_dir();
    std::fs::write(directory.path().join("node.toml"), "engine = \"mmap\"\n").unwrap();
    let ended = common::node::basalt_in(directory.path(), &["serve", "--config", "node.toml"]);
    let ended = ended.expect_code(3, "mmap in the configuration file");
    assert!(ended.stderr.contains("SIGBUS"), "{}", ended.stderr);
}

/// What is formatted through one engine is served through the next and checked through a third.
#[test]
fn format_and_check_take_engines_too() {
    let directory = temp_dir();
    let path = directory.path().join("a.img");
    for (first, second, third) in [("aio", "pool", "buffered"), ("buffered", "aio", "uring+sqpoll")] {
        let args = ["format", "--device", path_text(&path), "--size", "64MiB", "--quick", "--engine", first];
        let said = basalt(&args).expect_code(0, "format").stdout;
        assert!(said.contains(&format!("({first})")), "{said}");
        let node = Options::new(&path).engine(second).start();
        assert!(node.ready_line.contains(&format!(", {second},")), "{}", node.ready_line);
        assert_eq!(call!(node.client(), "SET", "k", "v"), Reply::ok());
        node.stop();
        basalt(&["check", "--device", path_text(&path), "--engine", third]).expect_code(0, "check");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn serve_without_a_device_makes_an_image_here_and_finds_it_again() {
    let directory = temp_dir();
    let args = ["serve", "--listen", "127.0.0.1:0"];
    let node = Node::start_in(directory.path(), &args);
    assert_eq!(call!(node.client(), "SET", "k", "v"), Reply::ok());
    let image = directory.path().join("basalt.img");
    assert!(image.is_file(), "no basalt.img in the working directory");
    node.stop();
    let node = Node::start_in(directory.path(), &args);
    assert_eq!(call!(node.client(), "GET", "k"), Reply::bulk("v"));
    node.stop();
    check(&image).expect_code(0, "check of the image that serve made");
    // What only reads it looks there too.
    let here = |args: &[&str]| common::node::basalt_in(directory.path(), args);
    let help_names_it = |command: &[&str]| {
        let help = here(&[command, &["--help"]].concat()).stdout;
        let words: Vec<&str> = help.split_whitespace().collect();
        assert!(words.join(" ").contains("[default: ./basalt.img]"), "{command:?}: {help}");
    };
    help_names_it(&["serve"]);
    for (command, more) in [
        (&["check"][..], &[][..]),
        (&["inspect", "superblock"], &[]),
        (&["inspect", "key"], &["k"]),
        (&["salvage"], &["--to", "k.resp"]),
    ] {
        here(&[command, more].concat()).expect_code(0, &format!("{command:?} without a device"));
        help_names_it(command);
    }
    std::fs::remove_file(&image).unwrap();
    let ended = here(&["check"]).expect_code(8, "check without a device, and none here");
    assert!(ended.stderr.contains("./basalt.img") && !image.exists(), "{}", ended.stderr);
    here(&["format"]).expect_code(2, "what writes wants its device named");
}

#[test]
fn the_ready_line_names_device_recovery_and_address() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("ready.img"));
    let node = options.start();
    let line = node.ready_line.clone();
    assert!(line.contains("ready.img"), "no device in {line:?}");
    assert!(line.contains("ms") || line.contains(" s"), "no recovery time in {line:?}");
    assert!(
        node.port() != 0 && line.contains(&format!("listening on 127.0.0.1:{}", node.port())),
        "{line:?}"
    );
    node.stop();
}

/// Every way of saying each option, each started, written to and stopped; and one image opens through every engine.
#[test]
fn every_option_is_accepted_and_one_image_opens_through_every_engine() {
    let directory = temp_dir();
    let path = directory.path().join("options.img");
    let mut expected = 0;
    for engine in ["uring", "sync", "aio", "pool", "buffered", "uring+sqpoll", "uring+unregistered"] {
        for extra in [
            vec!["--cores", "0"],
            vec!["--cores", "0,1"],
            vec!["--reactors", "3"],
            vec!["--durability", "always"],
            vec!["--durability", "interval=1000"],
            vec!["--durability", "bytes=65536"],
            vec!["--durability", "never"],
        ] {
            let mut options = Options::new(&path).engine(engine).size("128MiB");
            for arg in &extra {
                options = options.arg(arg);
            }
            let node = options.start();
            expected += 1;
            if extra[0] == "--reactors" {
                assert!(node.ready_line.contains(", 3 reactors, "), "{}", node.ready_line);
            }
            let found = call!(node.client(), "INCR", "starts").int();
            assert_eq!(found, expected, "{engine} {extra:?}: what earlier starts wrote");
            node.stop();
        }
    }
    check(&path).expect_code(0, "check after every engine wrote to it");
    // The same words again are the same size, although a file has whole blocks.
    for (size, bytes) in [
        ("64MiB", 64 << 20),
        ("67108864", 64 << 20),
        ("64M", 64 << 20),
        ("70MB", 69_996_544),
        ("1GiB", 1 << 30),
    ] {
        let path = directory.path().join(format!("size-{size}.img"));
        Options::new(&path).size(size).start().stop();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), bytes, "--size {size}");
        Options::new(&path).arg(&format!("--size={size}")).start().stop();
    }
}

#[test]
fn a_config_file_gives_defaults_and_its_mistakes_are_named() {
    let directory = temp_dir();
    let config = directory.path().join("basalt.toml");
    let serve = ["serve", "--config", "basalt.toml"];
    let write = |text: &str| std::fs::write(&config, text).unwrap();

    write(
        "device = \"from-config.img\"\nsize = \"128MiB\"\nengine = \"sync\"\nlisten = \"127.0.0.1:0\"\n\
         durability = \"interval=500\"\n",
    );
    let node = Node::start_in(directory.path(), &serve);
    assert!(node.ready_line.contains("from-config.img"), "{}", node.ready_line);
    assert_eq!(call!(node.client(), "SET", "k", "v"), Reply::ok());
    node.stop();
    let mut args = serve.to_vec();
    args.extend(["--device", "from-arguments.img"]);
    let node = Node::start_in(directory.path(), &args);
    assert!(node.ready_line.contains("from-arguments.img"), "arguments win: {}", node.ready_line);
    node.stop();

    for (cores, count) in [
        ("cores = [0]", ", 1 reactor, "),
        ("cores = \"0\"", ", 1 reactor, "),
        ("reactors = 3", ", 3 reactors, "),
    ] {
        write(&format!("device = \"from-config.img\"\nlisten = \"127.0.0.1:0\"\n{cores}\n"));
        let node = Node::start_in(directory.path(), &serve);
        assert!(node.ready_line.contains(count), "{cores}: {}", node.ready_line);
        node.stop();
    }

    let mistakes: &[(&str, &str)] = &[
        ("cores = [0, 0]\n", "twice"),
        ("cores = [0]\nreactors = 2\n", "reactors"),
        ("reactors = 0\n", "reactors"),
        ("device = ", "basalt.toml"),
        ("devise = \"x.img\"\n", "devise"),
        ("listen = \"127.0.0.1:0\"\ndurability = \"sometimes\"\n", "sometimes"),
        ("listen = \"127.0.0.1:0\"\nengine = \"floppy\"\n", "floppy"),
        ("listen = 5\n", "listen"),
    ];
    for (text, word) in mistakes {
        write(text);
        let failure = Node::try_start_in(directory.path(), &serve).expect_err(text);
        assert_eq!(failure.code, Some(2), "{text:?}: {failure}");
        assert!(failure.stderr.contains(word), "{text:?}: {word} is not named: {failure}");
        assert!(failure.stderr.contains("basalt.toml"), "{text:?}: the file is not named: {failure}");
    }
    std::fs::remove_file(&config).unwrap();
    let failure = Node::try_start_in(directory.path(), &serve).expect_err("no config file");
    assert!(matches!(failure.code, Some(1 | 2)) && failure.stderr.contains("basalt.toml"), "{failure}");
}

/// Bytes from the start of a file to the first block that was never written.
fn written_size(path: &Path) -> u64 {
    let file = std::fs::File::open(path).unwrap();
    // What is still on its way to the disk would count as written.
    file.sync_all().unwrap();
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0)).unwrap()
}

#[test]
fn format_writes_every_block_of_a_file_unless_it_is_to_be_quick() {
    let directory = temp_dir();
    const SIZE: u64 = 100 << 20;
    let format = |name: &str, quick: bool| {
        let path = directory.path().join(name);
        let mut args = vec!["format", "--device", path_text(&path)];
        if !path.exists() {
            args.extend(["--size", "100MiB"]);
        }
        args.extend(quick.then_some("--quick"));
        basalt(&args).expect_code(0, name);
        basalt(&["check", "--device", path_text(&path)]).expect_code(0, name);
        written_size(&path)
    };
    assert_eq!(format("whole.img", false), SIZE, "a file that was created");
    let sparse = directory.path().join("sparse.img");
    blank(&sparse, SIZE);
    // Some file systems know nothing of holes: there a quick format can't be told from the other.
    let knows_holes = written_size(&sparse) == 0;
    assert_eq!(format("sparse.img", false), SIZE, "a file that was there");
    blank(&directory.path().join("left.img"), SIZE);
    for name in ["quick.img", "left.img"] {
        assert_eq!(format(name, true) < SIZE, knows_holes, "{name}: a quick format writes little");
    }
}

/// `format` refuses with exit code 3, names what is there, and leaves it as it was.
#[track_caller]
fn format_refuses(path: &Path, words: &[&str]) {
    let before = std::fs::read(path).unwrap();
    let ended = basalt(&["format", "--device", path_text(path)]).expect_code(3, "format over data");
    let said = ended.stderr.to_lowercase();
    for word in words {
        assert!(said.contains(word), "{word:?} is not named: {}", ended.stderr);
    }
    assert!(said.contains("--force"), "the way out is not named: {}", ended.stderr);
    assert!(std::fs::read(path).unwrap() == before, "{}: a refused format changed it", path.display());
}

fn blank(path: &Path, size: u64) {
    std::fs::File::create(path).unwrap().set_len(size).unwrap();
}

#[test]
fn format_refuses_a_file_system() {
    let directory = temp_dir();
    let path = directory.path().join("ext4.img");
    blank(&path, 64 << 20);
    let mut mkfs = tool("mkfs.ext4");
    mkfs.args(["-q", "-F", path_text(&path)]);
    run(mkfs, None).expect_code(0, "mkfs.ext4");
    let said = basalt(&["format", "--device", path_text(&path)]).stderr.to_lowercase();
    assert!(said.contains("ext2") || said.contains("ext4"), "the file system is not named: {said}");
    format_refuses(&path, &[]);
}

#[test]
fn format_refuses_a_partition_table() {
    let directory = temp_dir();
    for (label, word) in [("gpt", "gpt"), ("dos", "mbr")] {
        let path = directory.path().join(format!("{label}.img"));
        blank(&path, 64 << 20);
        let mut script = tempfile::tempfile_in(directory.path()).unwrap();
        use std::io::{Seek, Write};
        script.write_all(format!("label: {label}\n,32MiB\n").as_bytes()).unwrap();
        script.rewind().unwrap();
        let mut sfdisk = tool("sfdisk");
        sfdisk.args(["--quiet", path_text(&path)]);
        run(sfdisk, Some(script)).expect_code(0, "sfdisk");
        let ended = basalt(&["format", "--device", path_text(&path)]);
        assert!(
            ended.stderr.to_lowercase().contains(word) || ended.stderr.contains("partition table"),
            "{label}: {}",
            ended.stderr
        );
        format_refuses(&path, &[]);
    }
}

#[test]
fn format_refuses_another_basalt_device_and_force_means_it() {
    let directory = temp_dir();
    let path = directory.path().join("other.img");
    basalt(&["format", "--device", path_text(&path), "--size", "64MiB"])
        .expect_code(0, "format of a new image");
    check(&path).expect_code(0, "check of a new image");
    let node = Options::new(&path).start();
    assert_eq!(call!(node.client(), "SET", "k", "v"), Reply::ok());
    node.stop();
    format_refuses(&path, &["basalt"]);
    basalt(&["format", "--device", path_text(&path), "--size", "64MiB"])
        .expect_code(3, "the very command that made it, again");
    let node = Options::new(&path).start();
    assert_eq!(call!(node.client(), "GET", "k"), Reply::bulk("v"), "a refused format leaves the data");
    let busy = basalt(&["format", "--device", path_text(&path), "--force"]);
    assert!(matches!(busy.code, Some(1 | 3)), "a device in use was formatted: {}", busy.text());
    assert_eq!(call!(node.client(), "GET", "k"), Reply::bulk("v"));
    node.stop();
    basalt(&["format", "--device", path_text(&path), "--force"]).expect_code(0, "format --force");
    let node = Options::new(&path).start();
    assert_eq!(call!(node.client(), "DBSIZE").int(), 0, "a forced format starts empty");
    node.stop();
}

/// The file that was named, and what its size may be; a name that it only has until it is whole is nobody's business.
#[test]
fn a_size_that_cannot_be_is_refused_with_those_that_can() {
    let least = "7340032 bytes (7.0 MiB) to 70368744177664 bytes (64.0 TiB)";
    let with_shards = "39845888 bytes (38.0 MiB) to ";
    for (size, more, words) in [
        ("1KiB", &[][..], ["too small: with 1 shard ", least]),
        ("7340031", &[], ["7340031 bytes (7.0 MiB) is too small", least]),
        ("20MiB", &["--shards", "15"], ["too small: with 15 shards ", with_shards]),
        ("65TiB", &[], ["too large", "70368744177664 bytes (64.0 TiB)"]),
    ] {
        let format = [&["format", "--device", "small.img", "--size", size][..], more].concat();
        let serve = ["serve", "--listen", "127.0.0.1:0", "--device", "small.img", "--size", size];
        for args in [&format[..], &serve].into_iter().take(if more.is_empty() { 2 } else { 1 }) {
            refused(args, 2, &[&["small.img: "], &words[..]].concat());
            let said = common::node::basalt_in(temp_dir().path(), args).stderr;
            assert!(!said.contains("unfinished"), "{args:?}: {said}");
        }
    }
    // What is refused later than by its size, here by the operating system, has the same name.
    let nowhere = ["format", "--device", "no/such/small.img", "--size", "64MiB"];
    refused(&nowhere, 1, &["cannot create no/such/small.img: "]);
}

#[test]
fn a_device_is_served_once() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("once.img"));
    let node = options.start();
    for engine in ["uring", "sync", "aio", "pool", "buffered", "uring+sqpoll"] {
        let failure = options.clone().engine(engine).try_start().expect_err("a second server on one image");
        assert!(matches!(failure.code, Some(1 | 3)), "{failure}");
        let said = &failure.stderr;
        assert!(said.contains("once.img") && said.contains("in use"), "not said which and why: {failure}");
    }
    let ended = check(&options.device);
    assert_eq!(ended.code, Some(8), "check of a device in use could not run: {}", ended.text());
    assert_eq!(call!(node.client(), "SET", "k", "v"), Reply::ok());
    node.kill9();
    let node = options.start();
    assert_eq!(call!(node.client(), "GET", "k"), Reply::bulk("v"), "a killed owner leaves no lock behind");
    node.stop();
}

#[test]
fn a_port_in_use_is_an_error_in_words() {
    let directory = temp_dir();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let options = Options::new(directory.path().join("port.img")).listen(address.clone());
    let failure = options.try_start().expect_err("a port in use");
    assert_eq!(failure.code, Some(1), "{failure}");
    assert!(failure.stderr.contains(&address), "the address is not named: {failure}");
    drop(taken);
    options.start().stop();
}

#[test]
fn a_public_address_is_refused_without_a_password() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("public.img")).listen("0.0.0.0:0");
    let failure = options.try_start().expect_err("a public address without a password");
    assert!(matches!(failure.code, Some(2 | 3)), "{failure}");
    assert!(failure.stderr.contains("0.0.0.0"), "{failure}");
}

/// A bound on what an idle node costs; it says nothing about speed.
#[test]
fn an_idle_node_sleeps() {
    let directory = temp_dir();
    for engine in ["uring", "sync", "aio", "pool", "uring+sqpoll"] {
        let path = directory.path().join(format!("{engine}.img"));
        let node = Options::new(&path).engine(engine).durability("interval=1000").start();
        let mut clients: Vec<_> = (0..20).map(|_| node.client()).collect();
        for client in &mut clients {
            assert_eq!(call!(client, "SET", "k", "v"), Reply::ok());
        }
        std::thread::sleep(Duration::from_millis(1_500));
        let before = node.cpu_time();
        std::thread::sleep(Duration::from_secs(2));
        let used = node.cpu_time() - before;
        assert!(used < Duration::from_millis(200), "{engine}: idle for 2 s, {used:?} of processor time");
        assert_eq!(call!(clients[0], "GET", "k"), Reply::bulk("v"), "and wakes");
        node.stop();
    }
}

#[test]
fn sigint_and_sigterm_are_clean_stops() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("stop.img")).durability("never");
    for (round, signal) in [Signal::TERM, Signal::INT].into_iter().enumerate() {
        let node = options.start();
        let mut client = node.client();
        assert_eq!(call!(client, "INCR", "rounds").int(), round as i64 + 1);
        assert_eq!(node.stop_with(signal).code(), Some(0), "{signal:?}");
    }
    check(&options.device).expect_code(0, "check after clean stops");
    // A client that stays connected and silent does not hold the stop up.
    let node = options.start();
    let _silent = node.client();
    node.stop();
}

#[test]
fn a_killed_node_leaves_its_port_free() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("port.img"));
    let node = options.start();
    let port = node.port();
    let mut client = node.client();
    assert_eq!(call!(client, "SET", "k", "v"), Reply::ok());
    node.kill9();
    // Connections of the dead node linger in TIME_WAIT: the next one must be able to bind anyway.
    let node = options.clone().listen(format!("127.0.0.1:{port}")).start();
    assert_eq!(call!(node.client(), "GET", "k"), Reply::bulk("v"));
    node.stop();
}

#[test]
fn check_says_clean_in_words_and_in_json() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("check.img"));
    let node = options.start();
    let mut client = node.client();
    for index in 0..500 {
        assert_eq!(call!(client, "SET", format!("k{index}"), vec![b'v'; index * 20]), Reply::ok());
    }
    node.stop();
    let words = check(&options.device).expect_code(0, "check");
    assert!(!words.stdout.trim().is_empty(), "a clean check says so");
    let json =
        basalt(&["check", "--device", path_text(&options.device), "--json"]).expect_code(0, "check --json");
    let parsed: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert!(parsed.is_object(), "{parsed}");
    assert_eq!(parsed["device_size_bytes"], std::fs::metadata(&options.device).unwrap().len(), "{parsed}");
    basalt(&["check", "--device", path_text(&directory.path().join("none.img"))]).expect_code(8, "no device");
    assert!(!directory.path().join("none.img").exists(), "check makes no image");
}

/// A script that asked for JSON gets it whatever happens; the words on standard error are the same as without.
#[test]
fn errors_are_json_where_json_was_asked_for() {
    let table: &[(i32, &str, &[&str])] = &[
        (8, "x.img", &["check", "--device", "x.img"]),
        (3, "x.img", &["check", "--device", "x.img", "--engine", "mmap"]),
        (8, "x.img", &["salvage", "--device", "x.img", "--to", "keys.resp"]),
        (1, "x.img", &["inspect", "superblock", "--device", "x.img"]),
        (2, "x.img", &["inspect", "key", r"\q", "--escaped", "--device", "x.img"]),
        (1, "x.img", &["qualify", "--device", "x.img"]),
        (2, "a temporary file in .", &["qualify", "--profile", "none/disk.toml"]),
        (1, "x.img", &["bench", "device", "--device", "x.img"]),
        // A domain that no machine has.
        (1, "fffffffe:00:00.0", &["device", "identify", "fffffffe:00:00.0"]),
        (1, "fffffffe:00:00.0", &["device", "bind", "fffffffe:00:00.0"]),
        (1, "fffffffe:00:00.0", &["device", "unbind", "fffffffe:00:00.0"]),
    ];
    let directory = temp_dir();
    for (code, device, args) in table {
        let plain = common::node::basalt_in(directory.path(), args).expect_code(*code, &format!("{args:?}"));
        assert!(plain.stdout.is_empty(), "{args:?}: {}", plain.stdout);
        let asked: &[&str] = if args[0] == "bench" { &["--json", "-"] } else { &["--json"] };
        let ended = common::node::basalt_in(directory.path(), &[args, asked].concat());
        let ended = ended.expect_code(*code, &format!("{args:?} {asked:?}"));
        let value: serde_json::Value = serde_json::from_str(&ended.stdout)
            .unwrap_or_else(|error| panic!("{args:?}: {error}: {}", ended.text()));
        assert_eq!(value[if args[0] == "device" { "bdf" } else { "device" }], *device, "{args:?}: {value}");
        let error = value["error"].as_str().unwrap_or_else(|| panic!("{args:?}: {value}"));
        assert_eq!(ended.stderr, plain.stderr, "{args:?}");
        assert_eq!(ended.stderr.trim_end(), format!("basalt: error: {error}"), "{args:?}");
    }
}

/// Expired keys go away by themselves: DBSIZE follows without anyone reading them.
#[test]
fn expired_keys_stay_gone_across_restarts() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("expiry.img"));
    let node = options.start();
    let mut client = node.client();
    for index in 0..50 {
        assert_eq!(call!(client, "SET", format!("short:{index}"), "v", "PX", "300"), Reply::ok());
        assert_eq!(call!(client, "SET", format!("long:{index}"), "v", "EX", "10000"), Reply::ok());
    }
    wait_until("the short ones to expire", 30, || {
        (0..50).all(|index| call!(client, "GET", format!("short:{index}")) == Reply::Nil)
    });
    node.kill9();
    let node = options.start();
    let mut client = node.client();
    for index in 0..50 {
        assert_eq!(call!(client, "GET", format!("short:{index}")), Reply::Nil, "short:{index} came back");
        let left = call!(client, "TTL", format!("long:{index}")).int();
        assert!((1..=10_000).contains(&left), "long:{index} has {left} s left");
    }
    node.stop();
}
