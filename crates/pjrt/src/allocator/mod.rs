//! The C allocator's settings for XLA's CPU runtime.

#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub mod large;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod pool;

/// Tells the C allocator to keep large blocks for reuse. To be called at the start of `main`, before other threads run.
///
/// XLA's CPU runtime allocates results and scratch memory anew for each execution. With glibc's settings each large block is
/// mapped from and returned to the kernel, and page faults take most of the time (measured: a bf16 matrix-vector
/// product of 201 MB 123-190 ms without, 20-29 ms with; a transformer layer's step 202 and 150 ms).
///
/// A program with [`export_allocator!`](crate::export_allocator) gets pools for blocks from 512 KiB on: a freed block keeps its pages for the
/// next of its size, huge pages are used where they fit, and the footprint never exceeds what was in use at once.
///
/// Any other gets the nearest that glibc offers: one arena (worker threads' own arenas fall back to mapping above 64 MB), no
/// mapped blocks, no trimming of the heap's top, growth in steps of 64 MB. Freed memory then stays with the process
/// and is fragmented: 0.75 GB grew to 3-4 GB in the worst case seen.
///
/// Does nothing, and returns false, where the allocator is not glibc's.
pub fn tune_allocator() -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: mallopt only stores numbers, under the allocator's own lock.
        let set = |parameter, value| unsafe { libc::mallopt(parameter, value) } == 1;
        // All are tried, whatever becomes of the others.
        let results = match large::activate() {
            true => [
                set(libc::M_ARENA_MAX, 8),
                set(libc::M_MMAP_THRESHOLD, 1 << 20),
                set(libc::M_TRIM_THRESHOLD, 64 << 20),
                set(libc::M_TOP_PAD, 4 << 20),
            ],
            false => [
                set(libc::M_ARENA_MAX, 1),
                set(libc::M_MMAP_MAX, 0),
                set(libc::M_TRIM_THRESHOLD, i32::MAX),
                set(libc::M_TOP_PAD, 64 << 20),
            ],
        };
        results.iter().all(|&r| r)
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    {
        false
    }
}

/// Returns freed memory to the system: what compiling or loading left behind. Takes milliseconds.
pub fn trim_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        large::trim();
        // SAFETY: works on free memory, under the allocator's own lock.
        unsafe { libc::malloc_trim(0) };
    }
}

/// Keeps plugins from writing information and warnings to standard error, which are for those who build them; errors remain. A
/// value the user has set stays. To be called at the start of `main`, before other threads run and before a plugin is loaded.
///
/// Returns whether the setting is in place: see [`set_environment`].
pub fn quiet_plugins() -> bool {
    set_environment(&[("TF_CPP_MIN_LOG_LEVEL", "2")])
}

/// Sets environment variables that plugins read when they are loaded; values that are set already stay. To be called at
/// the start of `main`, before other threads run.
///
/// Returns whether all of them are set now. The environment must not be changed while other threads may read it: where
/// other threads run already, or it cannot be told, nothing is done.
pub fn set_environment(variables: &[(&str, &str)]) -> bool {
    let missing: Vec<_> = variables.iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
    if missing.is_empty() {
        return true;
    }
    let threads = fs_err::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads != 1 {
        return false;
    }
    for (name, value) in missing {
        // SAFETY: this is the only thread, so nobody reads the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
    true
}

#[cfg(test)]
mod tests {
    #[test]
    fn glibc_takes_the_settings() {
        assert_eq!(super::tune_allocator(), cfg!(all(target_os = "linux", target_env = "gnu")));
    }

    #[test]
    fn the_environment_is_left_alone_beside_other_threads() {
        if std::env::var_os("TF_CPP_MIN_LOG_LEVEL").is_some() {
            assert!(super::quiet_plugins());
            return;
        }
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        assert!(!super::quiet_plugins());
        assert!(std::env::var_os("TF_CPP_MIN_LOG_LEVEL").is_none());
        drop(done);
        assert!(other.join().is_ok());
    }
}
