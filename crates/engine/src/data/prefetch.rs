//! A source on a thread of its own, some batches ahead.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::{BatchSource, Cursor, DataError, DataReport, Result, TokenBatch};

/// Runs a source on a thread, some batches ahead of the caller.
///
/// [`Prefetch::cursor`] and [`Prefetch::report`] are those after the last batch handed out, whatever the thread has read
/// since. Dropping it stops the thread.
pub struct Prefetch {
    depth: usize,
    worker: Option<Worker>,
    /// The source, while no thread has it.
    idle: Option<Box<dyn BatchSource>>,
    cursor: Cursor,
    report: DataReport,
}

/// What the thread gives for every batch: it, and how the source stood after it.
type Item = (Result<Option<TokenBatch>>, Cursor, DataReport);

struct Worker {
    items: Receiver<Item>,
    thread: JoinHandle<Box<dyn BatchSource>>,
}

impl std::fmt::Debug for Prefetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prefetch").field("depth", &self.depth).field("cursor", &self.cursor).finish_non_exhaustive()
    }
}

impl Prefetch {
    /// Starts reading `depth` batches ahead (at least one).
    #[must_use]
    pub fn new(source: Box<dyn BatchSource>, depth: usize) -> Self {
        let (cursor, report) = (source.cursor(), source.report());
        let mut prefetch = Prefetch { depth: depth.max(1), worker: None, idle: Some(source), cursor, report };
        prefetch.start();
        prefetch
    }

    /// Hands the source to a thread; without one, it stays and is asked directly.
    fn start(&mut self) {
        let Some(source) = self.idle.take() else { return };
        // The thread itself holds one finished batch while the channel is full.
        let (sender, items) = sync_channel(self.depth - 1);
        // The source goes through a channel, so that it is not lost when no thread can be had.
        let (hand_over, receive) = sync_channel::<Box<dyn BatchSource>>(1);
        let body = move || match receive.recv() {
            Ok(source) => run(source, &sender),
            Err(_) => Box::new(Nothing),
        };
        match std::thread::Builder::new().name("data".to_owned()).spawn(body) {
            Ok(thread) => match hand_over.send(source) {
                Ok(()) => self.worker = Some(Worker { items, thread }),
                Err(returned) => self.idle = Some(returned.0),
            },
            Err(_) => self.idle = Some(source),
        }
    }

    /// Stops the thread and takes the source back.
    fn stop(&mut self) -> Result<()> {
        let Some(Worker { items, thread }) = self.worker.take() else { return Ok(()) };
        drop(items);
        match thread.join() {
            Ok(source) => {
                self.idle = Some(source);
                Ok(())
            }
            Err(panic) => Err(DataError::Thread(panic_message(panic.as_ref()))),
        }
    }
}

