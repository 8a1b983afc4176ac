//! Asks the processor to fetch memory that is about to be read.

#![expect(unsafe_code, reason = "an instruction that the language has only as an intrinsic")]

/// Begins to fetch the cache line where a value starts. Nothing waits for it.
#[inline]
pub fn prefetch<T: ?Sized>(value: &T) {
    let at = std::ptr::from_ref(value).cast::<i8>();
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which faults on no address; this one is a reference's.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
