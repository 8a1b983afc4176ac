//! From the status of an NVMe completion to the errors of the device seam.

use spdk_sys::{
    spdk_nvme_generic_command_status_code as generic, spdk_nvme_media_error_status_code as media,
    spdk_nvme_path_status_code as path, spdk_nvme_status_code_type as kind,
};

use crate::device::IoError;

/// A completion's status as the shim packs it: type << 8 | code, and bit 16 for "do not retry". 0 is success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Status(pub(super) u32);

/// What a command was, as far as its errors differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Flush,
    Deallocate,
}

impl Status {
    pub(super) const SUCCESS: Status = Status(0);

    /// What a command is given that the driver dropped without an answer of the controller.
    pub(super) const ABORTED: Status =
        Status((kind::SPDK_NVME_SCT_GENERIC << 8) | generic::SPDK_NVME_SC_ABORTED_SQ_DELETION);

    pub(super) fn is_success(self) -> bool {
        self == Status::SUCCESS
    }

    fn kind(self) -> u32 {
        (self.0 >> 8) & 7
    }

    fn code(self) -> u32 {
        self.0 & 0xff
    }

    fn do_not_retry(self) -> bool {
        self.0 & (1 << 16) != 0
    }

    /// The command was ended by a reset, an abort, the loss of its queue or of the path: what it did is unknown.
    pub(super) fn is_aborted(self) -> bool {
        match self.kind() {
            kind::SPDK_NVME_SCT_GENERIC => matches!(
                self.code(),
                generic::SPDK_NVME_SC_ABORTED_BY_REQUEST
                    | generic::SPDK_NVME_SC_ABORTED_SQ_DELETION
                    | generic::SPDK_NVME_SC_ABORTED_POWER_LOSS
                    | generic::SPDK_NVME_SC_ABORTED_FAILED_FUSED
                    | generic::SPDK_NVME_SC_ABORTED_MISSING_FUSED
            ),
            kind::SPDK_NVME_SCT_PATH => matches!(
                self.code(),
                path::SPDK_NVME_SC_INTERNAL_PATH_ERROR
                    | path::SPDK_NVME_SC_CONTROLLER_PATH_ERROR
                    | path::SPDK_NVME_SC_HOST_PATH_ERROR
                    | path::SPDK_NVME_SC_ABORTED_BY_HOST
            ),
            _ => false,
        }
    }

    /// The namespace is not there any more.
    pub(super) fn is_gone(self) -> bool {
        self.kind() == kind::SPDK_NVME_SCT_GENERIC
            && self.code() == generic::SPDK_NVME_SC_INVALID_NAMESPACE_OR_FORMAT
    }

    /// A read that may succeed when it is sent again.
    pub(super) fn is_worth_another_read(self) -> bool {
        self.kind() == kind::SPDK_NVME_SCT_MEDIA_ERROR && !self.do_not_retry()
    }

    /// The typed error of a command on `size` bytes at `offset`.
    pub(super) fn error(self, command: Command, offset: u64, size: u64) -> IoError {
        match command {
            // Whatever happened to a flush, nothing since the last good one is known to be durable.
            Command::Flush => IoError::FlushFailed { cause: self.to_string() },
            _ if self.is_gone() => IoError::Gone,
            _ if self.is_aborted() => IoError::Aborted,
            Command::Read => IoError::UnrecoveredRead { offset, size },
            Command::Write | Command::Deallocate => {
                IoError::WriteFault { offset, size, cause: self.to_string() }
            }
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let words = match (self.kind(), self.code()) {
            (kind::SPDK_NVME_SCT_MEDIA_ERROR, media::SPDK_NVME_SC_WRITE_FAULTS) => "write fault",
            (kind::SPDK_NVME_SCT_MEDIA_ERROR, media::SPDK_NVME_SC_UNRECOVERED_READ_ERROR) => {
                "unrecovered read error"
            }
            (kind::SPDK_NVME_SCT_MEDIA_ERROR, media::SPDK_NVME_SC_ACCESS_DENIED) => "access denied",
            (kind::SPDK_NVME_SCT_MEDIA_ERROR, _) => "media error",
            (kind::SPDK_NVME_SCT_GENERIC, generic::SPDK_NVME_SC_INTERNAL_DEVICE_ERROR) => {
                "internal device error"
            }
            (kind::SPDK_NVME_SCT_GENERIC, generic::SPDK_NVME_SC_DATA_TRANSFER_ERROR) => "data transfer error",
            (kind::SPDK_NVME_SCT_GENERIC, generic::SPDK_NVME_SC_CAPACITY_EXCEEDED) => "capacity exceeded",
            (kind::SPDK_NVME_SCT_GENERIC, generic::SPDK_NVME_SC_RESERVATION_CONFLICT) => {
                "another host holds a reservation"
            }
            _ if self.is_gone() => "the namespace is not there",
            _ if self.is_aborted() => "aborted",
            _ => "the controller reports an error",
        };
        write!(f, "{words} (status {:02x}/{:02x})", self.kind(), self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(kind: u32, code: u32) -> Status {
        Status(kind << 8 | code)
    }

    #[test]
    fn statuses_become_typed_errors() {
        let read = status(2, 0x81);
        assert_eq!(
            read.error(Command::Read, 4096, 8192),
            IoError::UnrecoveredRead { offset: 4096, size: 8192 }
        );
        assert!(read.is_worth_another_read() && !Status(read.0 | 1 << 16).is_worth_another_read());
        let fault = status(2, 0x80).error(Command::Write, 4096, 8192);
        assert_eq!(fault.to_string(), "write fault at byte 4096 (8192 bytes): write fault (status 02/80)");
        for aborted in [Status::ABORTED, status(0, 7), status(0, 5), status(3, 0x70), status(3, 0x71)] {
            assert_eq!(aborted.error(Command::Write, 0, 1), IoError::Aborted, "{aborted}");
            assert_eq!(aborted.error(Command::Read, 0, 1), IoError::Aborted, "{aborted}");
            let flush = aborted.error(Command::Flush, 0, 0);
            assert!(matches!(flush, IoError::FlushFailed { .. }), "{flush}");
        }
        assert_eq!(status(0, 0x0b).error(Command::Read, 0, 1), IoError::Gone);
        assert_eq!(Status(0x0b | 1 << 16).error(Command::Write, 0, 1), IoError::Gone);
        assert!(matches!(status(0, 6).error(Command::Write, 0, 1), IoError::WriteFault { .. }));
        assert!(!Status::ABORTED.is_success() && Status(0).is_success());
    }
}
