//! The profile of a device: what `qualify` measured of it, in a file that `serve` goes by.
//!
//! It names the disk and the engine that it is of, since figures of another one are worse than none.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Exit;
use super::device_path::unfinished;
use crate::device::block_queue::BlockQueue;
use crate::engine::io_queue::cost::{DeviceProfile, FIGURES};
use crate::node::shared::ProfileSource;

/// The version of the file that this program writes, and the only one that it reads.
const VERSION: u32 = 1;

/// The first line of each profile.
const TITLE: &str = "# What `basalt qualify` measured of a disk. `basalt serve --profile` goes by it.\n";

/// The longest file that can be a profile, in bytes.
const FILE_SIZE_MAX: u64 = 64 << 10;

/// What tells a disk from others, as far as anybody says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Disk {
    /// What the system calls it, such as nvme0n1; a controller's model and serial number are all that it has.
    name: Option<String>,
    model: Option<String>,
    serial: Option<String>,
    size: Option<u64>,
}

impl Disk {
    /// The disk beneath a file, or a block device.
    pub(super) fn of(queue: Option<&BlockQueue>) -> Disk {
        Disk {
            name: queue.map(BlockQueue::name),
            model: queue.and_then(BlockQueue::model),
            serial: queue.and_then(BlockQueue::serial),
            size: queue.and_then(BlockQueue::disk_size),
        }
    }

    /// The disk that a device is on, once it has been opened: its path, and what a controller says of itself.
    pub(super) fn beneath(path: &Path, controller: Option<(&str, &str)>) -> Disk {
        match controller {
            Some((model, serial)) => {
                // Fields that a controller leaves blank say nothing.
                let said = |text: &str| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
                Disk { name: None, model: said(model), serial: said(serial), size: None }
            }
            None => Disk::of(File::open(path).ok().and_then(|file| BlockQueue::of(&file)).as_ref()),
        }
    }

    /// The disk that a file will be on that is not there yet: that of its directory.
    pub(super) fn beneath_new(path: &Path) -> Disk {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        Disk::beneath(directory.unwrap_or(Path::new(".")), None)
    }

    /// Whether it is the same: by serial number, which outlives a change of names, where both have one.
    fn is(&self, other: &Disk) -> Likeness {
        let is_same = match (&self.serial, &other.serial) {
            (Some(serial), Some(other_serial)) => serial == other_serial && self.model == other.model,
            _ => self == other,
        };
        match is_same {
            true if self.is_identified() => Likeness::Same,
            true => Likeness::LooksTheSame,
            false => Likeness::Other,
        }
    }

    /// Whether it can be told from every other disk.
    pub(super) fn is_identified(&self) -> bool {
        self.serial.as_ref().is_some_and(|serial| !serial.trim().is_empty())
    }
}

/// How a disk compares with one that was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Likeness {
    Same,
    /// All that is known of them is the same, and no serial number is.
    LooksTheSame,
    Other,
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let model = self.model.as_ref().map(|model| format!("a {model}"));
        let serial = self.serial.as_ref().map(|serial| format!("serial number {serial}"));
        let size = self.size.map(crate::size::show);
        let known: Vec<String> = [self.name.clone(), model, serial, size].into_iter().flatten().collect();
        f.write_str(if known.is_empty() { "a disk that nothing is known of" } else { "the disk " })?;
        f.write_str(&known.join(", "))
    }
}

/// A profile as it is in its file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Profile {
    profile_version: u32,
    /// The I/O engine, without its options.
    engine: String,
    disk: Disk,
    figures: DeviceProfile,
}

/// What every version of the file says.
#[derive(Deserialize)]
struct AnyVersion {
    profile_version: u32,
}

fn without_options(engine: &str) -> &str {
    engine.split('+').next().unwrap_or(engine)
}

impl Profile {
    pub(super) fn new(engine: &str, disk: Disk, figures: DeviceProfile) -> Profile {
        Profile { profile_version: VERSION, engine: without_options(engine).to_owned(), disk, figures }
    }

