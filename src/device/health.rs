//! Wear and health of a device, in its own words.

/// The figures of the SMART / Health Information log page that people watch (NVM Express Base Specification 2.0, 5.16.1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Health {
    /// Bits of what the drive warns of; 0 is none.
    pub critical_warning: u8,
    /// Of the controller, in Kelvin.
    pub temperature_kelvin: u16,
    /// Of the spare blocks, in percent.
    pub available_spare_percent: u8,
    /// Estimated life that is used up, in percent; may exceed 100.
    pub used_percent: u8,
    /// Times that power was lost without notice.
    pub unsafe_shutdowns: u64,
    /// Unrecovered errors.
    pub media_errors: u64,
    /// Hours of operation.
    pub power_on_hours: u64,
}

impl Health {
    /// Of the controller, in degrees Celsius. A drive that does not measure says 0 K.
    pub fn temperature_celsius(&self) -> i32 {
        i32::from(self.temperature_kelvin) - 273
    }
}
