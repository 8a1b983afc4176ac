//! The power fails under load, on a drive with a volatile write cache.
//!
//! A round: boot on an image, serve, load, kill the machine. Its log of writes then gives several images that the power cut
//! could have left, from "nothing after the last flush" over random subsets and torn writes to "everything". Each must be
//! clean, must serve on the host, and must hold every write that was acknowledged and no half of a batch. The next round
//! starts from one of them, unrecovered, so that recoveries are cut off as well.
//!
//! What this cannot show: QEMU notes a write when it has completed, so a flush that was sent too early is taken to cover
//! writes that completed before it did. The simulated drive is stricter there.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vm_test::engine::Engine;
use vm_test::error::Result;
use vm_test::host::say;
use vm_test::image;
use vm_test::machine::{Machine, Namespace};
use vm_test::node::{GuestNode, HostNode, PORT, check};
use vm_test::vm::Vm;
use vm_test::write_log::{Ending, Follower, Survivors, WriteLog};

use crate::load::{Load, Promise};
use crate::resp::{Client, Reply};
use crate::rng::Rng;
use crate::{case, count_from_env};

/// The log is only appended to; a longer run goes through several images.
const CUTS_PER_IMAGE: usize = 10;

const DRIVE_SIZE: u64 = 2 << 30;

/// How long a cut waits for a write that is not flushed yet.
const AIM_LIMIT: Duration = Duration::from_secs(5);

#[test]
fn uring_loses_nothing_acknowledged() -> Result<()> {
    let cuts = count_from_env("BASALT_POWER_CUTS", 6);
    loses_nothing(
        "power-cut-uring",
        Drive { engine: Engine::Uring, block_size: 512, serve: "--cores 0,1" },
        cuts,
    )
}

#[test]
fn uring_loses_nothing_with_4096_byte_blocks_and_one_reactor() -> Result<()> {
    let cuts = count_from_env("BASALT_POWER_CUTS", 4).div_ceil(2);
    loses_nothing(
        "power-cut-4096",
        Drive { engine: Engine::Uring, block_size: 4096, serve: "--cores 0" },
        cuts,
    )
}

/// A node that does not flush must be caught by what the others pass: this is the test of the test.
#[test]
fn a_node_that_does_not_flush_is_caught() -> Result<()> {
    is_caught("power-cut-planted", Engine::Uring, "--durability never", Survivors::Flushed)
}

/// And so must a drive that does not do its last flushes, under a node that is all right.
#[test]
fn a_drive_that_lies_is_caught() -> Result<()> {
    is_caught("power-cut-lies", Engine::Uring, "--durability always", Survivors::Lied { flush_count: 20 })
}

pub fn is_caught(name: &str, engine: Engine, serve: &'static str, survivors: Survivors) -> Result<()> {
    case(name, |directory| {
        let drive = Drive { engine, block_size: 512, serve };
        let mut run = Run::new(directory, drive, Promise::Acknowledged)?;
        let mut message = None;
        for _ in 0..6 {
            let Some(log) = run.cut_under_load(&mut |_, _| Ok(()))? else { continue };
            // What was unflushed may have been acknowledged to nobody: then this cut says nothing, and another is made.
            match catch_unwind(AssertUnwindSafe(|| run.judge(&log, survivors))) {
                Err(panic) => {
                    message = Some(panic);
                    break;
                }
                Ok(settled) => {
                    run.load = settled?;
                    run.rebase(&log, survivors)?;
                }
            }
        }
        let message = message
            .expect("acknowledged writes are missing after one of six cuts, and the model must say so");
        let message = message.downcast_ref::<String>().cloned().unwrap_or_default();
        // A deleted key that is there again is a loss too.
        let is_loss =
            message.contains("acknowledged: ") || message.contains("DBSIZE") || message.contains("transfer");
        assert!(is_loss, "missed for another reason: {message}");
        Ok(())
    })
}

/// Without the promise of `always`: what SAVE was answered for stays, and no batch is there by half.
#[test]
fn never_keeps_what_save_made_durable() -> Result<()> {
    case("power-cut-save", |directory| {
        let drive = Drive { engine: Engine::Uring, block_size: 512, serve: "--durability never" };
        let mut run = Run::new(directory, drive, Promise::Window)?;
        let mut save = |load: &mut Load, client: &mut Client| {
            assert_eq!(client.call(&[b"SAVE"]), Reply::ok(), "SAVE makes everything so far durable");
            load.forget_window();
            Ok(())
        };
        let mut log = None;
        // A cut may say nothing: right behind a flush of the node's own, or within an entry of the log.
        for _ in 0..6 {
            log = run.cut_under_load(&mut save)?;
            if log.is_some() {
                break;
            }
        }
        let log = log.expect("a node that never flushes leaves writes unflushed after one of six cuts");
        run.judge_all(&log)?;
        assert!(run.load.coverage.acked > 10, "hardly any load: {:?}", run.load.coverage);
        Ok(())
    })
}

