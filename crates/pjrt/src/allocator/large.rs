//! Large blocks of the C allocator, from pools of their own.
//!
//! [`export_allocator!`](crate::export_allocator) defines the C allocator's entry points in a program; the plugin, which is a
//! shared library, then calls these too. Until `activate` succeeds, and for small blocks always, they hand on to glibc.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::pool::{Found, Pool};

/// Blocks from this size on come from a pool.
const LARGE: usize = 512 << 10;
/// What the system maps at once where it is asked to.
const HUGE: usize = 2 << 20;
const PAGE: usize = 4096;
/// Blocks that are not worth huge pages.
const SMALL_GRAIN: usize = 64 << 10;

/// A pool and the addresses it hands out; both are set once, by [`activate`].
struct Region {
    start: AtomicUsize,
    end: AtomicUsize,
    pool: Mutex<Option<Pool>>,
}

impl Region {
    const fn new() -> Self {
        Region { start: AtomicUsize::new(0), end: AtomicUsize::new(0), pool: Mutex::new(None) }
    }

    fn contains(&self, address: usize) -> bool {
        // An address of ours is known to its owner only after both were stored.
        (self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed)).contains(&address)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Pool>> {
        // Nothing here panics half-way through a change.
        self.pool.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn allocate(&self, len: usize) -> Option<Found> {
        let mut pool = self.lock();
        let found = pool.as_mut()?.allocate(len)?;
        found.release.iter().cloned().for_each(give_back);
        Some(found)
    }

    /// Whether the address is a block of this region, which is free now.
    fn free(&self, address: usize) -> bool {
        // Pages go back under the lock: their addresses may be handed out as soon as it is free.
        match self.lock().as_mut().map(|p| p.free(address)) {
            Some(Ok(ranges)) => {
                ranges.into_iter().for_each(give_back);
                true
            }
            _ => false,
        }
    }

    fn reserve(&self, len: usize, grain: usize, huge: bool) -> bool {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the system's choice touches no other memory.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return false;
        }
        let start = (at as usize).next_multiple_of(grain);
        let end = at as usize + len;
        if huge {
            // SAFETY: the range was just mapped; the advice changes no contents. Where it is not followed, time is lost.
            unsafe { libc::madvise(start as *mut c_void, end - start, libc::MADV_HUGEPAGE) };
        }
        *self.lock() = Some(Pool::new(start..end, grain, PAGE));
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Release);
        true
    }
}

/// Blocks that fill huge pages but for a small rest.
static WITH_HUGE_PAGES: Region = Region::new();
static WITHOUT: Region = Region::new();

fn give_back(range: std::ops::Range<usize>) {
    // SAFETY: the range is ours and belongs to no block; its contents are of no use to anybody.
    unsafe { libc::madvise(range.start as *mut c_void, range.len(), libc::MADV_DONTNEED) };
}

/// Reserves address space for the pools: four times the machine's memory each. From then on large blocks come from them.
/// False where the system refuses, or no entry points were exported (nothing would ever come from them).
pub(super) fn activate() -> bool {
    if !is_exported() {
        return false;
    }
    if WITHOUT.end.load(Ordering::Relaxed) != 0 {
        return true;
    }
    // SAFETY: sysconf only answers.
    let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    let Ok(pages) = usize::try_from(pages) else { return false };
    let len = pages.saturating_mul(PAGE).saturating_mul(4).next_multiple_of(HUGE);
    WITH_HUGE_PAGES.reserve(len, HUGE, true) && WITHOUT.reserve(len, SMALL_GRAIN, false)
}

/// Gives the pages of all free blocks back to the system.
pub(super) fn trim() {
    for region in [&WITH_HUGE_PAGES, &WITHOUT] {
        if let Some(pool) = region.lock().as_mut() {
            pool.release_all().into_iter().for_each(give_back);
        }
    }
}

/// A large block, aligned to a page, or null: then glibc is to be asked.
fn large(len: usize) -> Option<Found> {
    if len < LARGE {
        return None;
    }
    let region = match len.checked_next_multiple_of(HUGE)? - len <= len / 16 {
        true => &WITH_HUGE_PAGES,
        false => &WITHOUT,
    };
    if region.end.load(Ordering::Acquire) == 0 {
        return None;
    }
    region.allocate(len)
}

fn owner(address: usize) -> Option<&'static Region> {
    [&WITH_HUGE_PAGES, &WITHOUT].into_iter().find(|r| r.contains(address))
}

unsafe extern "C" {
    fn __libc_malloc(size: usize) -> *mut c_void;
    fn __libc_calloc(n: usize, size: usize) -> *mut c_void;
    fn __libc_realloc(block: *mut c_void, size: usize) -> *mut c_void;
    fn __libc_memalign(alignment: usize, size: usize) -> *mut c_void;
    fn __libc_free(block: *mut c_void);
}

/// The C function of this name.
pub fn malloc(size: usize) -> *mut c_void {
    match large(size) {
        Some(found) => found.address as *mut c_void,
        // SAFETY: as the caller's call.
        None => unsafe { __libc_malloc(size) },
    }
}

