//! `bench device` and `qualify` from outside: what they measure, what they leave behind, and what they never write over.

#![cfg(test)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use common::node::{basalt_in, path_text};
use common::{basalt, temp_dir};

const ENGINES: &str = "uring,uring+sqpoll,aio,pool,sync,buffered,mmap";

fn names_in(directory: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn every_engine_is_measured_on_a_file_that_is_gone_afterwards() {
    let directory = temp_dir();
    let args = [
        "bench",
        "device",
        "--size",
        "32MiB",
        "--engine",
        ENGINES,
        "--depth",
        "1,4",
        "--block-size",
        "4KiB,64KiB",
        "--seconds",
        "0.01",
        "--runs",
        "2",
        "--json",
        "figures.json",
        "--html",
        "page.html",
    ];
    let ended = basalt_in(directory.path(), &args).expect_code(0, "bench device");
    assert_eq!(names_in(directory.path()), ["figures.json", "page.html"].map(str::to_owned).into());
    let text = std::fs::read_to_string(directory.path().join("figures.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    let count = ENGINES.split(',').count();
    assert_eq!(report["engines"].as_array().unwrap().len(), count);
    let points = report["points"].as_array().unwrap();
    assert_eq!(points.len(), count * 5 * 2 * 2, "engines, workloads, sizes, depths");
    for point in points {
        let at = |name: &str| point["latency_us"][name].as_f64().unwrap();
        assert!(point["iops"].as_f64().unwrap() > 0.0, "{point}");
        assert!(at("p50") <= at("p90") && at("p90") <= at("p99") && at("p99") <= at("p999"), "{point}");
        let is_mixed = point["workload"] == "mixed";
        let is_read = point["workload"].as_str().unwrap().ends_with("read");
        assert!(is_mixed || point["write_latency_us"].is_null() == is_read, "{point}");
        assert!(point["iops_min"].as_f64() <= point["iops"].as_f64(), "{point}");
    }
    let durable = report["durable"].as_array().unwrap();
    assert!(durable.len() >= count * 2 * 3, "{}", durable.len());
    let kinds: BTreeSet<&str> = durable.iter().map(|one| one["kind"].as_str().unwrap()).collect();
    assert!(kinds.contains("overwrite, flush") && kinds.contains("recycled, FUA"), "{kinds:?}");
    for engine in ENGINES.split(',') {
        assert!(ended.stdout.contains(engine), "{engine} is not in the table: {}", ended.stdout);
    }
    let page = std::fs::read_to_string(directory.path().join("page.html")).unwrap();
    assert_eq!(
        page.matches("<svg").count(),
        5 * 2 + 2,
        "a plot for each workload and size, and the durable ones"
    );
    for loaded in ["http:", "https:", "<script", "src=", "@import", "url("] {
        assert!(!page.contains(loaded), "the page loads something: {loaded}");
    }
}

#[test]
fn what_is_on_a_device_is_read_but_written_over_only_with_destroy() {
    let directory = temp_dir();
    let image = directory.path().join("node.img");
    basalt(&["format", "--device", path_text(&image), "--size", "64MiB"]).expect_code(0, "format");
    // Nothing at its ends, where formats have their marks.
    let middle = directory.path().join("middle.bin");
    let mut bytes = vec![0; 32 << 20];
    bytes[8 << 20..24 << 20].fill(7);
    std::fs::write(&middle, bytes).unwrap();
    for (path, words) in [(&image, "a Basalt device"), (&middle, "non-zero data at byte")] {
        let before = std::fs::read(path).unwrap();
        let device = path_text(path);
        for args in [
            vec!["bench", "device", "--device", device, "--seconds", "0.02"],
            vec!["bench", "device", "--device", device, "--workload", "durable", "--seconds", "0.02"],
            vec!["qualify", "--device", device, "--seconds", "0.02"],
        ] {
            let ended = basalt(&args).expect_code(3, &format!("{args:?}"));
            assert!(ended.stderr.contains(words) && ended.stderr.contains("--destroy"), "{}", ended.stderr);
        }
        let reading = [
            "bench",
            "device",
            "--device",
            device,
            "--workload",
            "randread,seqread",
            "--seconds",
            "0.02",
            "--runs",
            "1",
        ];
        basalt(&reading).expect_code(0, "reading only");
        assert!(std::fs::read(path).unwrap() == before, "{device} was written to");
    }
    let device = path_text(&middle);
    let writing = [
        "bench",
        "device",
        "--device",
        device,
        "--workload",
        "randwrite",
        "--seconds",
        "0.02",
        "--runs",
        "1",
    ];
    let ended = basalt(&[&writing[..], &["--destroy"]].concat()).expect_code(0, "destroy");
    assert!(ended.stderr.contains("full of test data"), "{}", ended.stderr);
    assert!(std::fs::read(&middle).unwrap()[..4096].iter().any(|byte| *byte != 0), "nothing was written");
    // What holds nothing needs no leave.
    let blank = directory.path().join("blank.bin");
    std::fs::write(&blank, vec![0; 16 << 20]).unwrap();
    let args = [
        "bench",
        "device",
        "--device",
        path_text(&blank),
        "--workload",
        "seqwrite",
        "--seconds",
        "0.02",
        "--runs",
        "1",
    ];
    basalt(&args).expect_code(0, "a blank file");
    basalt(&args).expect_code(3, "which is not blank any more");
}

#[test]
fn what_can_not_be_measured_is_refused_in_words() {
    let table: &[(&[&str], i32, &str)] = &[
        (&["bench", "device", "--engine", "floppy"], 2, "not one of"),
        (&["bench", "device", "--block-size", "1000"], 2, "multiples of 4096"),
        (&["bench", "device", "--block-size", "8MiB"], 2, "up to 1.0 MiB"),
        (&["bench", "device", "--depth", "0"], 2, "0"),
        (&["bench", "device", "--seconds=-1"], 2, "seconds"),
        (&["bench", "device", "--destroy"], 2, "--device"),
        (&["bench", "device", "--device", "nowhere.img"], 1, "nowhere.img"),
        (&["bench", "device", "--dir", "nowhere"], 1, "temporary file"),
        (&["qualify", "--engine", "mmap"], 3, "SIGBUS"),
    ];
    let directory = temp_dir();
    for (args, code, words) in table {
        let ended = basalt_in(directory.path(), args).expect_code(*code, &format!("{args:?}"));
        assert!(ended.stderr.contains(words), "{args:?} does not say {words:?}: {}", ended.stderr);
    }
    assert!(names_in(directory.path()).is_empty());
}

#[test]
fn a_good_file_qualifies_through_every_engine() {
    let directory = temp_dir();
    for engine in ["uring", "aio", "pool", "sync", "buffered"] {
        let args = ["qualify", "--size", "32MiB", "--engine", engine, "--seconds", "0.05", "--json"];
        let ended = basalt_in(directory.path(), &args).expect_code(0, engine);
        let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!((&report["qualified"], &report["engine"]), (&true.into(), &engine.into()));
        let lines = report["lines"].as_array().unwrap();
        let names: Vec<&str> = lines.iter().map(|line| line["name"].as_str().unwrap()).collect();
        let expected = [
            "claim",
            "independent writes",
            "reads beside writes",
            "alignment",
            "deallocation",
            "atomicity",
            "flush",
            "opened anew",
            "figures",
        ];
        assert_eq!(names, expected);
        for line in lines {
            assert!(!line["why"].as_str().unwrap().is_empty() && line["outcome"] != "fail", "{line}");
        }
        for figure in report["figures"].as_object().unwrap().values() {
            assert!(figure.as_f64().unwrap() > 0.0, "{report}");
        }
    }
    assert!(names_in(directory.path()).is_empty());
    let ended = basalt_in(directory.path(), &["qualify", "--size", "32MiB", "--seconds", "0.05"])
        .expect_code(0, "text");
    for words in ["pass  claim", "pass  independent writes", "IOPS", "bandwidth", "latency", "qualified"] {
        assert!(ended.stdout.contains(words), "{words}: {}", ended.stdout);
    }
}

#[test]
fn memory_that_calls_itself_a_file_system_does_not_qualify() {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    if !mounts.lines().any(|line| line.contains(" /dev/shm tmpfs ")) {
        println!("SKIPPED: there is no tmpfs at /dev/shm");
        return;
    }
    let args =
        ["qualify", "--dir", "/dev/shm", "--size", "32MiB", "--engine", "buffered", "--seconds", "0.05"];
    let ended = basalt(&args).expect_code(1, "tmpfs");
    assert!(ended.stdout.contains("FAIL  flush") && ended.stdout.contains("memory"), "{}", ended.stdout);
    assert!(ended.stdout.contains("NOT qualified"), "{}", ended.stdout);
}
