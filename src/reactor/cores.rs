//! Which cores reactors run on: the list that the user gives, checked before anything starts.
//!
//! Only cores that the user named are ever pinned to. What the process may use is its affinity mask plus the cores that
//! the kernel was booted to isolate: those are missing from every inherited mask, can be pinned to all the same, and are
//! exactly what a user who isolates cores wants.

use std::fmt::Write as _;
use std::str::FromStr;

use rustix::thread::CpuSet;

use crate::limits::REACTOR_COUNT_MAX;

/// Cores in the order in which reactors take them, each once. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoreList(Vec<usize>);

/// What is wrong with a core list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CoreError {
    /// Nothing is listed.
    #[error("the core list is empty; give numbers and ranges, such as 0,1,4-6")]
    Empty,
    /// Something that is neither a number nor a range.
    #[error("{text:?} in the core list is neither a core number nor a range; write for example 0,1,4-6")]
    NotANumber {
        /// The piece between two commas.
        text: String,
    },
    /// A range that runs backwards.
    #[error("the range {first}-{last} in the core list runs backwards")]
    Backwards {
        /// As written first.
        first: usize,
        /// As written last.
        last: usize,
    },
    /// A number that no kernel of this build can mean.
    #[error("core {core} does not exist: the highest number that can be named is {core_max}")]
    TooHigh {
        /// As written.
        core: usize,
        /// What a CPU set holds.
        core_max: usize,
    },
    /// The same core twice: two spinning reactors on one core would starve each other.
    #[error("core {core} is listed twice")]
    Twice {
        /// Which.
        core: usize,
    },
    /// More cores than there can be reactors.
    #[error("the core list names more than {count_max} cores")]
    TooMany {
        /// The most.
        count_max: usize,
    },
    /// The core is offline, does not exist, or is kept from this process.
    #[error("core {core} can't be used by this process; it may use {allowed}")]
    NotAllowed {
        /// Which.
        core: usize,
        /// What may be used, in the form of a core list.
        allowed: String,
    },
    /// The kernel refused to move the thread there.
    #[error("the kernel refused to pin a thread to core {core}: is it online, and in this process's cpuset?")]
    PinFailed {
        /// Which.
        core: usize,
    },
    /// The affinity mask could not be read.
    #[error("cannot read which cores this process may use: {0}")]
    Unreadable(rustix::io::Errno),
}

/// The highest core number that a CPU set holds.
const CORE_MAX: usize = CpuSet::MAX_CPU - 1;

/// Where the kernel lists the cores that it keeps out of every inherited mask.
const ISOLATED_PATH: &str = "/sys/devices/system/cpu/isolated";

impl FromStr for CoreList {
    type Err = CoreError;

    fn from_str(text: &str) -> Result<Self, CoreError> {
        let cores = parse(text, REACTOR_COUNT_MAX)?;
        if cores.is_empty() { Err(CoreError::Empty) } else { Ok(CoreList(cores)) }
    }
}

impl CoreList {
    /// The cores, in the order given.
    pub fn cores(&self) -> &[usize] {
        &self.0
    }

    /// Checks that this process may use every core of the list. To be asked before any thread is pinned, since a pinned
    /// thread sees only its own core.
    pub fn check(&self) -> Result<(), CoreError> {
        self.check_against(&usable()?)
    }

    fn check_against(&self, usable: &[usize]) -> Result<(), CoreError> {
        match self.0.iter().find(|core| !usable.contains(core)) {
            Some(&core) => Err(CoreError::NotAllowed { core, allowed: describe(usable) }),
            None => Ok(()),
        }
    }
}

/// Pins the calling thread to one core.
pub fn pin_current(core: usize) -> Result<(), CoreError> {
    // `core_affinity` indexes a fixed-size set and would panic above it.
    if core > CORE_MAX {
        return Err(CoreError::TooHigh { core, core_max: CORE_MAX });
    }
    if core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
        Ok(())
    } else {
        Err(CoreError::PinFailed { core })
    }
}

/// The cores that the calling thread may be pinned to, ascending.
pub fn usable() -> Result<Vec<usize>, CoreError> {
    let mask = rustix::thread::sched_getaffinity(None).map_err(CoreError::Unreadable)?;
    let mut cores: Vec<usize> = (0..=CORE_MAX).filter(|&core| mask.is_set(core)).collect();
    // Not there or not readable (a container) means that none are isolated.
    let isolated = std::fs::read_to_string(ISOLATED_PATH).unwrap_or_default();
    cores.extend(parse(isolated.trim(), CpuSet::MAX_CPU).unwrap_or_default());
    cores.sort_unstable();
    cores.dedup();
    Ok(cores)
}