    /// Reads one. The error says which file, what is wrong and what to do.
    pub(super) fn read(path: &Path) -> Result<Profile, String> {
        let failed = |why: &dyn fmt::Display| format!("cannot use the profile {}: {why}", path.display());
        let text = read_short(path).map_err(|error| {
            failed(&format!("{error}; name a file that `basalt qualify --profile` has made"))
        })?;
        let again = format!("`basalt qualify --profile {}` makes a new one", path.display());
        // What is no profile is not written over.
        let AnyVersion { profile_version } = toml::from_str(&text).map_err(|error| {
            failed(&format!("it is no profile: {}; remove it, then {again}", one_line(&text, &error)))
        })?;
        if profile_version != VERSION {
            let why = format!(
                "it is of version {profile_version}, and this program reads version {VERSION}; {again}"
            );
            return Err(failed(&why));
        }
        // Figures are looked at one by one first, since only so an error says which it is about, and what it may be.
        let in_words = |error: toml::de::Error| one_line(&text, &error);
        let checked = toml::from_str(&text)
            .map_err(in_words)
            .and_then(|table: toml::Table| check_figures(table.get("figures")))
            .and_then(|()| toml::from_str(&text).map_err(in_words));
        let checked = checked.and_then(|profile: Profile| {
            profile.figures.check().map_err(|error| error.to_string())?;
            Ok(profile)
        });
        checked.map_err(|why| failed(&format!("{why}; {again}")))
    }

    /// Whether it was measured of this disk through this engine, for all that can be known. The error says what is not so and what
    /// to do.
    pub(super) fn check(&self, path: &Path, engine: &str, disk: &Disk) -> Result<ProfileSource, String> {
        let remedy = "measure this one with `basalt qualify --profile`, or leave --profile out";
        let engine = without_options(engine);
        if self.engine != engine {
            return Err(format!(
                "the profile {} was measured through {}, and the device is used through {engine}: {remedy}",
                path.display(),
                self.engine
            ));
        }
        match self.disk.is(disk) {
            Likeness::Same => Ok(ProfileSource::Identified),
            Likeness::LooksTheSame => Ok(ProfileSource::Unidentified),
            Likeness::Other => Err(format!(
                "the profile {} was measured of {}, and the device is on {disk}: {remedy}",
                path.display(),
                self.disk
            )),
        }
    }

    /// What was measured.
    pub(super) fn figures(&self) -> &DeviceProfile {
        &self.figures
    }

    /// What its user should know where nothing says that it is of the same disk; `None` where something does.
    pub(super) fn doubt(&self, path: &Path, source: ProfileSource) -> Option<String> {
        (source == ProfileSource::Unidentified).then(|| {
            format!(
                "the profile {} was measured of {}, which has no serial number: it is used for this one, which looks the same. \
                 Measure this one with `basalt qualify --profile` if it may be another",
                path.display(),
                self.disk
            )
        })
    }

    /// Writes it, in place of an earlier one, which is there until the new one is whole. Figures that no device has are refused.
    pub(super) fn write(&self, path: &Path) -> Result<(), String> {
        self.figures.check().map_err(|error| format!("no profile was written: {error}"))?;
        // Behind a link it is the file that is replaced, not the link.
        let path = &std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let unfinished = unfinished(path);
        let text = toml::to_string(self).map_err(|error| error.to_string());
        let written = text.and_then(|text| {
            let write = || {
                let mut file = File::create(&unfinished)?;
                file.write_all(format!("{TITLE}{text}").as_bytes())?;
                file.sync_all()?;
                std::fs::rename(&unfinished, path)
            };
            write().map_err(|error| error.to_string())
        });
        written.map_err(|error| {
            // Best effort: it is not taken for a profile either way.
            let _ = std::fs::remove_file(&unfinished);
            format!("cannot write the profile {}: {error}", path.display())
        })
    }
}

/// The words of an error, and the line of the file that it is about if it is about a single one.
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let words = error.message().lines().collect::<Vec<_>>().join(", ");
    let line = error.span().and_then(|span| {
        let start = text.get(..span.start)?.rfind('\n').map_or(0, |at| at + 1);
        let line = text[start..].lines().next()?;
        (span.end <= start + line.len() && line.contains('=')).then_some(line.trim())
    });
    line.map_or(words.clone(), |line| format!("`{line}`: {words}"))
}

