//! What this process has cost the system: context switches, and system calls where the kernel lets them be counted.

#![expect(unsafe_code, reason = "getrusage and perf_event_open, which rustix does not have")]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};

/// Times that threads of this process gave up a processor or lost it, so far.
pub fn context_switches() -> u64 {
    // SAFETY: a struct of plain integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the struct.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    (usage.ru_nvcsw + usage.ru_nivcsw) as u64
}

/// The part of `struct perf_event_attr` that is needed, with the size of its first version.
#[repr(C)]
#[derive(Default)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    breakpoint_address: u64,
}

const _: () = assert!(size_of::<PerfEventAttr>() == 64);

const PERF_TYPE_TRACEPOINT: u32 = 2;
/// `disabled`: it counts once it is enabled. `inherit`: it counts threads that are started later too.
const FLAGS: u64 = 1 | 1 << 1;
const IOCTL_ENABLE: u64 = 0x2400;
const IOCTL_DISABLE: u64 = 0x2401;

/// Counts the system calls of the thread that makes it, and of the threads that it starts from then on.
#[derive(Debug)]
pub struct SystemCalls(File);

impl SystemCalls {
    /// A counter that does not count yet. The error says why there is none.
    pub fn new() -> Result<SystemCalls, String> {
        let places = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
        let id = places
            .iter()
            .find_map(|place| std::fs::read_to_string(format!("{place}/events/raw_syscalls/sys_enter/id")).ok())
            .and_then(|text| text.trim().parse().ok())
            .ok_or("system calls are not counted: tracefs is not mounted or not readable (as root: mount -t tracefs nodev \
                    /sys/kernel/tracing)")?;
        let attr = PerfEventAttr {
            kind: PERF_TYPE_TRACEPOINT,
            size: size_of::<PerfEventAttr>() as u32,
            config: id,
            flags: FLAGS,
            ..PerfEventAttr::default()
        };
        // SAFETY: the kernel reads the struct, whose size it is told; this thread, on any processor, in no group.
        let code = unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attr, 0, -1, -1, 8_u64) };
        let fd = i32::try_from(code).ok().filter(|fd| *fd >= 0).ok_or_else(|| {
            let error = std::io::Error::last_os_error();
            format!("system calls are not counted: the kernel refuses a counter ({error}); root may have one")
        })?;
        // SAFETY: a new descriptor that nothing else has.
        Ok(SystemCalls(unsafe { File::from_raw_fd(fd) }))
    }

    /// Starts or stops counting. Counting slows system calls down, so that nothing is timed meanwhile.
    pub fn enable(&self, is_on: bool) {
        let request = if is_on { IOCTL_ENABLE } else { IOCTL_DISABLE };
        // SAFETY: the requests take no memory.
        unsafe { libc::ioctl(self.0.as_raw_fd(), request, 0) };
    }

    /// What was counted so far.
    #[expect(clippy::host_endian_bytes, reason = "the kernel counts in the machine's own order")]
    pub fn count(&self) -> u64 {
        let mut count = [0; 8];
        (&self.0).read_exact(&mut count).map_or(0, |()| u64::from_ne_bytes(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeping_is_a_context_switch() {
        let before = context_switches();
        (0..5).for_each(|_| std::thread::sleep(std::time::Duration::from_millis(1)));
        assert!(context_switches() >= before + 5);
    }

    #[test]
    fn calls_are_counted_while_it_is_on_and_in_new_threads_too_or_it_says_why_not() {
        let counter = match SystemCalls::new() {
            Ok(counter) => counter,
            Err(why) => {
                assert!(why.contains("not counted"), "{why}");
                println!("SKIPPED: {why}");
                return;
            }
        };
        let work = || {
            (0..1000).for_each(|_| {
                std::hint::black_box(rustix::process::getppid());
            })
        };
        work();
        assert_eq!(counter.count(), 0);
        counter.enable(true);
        work();
        let own = counter.count();
        assert!((1000..1100).contains(&own), "{own}");
        std::thread::spawn(work).join().unwrap();
        counter.enable(false);
        let both = counter.count();
        assert!((2000..2200).contains(&both), "{both}");
        work();
        assert!(counter.count() < both + 10);
    }
}
