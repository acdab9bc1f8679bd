//! Tasks that threads take one after the other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Calls the function it is given on as many threads as it likes, at least once, and returns when all calls have.
pub type Run<'a> = &'a dyn Fn(&(dyn Fn() + Sync));

/// Does every task of `0..n` once. Each thread makes a room to work in when it first has a task.
pub(crate) fn each<R>(run: Run<'_>, n: usize, room: impl Fn() -> R + Sync, task: impl Fn(&mut R, usize) + Sync) {
    let next = AtomicUsize::new(0);
    run(&|| {
        let mut own = None;
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                break;
            }
            task(own.get_or_insert_with(&room), i);
        }
    });
}

/// Does the task for every item once, such as for parts of arrays that are written to. Rooms are as those of [`each`].
pub(crate) fn each_of<I: Send, R>(
    run: Run<'_>,
    items: impl Iterator<Item = I> + Send,
    room: impl Fn() -> R + Sync,
    task: impl Fn(&mut R, I) + Sync,
) {
    let items = Mutex::new(items);
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    run(&|| {
        let mut own = None;
        while let Some(item) = next() {
            task(own.get_or_insert_with(&room), item);
        }
    });
}
