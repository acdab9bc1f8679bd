//! Threads that start work within a fraction of a microsecond.
//!
//! A step of decoding is some hundred products of 20 to 2000 microseconds with little between them. Waking a parked
//! thread takes tens of microseconds, so workers look for the next task for a while before they park. The thread that
//! calls works too, and never waits for a worker that has not started: on a busy machine a task takes as long as the
//! threads that do run need.

use std::cell::UnsafeCell;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Level;

/// How long a worker only looks, without giving way.
const SPIN: Duration = Duration::from_micros(20);
/// How long it goes on looking, giving way to others, before it parks.
const PATIENCE: Duration = Duration::from_millis(3);

/// Most bytes that a waiting thread reads ahead: what stays in the second cache of most processors until it is used.
const READ_AHEAD: usize = 512 << 10;
/// Bytes of a cache line, by which is read ahead.
const LINE: usize = 64;

/// The low half of the state counts workers in the task; this bit says that more may enter; the high half counts tasks.
const OPEN: u64 = 1 << 31;
const ACTIVE: u64 = OPEN - 1;

/// What a task is to the workers: called once by each thread that takes part, with its number.
type Task = *const (dyn Fn(usize) + Sync);

struct Shared {
    state: AtomicU64,
    /// Written by the caller while no worker is in a task and none may enter; read by workers that entered.
    task: UnsafeCell<Option<Task>>,
    sleepers: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// For each thread, what it is expected to read in the next task.
    ahead: Vec<Ahead>,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: the cell is written only by the holder of the dispatch lock while the state lets no worker in, and read only
// by workers the state has let in; entering and leaving are acquire and release operations on the state.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in the cell is used only as above, and what it points at is `Sync`.
unsafe impl Send for Shared {}

/// Threads for [`products`](crate::products). Dropping it ends them.
pub struct Pool {
    shared: Arc<Shared>,
    dispatch: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
    level: Level,
}

/// Memory that a thread will probably read next: streams of so many bytes, each `pitch` bytes behind the one before.
#[derive(Default)]
#[repr(align(64))]
struct Ahead {
    start: AtomicUsize,
    pitch: AtomicUsize,
    streams: AtomicUsize,
    /// Bytes of each stream that are still to be asked for.
    left: AtomicUsize,
}

impl Ahead {
    /// Asks for the next line of each stream. Returns whether there was any.
    fn step(&self) -> bool {
        // Only the thread itself, and a caller that starts a task, write these; a mix of both costs a useless read.
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return false;
        }
        let (start, pitch) = (self.start.load(Ordering::Relaxed), self.pitch.load(Ordering::Relaxed));
        for stream in 0..self.streams.load(Ordering::Relaxed) {
            prefetch(start.wrapping_add(stream.wrapping_mul(pitch)));
        }
        self.start.store(start.wrapping_add(LINE), Ordering::Relaxed);
        self.left.store(left.saturating_sub(LINE), Ordering::Relaxed);
        true
    }
}

/// Asks for a line of memory. There need not be any at that address.
#[cfg(target_arch = "x86_64")]
fn prefetch(address: usize) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: the instruction reads nothing a program can see, and does nothing where there is no memory.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address)) }
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: usize) {}

fn ignore_poison<T>(guard: Result<T, PoisonError<T>>) -> T {
    // The locks guard no data that a panic could leave half-written.
    guard.unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool in which `threads` threads work, the calling one among them; 0 means one for each available core.
    /// Threads that the system refuses to start are done without.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        let threads = match threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            task: UnsafeCell::new(None),
            sleepers: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            ahead: (0..threads).map(|_| Ahead::default()).collect(),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let workers = (1..threads)
            .map_while(|index| {
                let shared = Arc::clone(&shared);
                let builder = thread::Builder::new().name(format!("kernels-{index}"));
                builder.spawn(move || worker(&shared, index)).ok()
            })
            .collect();
        Pool { shared, dispatch: Mutex::new(()), workers, level: Level::detect() }
    }

    /// The same pool, computing with other instructions than the best ones. A level this machine does not have is
    /// not taken.
    #[must_use]
    pub fn with_level(mut self, level: Level) -> Self {
        if Level::available().contains(&level) {
            self.level = level;
        }
        self
    }

    /// The instructions it computes with.
    #[must_use]
    pub fn level(&self) -> Level {
        self.level
    }

    /// Number of threads, the calling one included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Says what a thread will probably read in the task after the next one: some streams, the first at the beginning of
    /// `bytes`, each `pitch` bytes behind the one before. It is read ahead while the thread waits, so that memory does not
    /// rest between tasks.
    pub(crate) fn expect(&self, thread: usize, bytes: &[u8], streams: usize, pitch: usize) {
        let Some(ahead) = self.shared.ahead.get(thread) else { return };
        ahead.start.store(bytes.as_ptr().addr(), Ordering::Relaxed);
        ahead.pitch.store(pitch, Ordering::Relaxed);
        ahead.streams.store(streams, Ordering::Relaxed);
        let limit = READ_AHEAD.min(bytes.len()) / streams.max(1);
        ahead.left.store(limit, Ordering::Relaxed);
    }

    /// Calls `task` once on each thread that is free to take part, the calling one (number 0) in any case. Returns when
    /// all that started have returned. The work must not depend on how many take part.
    ///
    /// # Panics
    /// When the task panics.
    pub fn run(&self, task: &(dyn Fn(usize) + Sync)) {
        let _turn: MutexGuard<'_, ()> = ignore_poison(self.dispatch.lock());
        if self.workers.is_empty() {
            return task(0);
        }
        let shared = &*self.shared;
        // SAFETY: the lifetime is erased, but no worker keeps the task: `Finish` waits for those that have it before
        // this function returns or unwinds.
        let erased: Task = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Task>(task) };
        // SAFETY: this thread has the turn, and the last task was closed and left by all, so that nobody reads the cell.
        unsafe { *shared.task.get() = Some(erased) };
        // A task whose caller panicked too has not asked.
        shared.panicked.store(false, Ordering::Relaxed);
        let number = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        // Sequentially consistent with the sleepers' own order (count, then look): one of the two sees the other.
        shared.state.store(number << 32 | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(ignore_poison(shared.lock.lock()));
            shared.wake.notify_all();
        }
        let finish = Finish(shared);
        task(0);
        drop(finish);
        assert!(!shared.panicked.load(Ordering::Relaxed), "a worker of the pool panicked");
    }
}