/// What is cut off.
#[derive(Debug, Clone, Copy)]
pub struct Drive {
    pub engine: Engine,
    pub block_size: u32,
    /// Further arguments of `serve`.
    pub serve: &'static str,
}

/// Cuts the power so many times with writes unflushed, on one image after the other.
pub fn loses_nothing(name: &str, drive: Drive, cuts: usize) -> Result<()> {
    case(name, |directory| {
        let images = cuts.div_ceil(CUTS_PER_IMAGE);
        for number in 0..images {
            let here = cuts * (number + 1) / images - cuts * number / images;
            let directory = directory.join(number.to_string());
            std::fs::create_dir(&directory).expect("a directory for each image");
            let mut run = Run::new(&directory, drive, Promise::Acknowledged)?;
            run.cuts(name, here)?;
            let _ = std::fs::remove_dir_all(&directory);
        }
        Ok(())
    })
}

/// A drive that loses its power again and again, and what must be on it.
struct Run {
    directory: PathBuf,
    drive: Drive,
    program: PathBuf,
    /// The drive as it is before the next boot.
    base: PathBuf,
    load: Load,
    rng: Rng,
    is_formatted: bool,
}

impl Run {
    fn new(directory: &Path, drive: Drive, promise: Promise) -> Result<Run> {
        let mut rng = Rng::from_env("power cuts");
        Ok(Run {
            directory: directory.into(),
            drive,
            program: drive.engine.program()?,
            base: image::create(directory.join("base.img"), DRIVE_SIZE)?,
            load: Load::new(&mut rng, promise),
            rng,
            is_formatted: false,
        })
    }

    fn cuts(&mut self, name: &str, wanted: usize) -> Result<()> {
        let (mut judged, mut images) = (0, 0);
        for attempt in 0..3 * wanted + 3 {
            if judged == wanted {
                break;
            }
            let Some(log) = self.cut_under_load(&mut |_, _| Ok(()))? else { continue };
            judged += 1;
            let count = self.judge_all(&log)?;
            images += count;
            say(format!(
                "{name}: cut {judged} of {wanted}: {} writes unflushed, {count} images good, {} writes acknowledged so far",
                log.unflushed_count(),
                self.load.coverage.acked
            ));
            if attempt % 3 == 2 {
                self.cut_recovery()?;
            }
        }
        let seen = &self.load.coverage;
        println!("{name}: {judged} cuts, {images} images: {seen:?}");
        assert_eq!(judged, wanted, "too few of the cuts met unflushed writes: {seen:?}");
        assert!(seen.acked > 10 * wanted, "hardly any load: {seen:?}");
        assert!(seen.kills_with_pending > 0, "no cut met a write in flight: {seen:?}");
        Ok(())
    }

    /// Boots on the image with a log of writes, and what is needed to start a node.
    fn boot(&self) -> Result<(Vm, PathBuf)> {
        let drive = image::copy(&self.base, self.directory.join("drive.img"))?;
        let log = image::create(self.directory.join("writes.log"), 0)?;
        let namespace = Namespace::new(&drive).block_size(self.drive.block_size).write_log(&log);
        let machine = Machine { ports: vec![PORT], ..Machine::with_namespaces(vec![namespace]) };
        let vm = Vm::boot(&self.drive.engine.prepare(machine)?)?;
        self.drive.engine.take_devices(&vm)?;
        Ok((vm, log))
    }

    fn serve(&self, vm: &Vm) -> String {
        let device = self.drive.engine.device(vm.machine(), 0, 0);
        format!("--engine {} --device {device} {}", self.drive.engine.name(), self.drive.serve)
    }

