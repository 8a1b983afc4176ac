//! Faults by schedule: what goes wrong at the Nth operation of a kind.

use super::crash::Keep;

/// Which operations a fault counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultOp {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Deallocations.
    Deallocate,
    /// Every submission.
    Any,
    /// Takings of a buffer; the kind of fault does not matter, the pool is exhausted.
    Allocate,
}

/// What goes wrong. A kind that makes no sense for an operation leaves it alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// A read is unrecovered; a write or deallocation faults although this part of it was applied; a flush fails and what
    /// was unflushed stays so; every later flush fails, too.
    Error(Keep),
    /// Aborted by a reset; of a write, this part was applied.
    Aborted(Keep),
    /// The submission is refused as if the queue were full.
    Full,
    /// The device is gone from this submission on.
    Gone,
    /// It never completes, until [`SimDisk::reset_controller`](super::SimDisk::reset_controller).
    Never,
    /// It completes so many polls later.
    Slow(u64),
    /// A flush fails, and the unflushed writes that it covered vanish: reads see what was there before. Every later flush
    /// fails, too.
    FlushLost,
    /// A flush succeeds and does nothing. Beyond the model: a drive that lies.
    FlushIgnored,
    /// A read gives one wrong bit and succeeds. The medium is right, and so is the next read.
    WrongRead,
    /// A write succeeds and does nothing. Beyond the model.
    LostWrite,
    /// A write succeeds at this offset instead of its own. Beyond the model.
    Misdirected(u64),
}

/// One scheduled fault.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// How many of the counted operations pass first: 0 hits the next one.
    pub nth: u64,
    /// What is counted.
    pub op: FaultOp,
    /// What goes wrong.
    pub kind: FaultKind,
    /// It hits every counted operation from the Nth on, not only that one.
    pub sticky: bool,
}

/// The faults that are still to come.
#[derive(Debug, Default)]
pub(super) struct FaultPlan {
    faults: Vec<Fault>,
    /// Operations that were struck.
    pub struck: u64,
}

impl FaultPlan {
    pub fn add(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    pub fn clear(&mut self) {
        self.faults.clear();
    }

    /// Counts an operation and says what goes wrong with it. The first scheduled fault wins; all of them count.
    pub fn strike(&mut self, op: FaultOp) -> Option<FaultKind> {
        let mut struck = None;
        self.faults.retain_mut(|fault| {
            let is_counted = fault.op == op || (fault.op == FaultOp::Any && op != FaultOp::Allocate);
            if !is_counted {
                return true;
            }
            if fault.nth > 0 {
                fault.nth -= 1;
                return true;
            }
            struck.get_or_insert(fault.kind);
            fault.sticky
        });
        self.struck += u64::from(struck.is_some());
        struck
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_strikes_at_its_count_and_only_its_kind() {
        let mut plan = FaultPlan::default();
        plan.add(Fault { nth: 1, op: FaultOp::Write, kind: FaultKind::Never, sticky: false });
        plan.add(Fault { nth: 4, op: FaultOp::Any, kind: FaultKind::Full, sticky: true });
        assert_eq!(plan.strike(FaultOp::Write), None);
        assert_eq!(plan.strike(FaultOp::Read), None);
        assert_eq!(plan.strike(FaultOp::Allocate), None);
        assert_eq!(plan.strike(FaultOp::Write), Some(FaultKind::Never));
        assert_eq!(plan.strike(FaultOp::Write), None);
        assert_eq!(plan.strike(FaultOp::Flush), Some(FaultKind::Full));
        assert_eq!(plan.struck, 2);
        assert_eq!(plan.strike(FaultOp::Read), Some(FaultKind::Full));
        plan.clear();
        assert_eq!(plan.strike(FaultOp::Read), None);
    }
}