/// Reads `0,1,4-6`. Empty text is no cores.
fn parse(text: &str, count_max: usize) -> Result<Vec<usize>, CoreError> {
    let mut cores = Vec::new();
    if text.trim().is_empty() {
        return Ok(cores);
    }
    for piece in text.split(',').map(str::trim) {
        let (first, last) = piece.split_once('-').unwrap_or((piece, piece));
        let (first, last) = (number(first, piece)?, number(last, piece)?);
        if first > last {
            return Err(CoreError::Backwards { first, last });
        }
        // Bounded by CORE_MAX, so an absurd range costs nothing.
        for core in first..=last {
            if cores.contains(&core) {
                return Err(CoreError::Twice { core });
            }
            if cores.len() == count_max {
                return Err(CoreError::TooMany { count_max });
            }
            cores.push(core);
        }
    }
    Ok(cores)
}

fn number(digits: &str, piece: &str) -> Result<usize, CoreError> {
    let digits = digits.trim();
    // `parse` would also take a sign.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(CoreError::NotANumber { text: piece.to_owned() });
    }
    let core = digits.parse().unwrap_or(usize::MAX);
    if core > CORE_MAX { Err(CoreError::TooHigh { core, core_max: CORE_MAX }) } else { Ok(core) }
}

/// The reverse of `parse`, for messages: ascending cores as `0,1,4-6`.
fn describe(cores: &[usize]) -> String {
    let mut text = String::new();
    for run in cores.chunk_by(|a, b| a + 1 == *b) {
        let comma = if text.is_empty() { "" } else { "," };
        // Writing to a String can't fail.
        let _ = match run {
            [first, .., last] => write!(text, "{comma}{first}-{last}"),
            _ => write!(text, "{comma}{}", run[0]),
        };
    }
    if text.is_empty() { "none".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<Vec<usize>, CoreError> {
        text.parse::<CoreList>().map(|list| list.0)
    }

    #[test]
    fn numbers_and_ranges_in_the_order_given() {
        assert_eq!(list("0"), Ok(vec![0]));
        assert_eq!(list("0,1,4-6"), Ok(vec![0, 1, 4, 5, 6]));
        assert_eq!(list(" 7 , 2 - 3 "), Ok(vec![7, 2, 3]));
        assert_eq!(list("5-5"), Ok(vec![5]));
    }

    #[test]
    fn each_mistake_has_its_own_error() {
        let not_a_number = |text: &str| Err(CoreError::NotANumber { text: text.to_owned() });
        assert_eq!(list(""), Err(CoreError::Empty));
        assert_eq!(list("  "), Err(CoreError::Empty));
        assert_eq!(list("0,,1"), not_a_number(""));
        assert_eq!(list("0,"), not_a_number(""));
        assert_eq!(list("1-"), not_a_number("1-"));
        assert_eq!(list("-1"), not_a_number("-1"));
        assert_eq!(list("1-2-3"), not_a_number("1-2-3"));
        assert_eq!(list("+1"), not_a_number("+1"));
        assert_eq!(list("0x1"), not_a_number("0x1"));
        assert_eq!(list("all"), not_a_number("all"));
        assert_eq!(list("6-4"), Err(CoreError::Backwards { first: 6, last: 4 }));
        assert_eq!(list("0-3,2"), Err(CoreError::Twice { core: 2 }));
        assert_eq!(list("0-1023"), Err(CoreError::TooMany { count_max: REACTOR_COUNT_MAX }));
        assert!(matches!(list("0-99999999"), Err(CoreError::TooHigh { core: 99_999_999, .. })));
        assert!(matches!(list("99999999999999999999999"), Err(CoreError::TooHigh { .. })));
    }

    #[test]
    fn a_core_outside_the_allowed_ones_is_named_with_what_is_allowed() {
        let cores: CoreList = "0,2,5".parse().unwrap();
        assert_eq!(cores.check_against(&[0, 1, 2, 3, 5]), Ok(()));
        let error = cores.check_against(&[0, 2, 3, 4, 8]).unwrap_err();
        assert_eq!(error, CoreError::NotAllowed { core: 5, allowed: "0,2-4,8".to_owned() });
        assert_eq!(error.to_string(), "core 5 can't be used by this process; it may use 0,2-4,8");
    }

    #[test]
    fn what_is_usable_can_be_pinned_to() {
        let usable = usable().unwrap();
        assert!(!usable.is_empty());
        assert_eq!(CoreList(usable.clone()).check(), Ok(()));
        std::thread::spawn(move || {
            pin_current(usable[0]).unwrap();
            let mask = rustix::thread::sched_getaffinity(None).unwrap();
            assert!(mask.is_set(usable[0]) && mask.count() == 1);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_core_that_is_not_there_is_an_error_that_names_it() {
        // No machine that runs this has every core that a CPU set can name.
        assert_eq!(pin_current(CORE_MAX), Err(CoreError::PinFailed { core: CORE_MAX }));
        assert!(matches!(pin_current(CORE_MAX + 1), Err(CoreError::TooHigh { .. })));
    }
}
