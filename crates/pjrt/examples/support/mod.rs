//! What the measuring examples share.

/// Processor time of this process, all threads, in seconds.
pub(crate) fn processor_seconds() -> f64 {
    // SAFETY: the struct is plain numbers, and the call fills it in.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    [usage.ru_utime, usage.ru_stime].iter().map(|t| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6).sum()
}