/// The C function of this name.
pub fn calloc(n: usize, size: usize) -> *mut c_void {
    match n.checked_mul(size).and_then(|len| Some((large(len)?, len))) {
        Some((found, len)) => {
            let block = found.address as *mut c_void;
            if !found.zero {
                // SAFETY: the block has `len` bytes and belongs to the caller alone.
                unsafe { ptr::write_bytes(block.cast::<u8>(), 0, len) };
            }
            block
        }
        // SAFETY: as the caller's call.
        None => unsafe { __libc_calloc(n, size) },
    }
}

/// The C function of this name.
///
/// # Safety
/// As there.
pub unsafe fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
    let Some(region) = owner(block as usize) else {
        // SAFETY: not ours, so glibc's (or null).
        return unsafe { __libc_realloc(block, size) };
    };
    let have = region.lock().as_ref().and_then(|p| p.size(block as usize)).unwrap_or(0);
    if size <= have && size >= have / 2 {
        return block;
    }
    let new = malloc(size);
    if !new.is_null() {
        // SAFETY: both blocks are at least that long, and different.
        unsafe { ptr::copy_nonoverlapping(block.cast::<u8>(), new.cast::<u8>(), have.min(size)) };
        region.free(block as usize);
    }
    new
}

/// The C functions `memalign` and `aligned_alloc`.
pub fn memalign(alignment: usize, size: usize) -> *mut c_void {
    match if alignment <= PAGE { large(size) } else { None } {
        Some(found) => found.address as *mut c_void,
        // SAFETY: as the caller's call.
        None => unsafe { __libc_memalign(alignment, size) },
    }
}

/// The C function of this name.
///
/// # Safety
/// As there.
pub unsafe fn posix_memalign(out: *mut *mut c_void, alignment: usize, size: usize) -> c_int {
    if !alignment.is_power_of_two() || !alignment.is_multiple_of(size_of::<*mut c_void>()) {
        return libc::EINVAL;
    }
    let block = memalign(alignment, size);
    if block.is_null() {
        return libc::ENOMEM;
    }
    // SAFETY: the caller gives a place for the result.
    unsafe { *out = block };
    0
}

/// The C function of this name.
///
/// # Safety
/// As there.
pub unsafe fn free(block: *mut c_void) {
    match owner(block as usize) {
        Some(region) => {
            // A block freed twice is left alone, where glibc would end the process.
            region.free(block as usize);
        }
        // SAFETY: not ours, so glibc's (or null).
        None => unsafe { __libc_free(block) },
    }
}

/// The C function of this name.
///
/// # Safety
/// As there.
pub unsafe fn malloc_usable_size(block: *mut c_void) -> usize {
    if let Some(region) = owner(block as usize) {
        return region.lock().as_ref().and_then(|p| p.size(block as usize)).unwrap_or(0);
    }
    // SAFETY: dlsym looks a name up.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, c"malloc_usable_size".as_ptr()) };
    if next.is_null() {
        return 0;
    }
    // SAFETY: the C library's function of this name has this type; the block is not ours, so glibc's (or null).
    unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void) -> usize>(next)(block) }
}

/// Whether the program's entry points are the ones that the whole process uses.
fn is_exported() -> bool {
    // SAFETY: dlsym looks names up.
    let (free, glibc) = unsafe {
        (libc::dlsym(libc::RTLD_DEFAULT, c"free".as_ptr()), libc::dlsym(libc::RTLD_DEFAULT, c"__libc_free".as_ptr()))
    };
    !free.is_null() && !glibc.is_null() && free != glibc
}

/// Defines the C allocator's entry points in a program, so that [`tune_allocator`](crate::tune_allocator) can keep large blocks
/// for reuse. The program must be linked with `--export-dynamic-symbol` for each of them.
///
/// Linux with glibc only; elsewhere it defines nothing.
#[macro_export]
macro_rules! export_allocator {
    () => {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        mod exported_allocator {
            #![allow(unsafe_code, unreachable_pub, clippy::undocumented_unsafe_blocks)]
            use ::std::ffi::{c_int, c_void};
            use $crate::allocator_entry as entry;

            // SAFETY of all: they do what the C library's functions of the same names do.
            #[unsafe(no_mangle)]
            pub extern "C" fn malloc(size: usize) -> *mut c_void {
                entry::malloc(size)
            }
            #[unsafe(no_mangle)]
            pub extern "C" fn calloc(n: usize, size: usize) -> *mut c_void {
                entry::calloc(n, size)
            }
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn realloc(block: *mut c_void, size: usize) -> *mut c_void {
                unsafe { entry::realloc(block, size) }
            }
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn reallocarray(block: *mut c_void, n: usize, size: usize) -> *mut c_void {
                match n.checked_mul(size) {
                    Some(len) => unsafe { entry::realloc(block, len) },
                    None => ::std::ptr::null_mut(),
                }
            }
            #[unsafe(no_mangle)]
            pub extern "C" fn memalign(alignment: usize, size: usize) -> *mut c_void {
                entry::memalign(alignment, size)
            }
            #[unsafe(no_mangle)]
            pub extern "C" fn aligned_alloc(alignment: usize, size: usize) -> *mut c_void {
                entry::memalign(alignment, size)
            }
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn posix_memalign(out: *mut *mut c_void, alignment: usize, size: usize) -> c_int {
                unsafe { entry::posix_memalign(out, alignment, size) }
            }
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn malloc_usable_size(block: *mut c_void) -> usize {
                unsafe { entry::malloc_usable_size(block) }
            }
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn free(block: *mut c_void) {
                unsafe { entry::free(block) }
            }
        }
    };
}