/// Whether every figure is there and one that a device may have. Says which is not, and what it may be.
fn check_figures(figures: Option<&toml::Value>) -> Result<(), String> {
    let Some(toml::Value::Table(found)) = figures else {
        return Err("the section [figures] is missing".to_owned());
    };
    for figure in FIGURES {
        let name = figure.name;
        let kind = if figure.is_whole { "a whole number" } else { "a number" };
        let range = format!("it must be {kind} from {} to {}", figure.least, figure.most);
        let shown = match found.get(name) {
            Some(toml::Value::Integer(value)) if figure.allows(*value as f64) => continue,
            Some(toml::Value::Float(value)) if figure.allows(*value) && !figure.is_whole => continue,
            Some(toml::Value::Integer(value)) => value.to_string(),
            Some(toml::Value::Float(value)) => format!("{value:?}"),
            Some(other) => format!("of the type {}", other.type_str()),
            None => "missing".to_owned(),
        };
        return Err(format!("the figure {name} is {shown}: {range}"));
    }
    match found.keys().find(|name| FIGURES.iter().all(|figure| figure.name != **name)) {
        Some(name) => Err(format!("it has the figure {name}, which profiles of this version do not have")),
        None => Ok(()),
    }
}

/// Whether a profile may be written there: said before anything is measured. What is no profile is not written over.
pub(super) fn check_place(path: &Path) -> Result<(), (Exit, String)> {
    let shown = path.display();
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        return Err((Exit::Usage, format!("--profile {shown}: {} is no directory", parent.display())));
    }
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    let is_profile = read_short(path).is_ok_and(|text| toml::from_str::<AnyVersion>(&text).is_ok());
    if is_profile {
        return Ok(());
    }
    let text = format!("{shown} is there and is no profile: it is not written over; name another file");
    Err((Exit::Refused, text))
}