/// Closes the task and waits for the workers in it.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0u32;
        while self.0.state.load(Ordering::Acquire) & ACTIVE != 0 {
            if self.0.ahead.first().is_some_and(Ahead::step) {
                continue;
            }
            looks += 1;
            // A worker that takes long has lost its core; it may need this one.
            if looks < 2000 { std::hint::spin_loop() } else { thread::yield_now() }
        }
    }
}

fn worker(shared: &Shared, index: usize) {
    let mut seen = 0;
    while let Some(number) = next_task(shared, seen, index) {
        seen = number;
        let mut state = shared.state.load(Ordering::Acquire);
        let entered = loop {
            if state >> 32 != number || state & OPEN == 0 {
                break false;
            }
            match shared.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => break true,
                Err(now) => state = now,
            }
        };
        if entered {
            let leave = Leave(shared);
            // SAFETY: the state let this worker in, so the caller has written the task and keeps it alive until the
            // worker has left.
            if let Some(task) = unsafe { *shared.task.get() } {
                // SAFETY: as above.
                unsafe { (*task)(index) };
            }
            drop(leave);
        }
    }
}

/// Leaves the task, also when it panics: the caller waits for it.
struct Leave<'a>(&'a Shared);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.panicked.store(true, Ordering::Relaxed);
        }
        self.0.state.fetch_sub(1, Ordering::Release);
    }
}

/// Waits for a task other than `seen`. `None`: the pool ends.
fn next_task(shared: &Shared, seen: u64, index: usize) -> Option<u64> {
    let fresh = |order| {
        let number = shared.state.load(order) >> 32;
        (number != seen).then_some(number)
    };
    while shared.ahead.get(index).is_some_and(Ahead::step) {
        if let Some(number) = fresh(Ordering::Acquire) {
            return Some(number);
        }
    }
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if let Some(number) = fresh(Ordering::Acquire) {
                return Some(number);
            }
            std::hint::spin_loop();
        }
        if shared.stop.load(Ordering::Relaxed) {
            return None;
        }
        match start.elapsed() {
            waited if waited < SPIN => {}
            waited if waited < PATIENCE => thread::yield_now(),
            _ => break,
        }
    }
    shared.sleepers.fetch_add(1, Ordering::SeqCst);
    let mut guard = ignore_poison(shared.lock.lock());
    let number = loop {
        if shared.stop.load(Ordering::Relaxed) {
            break None;
        }
        if let Some(number) = fresh(Ordering::SeqCst) {
            break Some(number);
        }
        guard = ignore_poison(shared.wake.wait(guard));
    };
    drop(guard);
    shared.sleepers.fetch_sub(1, Ordering::SeqCst);
    number
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let _guard = ignore_poison(self.shared.lock.lock());
            self.shared.stop.store(true, Ordering::Relaxed);
        }
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so to its caller.
            let _ = worker.join();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({} threads, {})", self.threads(), self.level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every piece of work is done once, whoever does it.
    fn check(pool: &Pool, pieces: usize) {
        let next = AtomicUsize::new(0);
        let done: Vec<AtomicUsize> = (0..pieces).map(|_| AtomicUsize::new(0)).collect();
        pool.run(&|index| {
            assert!(index < pool.threads());
            loop {
                let piece = next.fetch_add(1, Ordering::Relaxed);
                let Some(count) = done.get(piece) else { break };
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert!(done.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn tasks_in_a_row_and_after_a_rest() {
        for threads in [1, 2, 5] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for _ in 0..500 {
                check(&pool, 7);
            }
            // Long enough that the workers park.
            thread::sleep(PATIENCE * 4);
            check(&pool, 100);
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(3);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..100).for_each(|_| check(&pool, 20)));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.run(&|_| panic!("task"))));
        assert!(caught.is_err());
        // A worker may have ended; the caller still works.
        check(&pool, 10);
    }
}
