//! The threads that XLA runs a program with, lent to a custom call.

use std::ffi::c_void;
use std::mem::{offset_of, size_of};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::Call;
use crate::sys;

/// Set while tasks may still begin; below it, how many run.
const OPEN: u32 = 1 << 31;

type Task = *const (dyn Fn() + Sync);

struct Shared {
    task: Task,
    state: AtomicU32,
    panicked: AtomicBool,
}

// SAFETY: the task is `Sync`, and called only while the call that lent it waits.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Runs the task unless its caller is done already.
    fn take_part(&self) {
        let enter = |state: u32| (state & OPEN != 0).then_some(state + 1);
        if self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, enter).is_err() {
            return;
        }
        let leave = Leave(&self.state);
        // SAFETY: the caller waits until the state is zero.
        let task = unsafe { &*self.task };
        // Unwinding into C++ would end the process.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(task)).is_err() {
            self.panicked.store(true, Ordering::Relaxed);
        }
        drop(leave);
    }
}

struct Leave<'a>(&'a AtomicU32);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What XLA's threads call; `data` is a count of an [`Arc`].
unsafe extern "C" fn scheduled(data: *mut c_void) {
    // SAFETY: the pointer was made by `Arc::into_raw`, and is given back once.
    let shared = unsafe { Arc::from_raw(data.cast_const().cast::<Shared>()) };
    shared.take_part();
}

/// Keeps new tasks from beginning and waits for those that run.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0u32;
        while self.0.state.load(Ordering::Acquire) != 0 {
            looks += 1;
            if looks < 2000 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

impl Call<'_> {
    /// Calls `task` on this thread, and on those of XLA's threads that are free meanwhile. Returns when all calls have. The work
    /// must not depend on how many there are.
    ///
    /// # Panics
    /// When the task panics.
    pub fn run(&self, task: &(dyn Fn() + Sync)) {
        // SAFETY: the lifetime is erased, but nobody calls the task once `Finish` has been dropped.
        let erased: Task = unsafe { std::mem::transmute::<*const (dyn Fn() + Sync + '_), Task>(task) };
        let shared = Arc::new(Shared { task: erased, state: AtomicU32::new(OPEN), panicked: AtomicBool::new(false) });
        let finish = Finish(&shared);
        for _ in 1..self.threads() {
            if !self.schedule(&shared) {
                break;
            }
        }
        task();
        drop(finish);
        assert!(!shared.panicked.load(Ordering::Relaxed), "a part of the task panicked");
    }

    /// Threads that XLA has for a program, 1 if it does not say.
    fn threads(&self) -> usize {
        let api = self.frame.api;
        // SAFETY: the table starts with its size; the field is read only if it is there.
        let count = unsafe {
            let needed = offset_of!(sys::XLA_FFI_Api, XLA_FFI_ThreadPool_NumThreads) + size_of::<usize>();
            if (*api).struct_size < needed {
                return 1;
            }
            ptr::addr_of!((*api).XLA_FFI_ThreadPool_NumThreads).read()
        };
        let Some(count) = count else { return 1 };
        let mut threads = 1i64;
        let mut a = sys::XLA_FFI_ThreadPool_NumThreads_Args {
            struct_size: size_of::<sys::XLA_FFI_ThreadPool_NumThreads_Args>(),
            ctx: self.frame.ctx,
            num_threads: &mut threads,
            ..Default::default()
        };
        // SAFETY: the context is that of the running call, the number outlives it.
        match self.is_ok(unsafe { count(&mut a) }) {
            true => usize::try_from(threads).unwrap_or(1).clamp(1, 1024),
            false => 1,
        }
    }

    /// Hands the task to one of XLA's threads; whether one took it.
    fn schedule(&self, shared: &Arc<Shared>) -> bool {
        // SAFETY: present, as the number of threads is, which comes after it in the table.
        let Some(schedule) = (unsafe { ptr::addr_of!((*self.frame.api).XLA_FFI_ThreadPool_Schedule).read() }) else {
            return false;
        };
        let data = Arc::into_raw(Arc::clone(shared));
        let mut a = sys::XLA_FFI_ThreadPool_Schedule_Args {
            struct_size: size_of::<sys::XLA_FFI_ThreadPool_Schedule_Args>(),
            ctx: self.frame.ctx,
            task: Some(scheduled),
            data: data.cast_mut().cast(),
            ..Default::default()
        };
        // SAFETY: the context is that of the running call; the data is a count of its own, which the task gives back.
        let taken = self.is_ok(unsafe { schedule(&mut a) });
        if !taken {
            // SAFETY: nobody else has the pointer.
            drop(unsafe { Arc::from_raw(data) });
        }
        taken
    }

    /// Whether there is no error; one is given back.
    fn is_ok(&self, error: *mut sys::XLA_FFI_Error) -> bool {
        if error.is_null() {
            return true;
        }
        let mut a = sys::XLA_FFI_Error_Destroy_Args {
            struct_size: size_of::<sys::XLA_FFI_Error_Destroy_Args>(),
            error,
            ..Default::default()
        };
        // SAFETY: the function has been part of the table since its first version, and the error is ours.
        unsafe {
            if let Some(destroy) = ptr::addr_of!((*self.frame.api).XLA_FFI_Error_Destroy).read() {
                destroy(&mut a);
            }
        }
        false
    }
}