/// The text of a file that can be a profile by its length: a device's image is not read in whole.
fn read_short(path: &Path) -> Result<String, String> {
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() || metadata.len() > FILE_SIZE_MAX {
        return Err("it is no profile, which is a short file".to_owned());
    }
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::io_queue::cost::ASSUMED;

    fn disk(name: &str, serial: Option<&str>) -> Disk {
        Disk {
            name: Some(name.to_owned()),
            model: Some("Fast Drive".to_owned()),
            serial: serial.map(str::to_owned),
            size: Some(1 << 40),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.toml");
        for disk in [disk("nvme0n1", Some("S1")), Disk::of(None)] {
            let figures = DeviceProfile { read_depth: 24, read_iops: 123_456.75, ..ASSUMED };
            let written = Profile::new("uring+sqpoll", disk.clone(), figures.clone());
            check_place(&path).unwrap();
            written.write(&path).unwrap();
            let read = Profile::read(&path).unwrap();
            assert_eq!(read, written);
            assert_eq!(*read.figures(), figures);
            let source = read.check(&path, "uring+registered", &disk).unwrap();
            assert_eq!(source == ProfileSource::Identified, disk.is_identified());
        }
    }

    #[test]
    fn a_profile_of_something_else_is_refused_by_name() {
        let path = Path::new("disk.toml");
        let of = |disk: Disk| Profile::new("uring", disk, ASSUMED);
        let profile = of(disk("nvme0n1", Some("S1")));
        let error = profile.check(path, "aio", &disk("nvme0n1", Some("S1"))).unwrap_err();
        assert!(error.contains("through uring") && error.contains("through aio"), "{error}");
        let error = profile.check(path, "uring", &disk("nvme0n1", Some("S2"))).unwrap_err();
        assert!(error.contains("S1") && error.contains("S2") && error.contains("qualify"), "{error}");
        // Names change from one start of the machine to the next, serial numbers do not.
        let source = profile.check(path, "uring", &disk("nvme3n1", Some("S1"))).unwrap();
        assert_eq!((source, profile.doubt(path, source)), (ProfileSource::Identified, None));
        assert!(profile.check(path, "uring", &disk("nvme0n1", None)).is_err());
        let profile = of(disk("vda", None));
        assert!(profile.check(path, "uring", &disk("vda", Some("S1"))).is_err());
        assert!(profile.check(path, "uring", &disk("vdb", None)).is_err());
        assert!(profile.check(path, "uring", &Disk::of(None)).unwrap_err().contains("nothing is known"));
    }

    #[test]
    fn a_disk_that_can_not_be_told_from_others_is_said_to_be_one() {
        let path = Path::new("disk.toml");
        // Blank serial numbers are none, or all that have them would be one.
        let blank = |model| Disk::beneath(Path::new("nowhere"), Some((model, "   ")));
        assert_eq!(blank("Fast Drive").serial, None);
        let written = disk("vda", Some(" "));
        for (disk, words) in [
            (disk("vda", None), "the disk vda, a Fast Drive"),
            (blank("Fast Drive"), "the disk a Fast Drive"),
            (blank(""), "nothing is known"),
            (Disk::of(None), "nothing is known"),
            (written, "the disk vda"),
        ] {
            assert!(!disk.is_identified());
            let profile = Profile::new("uring", disk.clone(), ASSUMED);
            let source = profile.check(path, "uring", &disk).unwrap();
            assert_eq!(source, ProfileSource::Unidentified);
            let doubt = profile.doubt(path, source).expect("a doubt");
            assert!(doubt.contains(words) && doubt.contains("no serial number"), "{doubt}");
        }
        assert!(Profile::new("uring", blank("A"), ASSUMED).check(path, "uring", &blank("B")).is_err());
    }

    #[test]
    fn figures_that_no_device_has_are_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.toml");
        let figures = DeviceProfile { read_iops: f64::NAN, ..ASSUMED };
        let error = Profile::new("uring", Disk::of(None), figures).write(&path).unwrap_err();
        assert!(error.contains("read_iops is NaN") && !path.exists(), "{error}");
    }

    #[test]
    fn what_is_no_profile_is_refused_and_never_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        Profile::new("uring", disk("vda", None), ASSUMED).write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let depth = format!("read_depth = {}", ASSUMED.read_depth);
        for (text, words) in [
            (String::new(), "it is no profile"),
            ("not = [toml".to_owned(), "it is no profile"),
            (text.replace("profile_version = 1", "profile_version = 2"), "of version 2"),
            (text.replace("[figures]", "[figures]\nread_dept = 1"), "the figure read_dept, which"),
            (text.replace("[disk]", "[disk]\nwheels = 4"), "wheels"),
            (text.replace("[disk]", "[disk]\nserial = 4"), "`serial = 4`: invalid type: integer"),
            (text.replace("[figures]", "[figs]"), "[figures] is missing"),
            (
                text.replace(&depth, "read_depth = 0"),
                "read_depth is 0: it must be a whole number from 1 to 65536",
            ),
            (text.replace(&depth, "read_depth = 5000000000"), "read_depth is 5000000000: it must be"),
            (text.replace(&depth, "read_depth = 256.5"), "read_depth is 256.5: it must be a whole number"),
            (text.replace(&depth, "read_depth = 256.0"), "read_depth is 256.0: it must be a whole number"),
            (text.replace(&depth, ""), "read_depth is missing: it must be"),
            (
                text.replace("read_iops = 100000.0", "read_iops = \"fast\""),
                "read_iops is of the type string: it must be a number from 1 to 1000000000",
            ),
            (text.replace("read_iops = 100000.0", "read_iops = nan"), "read_iops is NaN: it must be"),
            (text.replace("read_iops = 100000.0", "read_iops = -inf"), "read_iops is -inf: it must be"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Profile::read(&path).unwrap_err();
            assert!(error.contains(words) && error.contains("file"), "{words:?}: {error}");
            assert!(
                error.contains("`basalt qualify --profile ") && !error.contains('\n'),
                "{words:?}: {error}"
            );
        }
        // A whole number is a number.
        std::fs::write(&path, text.replace("read_iops = 100000.0", "read_iops = 100000")).unwrap();
        assert_eq!(Profile::read(&path).unwrap().figures, ASSUMED);
        for (text, is_refused) in
            [("data that somebody wants", true), ("", true), ("profile_version = 9", false)]
        {
            std::fs::write(&path, text).unwrap();
            assert_eq!(check_place(&path).is_err(), is_refused, "{text}");
        }
        // An image that happens to be named is left alone, whatever its length.
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(check_place(&path), Err((Exit::Refused, _))));
        assert!(Profile::read(&path).unwrap_err().contains("no profile"));
        assert!(matches!(check_place(&folder.path().join("none/file")), Err((Exit::Usage, _))));
        assert!(matches!(check_place(folder.path()), Err((Exit::Refused, _))));
    }
}