    /// Load, then the power is gone. `before` is called in a pause of the load. `None` when this cut says nothing: nothing
    /// was unflushed, or the log has a gap.
    fn cut_under_load(
        &mut self,
        before: &mut dyn FnMut(&mut Load, &mut Client) -> Result<()>,
    ) -> Result<Option<WriteLog>> {
        let (mut vm, log) = self.boot()?;
        if !self.is_formatted {
            vm.run(&format!("basalt format --device {}", self.drive.engine.device(vm.machine(), 0, 0)))?;
        }
        let node = GuestNode::start(&vm, PORT, &self.serve(&vm))?;
        let address = node.address;
        let mut load = self.load.clone();
        let mut client = Client::connect(address).expect("a node that is ready can be connected to");
        load.verify(&mut client);
        let stop = AtomicBool::new(false);
        load.run(address, &stop, || {
            std::thread::sleep(Duration::from_millis(500 + self.rng.below(1_500)));
            stop.store(true, Ordering::Relaxed);
        });
        assert!(load.is_answered(), "a connection broke before the power did: {}", node.said()?);
        before(&mut load, &mut client)?;
        let mut follower = Follower::open(&log)?;
        let stop = AtomicBool::new(false);
        let moment = Duration::from_millis(self.rng.below(2_000));
        load.run(address, &stop, || {
            std::thread::sleep(moment);
            // At whatever moment it is by then, the cut waits for a write that it can take back.
            let limit = Instant::now() + AIM_LIMIT;
            while follower.unflushed_count() == 0 && Instant::now() < limit {
                std::thread::yield_now();
            }
            vm.kill();
        });
        load.note_kill();
        let log = WriteLog::read(&log)?;
        if log.ending == Ending::Gap {
            say("the machine was killed within an entry of its log; this cut is not judged");
            return Ok(None);
        }
        self.is_formatted = true;
        self.load = load;
        if log.unflushed_count() == 0 {
            // Still a power cut, with one outcome.
            self.judge(&log, Survivors::Everything).map(|settled| self.load = settled)?;
            self.rebase(&log, Survivors::Everything)?;
            return Ok(None);
        }
        Ok(Some(log))
    }

    /// Judges the images that a cut could have left, and goes on from one of them. Returns how many.
    fn judge_all(&mut self, log: &WriteLog) -> Result<usize> {
        let block = self.drive.block_size as usize;
        let survivors = [
            Survivors::Flushed,
            Survivors::Subset(self.rng.next()),
            Survivors::Subset(self.rng.next()),
            Survivors::Subset(self.rng.next()),
            Survivors::Torn { seed: self.rng.next(), unit: block },
            Survivors::Torn { seed: self.rng.next(), unit: block },
            Survivors::Torn { seed: self.rng.next(), unit: 1 },
            Survivors::Everything,
        ];
        let chosen = *self.rng.pick(&survivors);
        let mut settled = None;
        for one in survivors {
            let load = self.judge(log, one)?;
            if one == chosen {
                settled = Some(load);
            }
        }
        // What was found in the chosen image is what every later one must hold.
        self.load = settled.expect("the chosen one is among them");
        self.rebase(log, chosen)?;
        Ok(survivors.len())
    }

    /// Makes one image and looks at it on the host. Returns what the outcomes in flight have settled to.
    fn judge(&self, log: &WriteLog, survivors: Survivors) -> Result<Load> {
        let image = image::copy(&self.base, self.directory.join("survivor.img"))?;
        log.replay(&image, survivors)?;
        let named = |error| {
            say(format!(
                "of {} operations and a log that ends {:?}: {survivors:?}",
                log.operation_count(),
                log.ending
            ));
            error
        };
        check(&self.program, &image).map_err(named)?;
        let node = HostNode::start(&self.program, &image).map_err(named)?;
        let mut load = self.load.clone();
        println!("{survivors:?}");
        load.verify(&mut Client::connect(node.address).expect("a node that is ready can be connected to"));
        Ok(load)
    }

    fn rebase(&mut self, log: &WriteLog, survivors: Survivors) -> Result<()> {
        // `base.img` is what the log began with, hence the next one is made of it.
        log.replay(&self.base, survivors)
    }

    /// The power fails while the node is starting.
    fn cut_recovery(&mut self) -> Result<()> {
        let (mut vm, log) = self.boot()?;
        let serve = self.serve(&vm);
        vm.run(&format!("(basalt serve {serve} --listen 127.0.0.1:1234 >/dev/null 2>&1 &)"))?;
        std::thread::sleep(Duration::from_millis(self.rng.below(1_200)));
        vm.kill();
        let log = WriteLog::read(&log)?;
        if log.ending == Ending::Clean {
            self.judge_all(&log)?;
        }
        Ok(())
    }
}