/// The body of the thread: reads until the receiver is gone or the stream ends.
fn run(mut source: Box<dyn BatchSource>, sender: &SyncSender<Item>) -> Box<dyn BatchSource> {
    loop {
        let batch = source.next();
        let is_last = !matches!(batch, Ok(Some(_)));
        if sender.send((batch, source.cursor(), source.report())).is_err() || is_last {
            return source;
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
}

impl BatchSource for Prefetch {
    /// After the end or an error the source is asked again, on the caller's thread.
    fn next(&mut self) -> Result<Option<TokenBatch>> {
        if let Some(worker) = &self.worker {
            if let Ok((batch, cursor, report)) = worker.items.recv() {
                (self.cursor, self.report) = (cursor, report);
                return batch;
            }
            self.stop()?;
        }
        let Some(source) = &mut self.idle else {
            return Err(DataError::Thread("it failed before".to_owned()));
        };
        let batch = source.next();
        (self.cursor, self.report) = (source.cursor(), source.report());
        batch
    }

    fn cursor(&self) -> Cursor {
        self.cursor.clone()
    }

    fn restore(&mut self, cursor: &Cursor) -> Result<()> {
        self.stop()?;
        let Some(source) = &mut self.idle else {
            return Err(DataError::Thread("it failed before".to_owned()));
        };
        // A source that refuses stands where the thread left it: it is sent back to where the caller believes it is.
        let result = source.restore(cursor).or_else(|error| source.restore(&self.cursor).and(Err(error)));
        (self.cursor, self.report) = (source.cursor(), source.report());
        self.start();
        result
    }

    fn report(&self) -> DataReport {
        self.report.clone()
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        // A panic of the thread was or would have been reported by `next`; there is nobody left to tell.
        let _ = self.stop();
    }
}

/// Stands in for a source that was never handed over.
struct Nothing;

impl BatchSource for Nothing {
    fn next(&mut self) -> Result<Option<TokenBatch>> {
        Ok(None)
    }

    fn cursor(&self) -> Cursor {
        Cursor { batches: 0, stream: super::cursor::Stream::Synthetic }
    }

    fn restore(&mut self, cursor: &Cursor) -> Result<()> {
        Err(cursor.foreign("nothing"))
    }

    fn report(&self) -> DataReport {
        DataReport::default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::data::FixedBatches;

    fn fixed(steps: usize) -> FixedBatches {
        FixedBatches::new((0..steps as i32 * 4).collect(), steps, 2, 2).unwrap()
    }

    #[test]
    fn batches_and_cursors_are_those_of_the_source() {
        for depth in [0, 1, 3, 20] {
            let mut plain = fixed(6);
            let mut ahead = Prefetch::new(Box::new(fixed(6)), depth);
            assert_eq!(ahead.cursor(), plain.cursor());
            loop {
                let batch = plain.next().unwrap();
                assert_eq!(ahead.next().unwrap(), batch);
                assert_eq!(ahead.cursor(), plain.cursor());
                assert_eq!(ahead.report(), plain.report());
                if batch.is_none() {
                    break;
                }
            }
            assert_eq!(ahead.next().unwrap(), None);
        }
    }

    #[test]
    fn restoring_goes_back_and_forth() {
        let mut ahead = Prefetch::new(Box::new(fixed(6)), 2);
        let start = ahead.cursor();
        let first = ahead.next().unwrap();
        let second = ahead.next().unwrap();
        let later = ahead.cursor();
        ahead.restore(&start).unwrap();
        assert_eq!(ahead.next().unwrap(), first);
        ahead.restore(&later).unwrap();
        assert_eq!(ahead.cursor(), later);
        let third = ahead.next().unwrap();
        assert_ne!(third, second);
        // A refused cursor leaves everything as it was.
        let foreign = Cursor { batches: 0, stream: super::super::cursor::Stream::Synthetic };
        let here = ahead.cursor();
        assert!(ahead.restore(&foreign).is_err());
        assert_eq!(ahead.cursor(), here);
        ahead.restore(&later).unwrap();
        assert_eq!(ahead.next().unwrap(), third);
    }

    /// Counts the batches it gave, and panics at one of them.
    struct Counting(Arc<AtomicUsize>, usize);

    impl BatchSource for Counting {
        fn next(&mut self) -> Result<Option<TokenBatch>> {
            let count = self.0.fetch_add(1, Ordering::SeqCst);
            assert!(count != self.1, "on purpose");
            Ok(Some(TokenBatch::empty(1, 1)))
        }

        fn cursor(&self) -> Cursor {
            Nothing.cursor()
        }

        fn restore(&mut self, _: &Cursor) -> Result<()> {
            Ok(())
        }

        fn report(&self) -> DataReport {
            DataReport::default()
        }
    }

    #[test]
    fn reads_no_further_than_asked_and_stops_when_dropped() {
        let count = Arc::new(AtomicUsize::new(0));
        let ahead = Prefetch::new(Box::new(Counting(count.clone(), usize::MAX)), 3);
        let began = Instant::now();
        while count.load(Ordering::SeqCst) < 3 && began.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(count.load(Ordering::SeqCst), 3);
        drop(ahead);
        // The thread is gone and with it its hold on the counter.
        assert_eq!(Arc::strong_count(&count), 1);
    }

    #[test]
    fn a_panic_becomes_an_error() {
        let mut ahead = Prefetch::new(Box::new(Counting(Arc::default(), 1)), 1);
        assert!(ahead.next().unwrap().is_some());
        let error = ahead.next().unwrap_err().to_string();
        assert!(error.contains("on purpose"), "{error}");
        assert!(ahead.next().is_err());
        assert!(ahead.restore(&Nothing.cursor()).is_err());
    }
}
