//! Into a Hugging Face directory.
//!
//! Workers fill boxes and write them to their place; the calling thread takes finished boxes in file order, for the
//! files' SHA-256, the journal and the progress. Buffers go round between the two, so that memory is bounded and a
//! slow checksum holds the workers back.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use fs_err as fs;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::journal::Journal;
use super::source::{Reader, Scratch, boxes};
use super::{CopyError, CopyOptions, Item, OnProgress, PIECE, Progress, Store, fingerprint, readers};
use crate::commit::{StagedDir, check_space};
use crate::hf::INDEX_FILE;
use crate::manifest::{MANIFEST_FILE, Manifest, ManifestFile, hex};
use crate::orbax::Region;
use crate::write::{HfPlan, PlanOptions, PlannedFile, TensorPlan, check_extra_files};

/// Bytes after which dirty pages are handed to the device, so that the commit has little to wait for.
const FLUSH_EVERY: u64 = 512 << 20;

/// Where and how to write a Hugging Face directory.
#[derive(Debug, Clone)]
pub struct HfTarget {
    /// The directory.
    pub path: PathBuf,
    /// Shard size and metadata.
    pub plan: PlanOptions,
    /// Small files to put beside the weights, such as `config.json`: name and content.
    pub extra_files: Vec<(String, Vec<u8>)>,
    /// Leave out `lapidary_manifest.json`.
    pub no_manifest: bool,
}

/// What a copy into a Hugging Face directory amounts to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HfReport {
    /// The files with their checksums.
    pub manifest: Manifest,
    /// Bytes of tensor data.
    pub data_bytes: u64,
    /// Bytes that an interrupted run had written already.
    pub resumed_bytes: u64,
}

/// One box and its place.
#[derive(Debug)]
struct Piece {
    file: usize,
    offset: u64,
    item: usize,
    region: Region,
    bytes: usize,
    last_of_item: bool,
}

/// Copies items into a new Hugging Face directory. Shards are filled in the order of the items.
///
/// # Errors
/// When items cannot be copied (all are listed), sources are damaged, space is short, or the file system refuses.
pub fn copy_to_hf(
    stores: &[Store<'_>],
    items: &[Item],
    target: &HfTarget,
    options: &CopyOptions,
    progress: OnProgress<'_>,
) -> Result<HfReport, CopyError> {
    let readers = readers(stores, items)?;
    let tensors: Vec<TensorPlan> =
        items.iter().map(|i| TensorPlan { name: i.to.clone(), dtype: i.dtype, shape: i.shape.clone() }).collect();
    let plan = HfPlan::new(&tensors, &target.plan)?;
    let taken: HashSet<&str> = plan.files.iter().map(|f| f.name.as_str()).chain([INDEX_FILE, MANIFEST_FILE]).collect();
    check_extra_files(&target.extra_files, &taken)?;
    let pieces = cut(&plan, items, &readers);
    let mark = mark(stores, items, &plan)?;
    let (mut staged, checksums) = stage(target, options, &mark)?;
    if checksums.is_empty() {
        check_space(&target.path, plan.total_bytes())?;
    }
    if options.keep_partial {
        staged.keep();
    }
    let copy = Copy { dir: staged.path(), plan: &plan, pieces: &pieces, readers: &readers, progress };
    let (manifest, resumed_bytes) = copy.run(options, &mark, &checksums)?;
    let manifest = write_rest(staged.path(), &plan, target, manifest)?;
    Journal::remove(staged.path())?;
    staged.commit()?;
    Ok(HfReport { manifest, data_bytes: plan.data_bytes, resumed_bytes })
}

fn cut(plan: &HfPlan, items: &[Item], readers: &[Reader<'_>]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (file, planned) in plan.files.iter().enumerate() {
        for t in &planned.tensors {
            let (Some(item), Some(reader)) = (items.get(t.index), readers.get(t.index)) else { continue };
            let size = item.dtype.size();
            let mut offset = t.offset;
            boxes(&item.shape, reader.piece_bytes(PIECE) / size, reader.grain(), &mut |region| {
                let bytes = region.elements() * size;
                pieces.push(Piece { file, offset, item: t.index, region, bytes, last_of_item: false });
                offset += bytes as u64;
            });
            if let Some(last) = pieces.last_mut() {
                // A tensor without elements has no box; marking the one before again does no harm.
                last.last_of_item = true;
            }
        }
    }
    pieces
}

/// A text that changes when the bytes of the files or the boxes do.
fn mark(stores: &[Store<'_>], items: &[Item], plan: &HfPlan) -> io::Result<String> {
    let mut hasher = Sha256::new();
    hasher.update(format!("boxes of {PIECE}\n{}\n", fingerprint(stores, items)?));
    for file in &plan.files {
        hasher.update(file.name.as_bytes());
        hasher.update(&file.header);
    }
    Ok(hex(&hasher.finalize()))
}

/// Makes the staging directory; gives what the journal of the same copy says, if it is to be continued.
fn stage(target: &HfTarget, options: &CopyOptions, mark: &str) -> Result<(StagedDir, Vec<u32>), CopyError> {
    if options.resume {
        let (staged, _) = StagedDir::resume(&target.path, options.force)?;
        if let Some(checksums) = Journal::read(staged.path(), mark)? {
            return Ok((staged, checksums));
        }
        // Files of another copy must not end up in this one.
    }
    Ok((StagedDir::create(&target.path, options.force)?, Vec::new()))
}

fn write_rest(dir: &Path, plan: &HfPlan, target: &HfTarget, mut manifest: Manifest) -> io::Result<Manifest> {
    let index = plan.index.iter().map(|text| (INDEX_FILE, text.as_bytes()));
    let extra = target.extra_files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()));
    for (name, bytes) in index.chain(extra) {
        fs::write(dir.join(name), bytes)?;
        manifest.files.push(ManifestFile::of_bytes(name, bytes));
    }
    if !target.no_manifest {
        manifest.write(dir)?;
    }
    Ok(manifest)
}

struct Copy<'c> {
    dir: &'c Path,
    plan: &'c HfPlan,
    pieces: &'c [Piece],
    readers: &'c [Reader<'c>],
    progress: OnProgress<'c>,
}

/// A finished box.
struct Done {
    piece: usize,
    buffer: Vec<u8>,
    crc: u32,
}

impl Copy<'_> {
    fn run(&self, options: &CopyOptions, mark: &str, checksums: &[u32]) -> Result<(Manifest, u64), CopyError> {
        let files = Files::new(self.dir, &self.plan.files);
        let mut order = InOrder::new(self, &files);
        let mut known = Vec::new();
        // Believed is what the disk confirms; the first box that differs is where work begins.
        for (&crc, piece) in checksums.iter().zip(self.pieces) {
            let Some(buffer) = files.read_back(piece)? else { break };
            if crc32c::crc32c(&buffer) != crc {
                break;
            }
            order.take(&buffer)?;
            known.push(crc);
        }
        let resumed = order.done;
        let mut journal = Journal::create(self.dir, mark, &known)?;
        let largest = self.pieces.iter().map(|p| p.bytes).max().unwrap_or(0).max(1);
        let workers = options.workers().min(self.pieces.len().max(1));
        // A worker may use two more buffers of this size for a source that it cannot use in place.
        let buffers = (options.memory / largest).saturating_sub(2 * workers).clamp(workers + 1, 4 * workers + 4);
        let pool = Pool::new(known.len(), buffers);
        let result = thread::scope(|scope| {
            let (sender, finished) = channel();
            for _ in 0..workers {
                let sender = sender.clone();
                scope.spawn(|| self.work(&files, &pool, sender));
            }
            drop(sender);
            let (flush, queue) = sync_channel(1);
            let flusher = scope.spawn(move || flush_all(&queue));
            let result = self.collect(&finished, &pool, &mut order, &mut journal, &flush);
            pool.stop();
            drop(flush);
            let flushed = flusher.join().unwrap_or_else(|_| Err(io::Error::other("the flushing thread ended early")));
            result.and(flushed.map_err(CopyError::from))
        });
        result?;
        Ok((order.finish()?, resumed))
    }

    /// A worker: takes the next box and a free buffer, fills and writes it.
    fn work(&self, files: &Files<'_>, pool: &Pool, sender: Sender<Result<Done, CopyError>>) {
        let _guard = StopOnPanic(pool);
        let mut scratch = Scratch::default();
        while let Some((index, mut buffer)) = pool.take(self.pieces.len()) {
            let Some((piece, reader)) = self.pieces.get(index).and_then(|p| Some((p, self.readers.get(p.item)?)))
            else {
                return;
            };
            buffer.resize(piece.bytes, 0);
            let result = reader.read(&piece.region, &mut buffer, &mut scratch).and_then(|()| {
                files
                    .get(piece.file)?
                    .file()
                    .write_all_at(&buffer, piece.offset)
                    .map_err(|e| files.named(piece, &e))?;
                Ok(Done { piece: index, crc: crc32c::crc32c(&buffer), buffer })
            });
            let failed = result.is_err();
            // The receiver is gone only after a failure, of which it knows.
            if sender.send(result).is_err() || failed {
                pool.stop();
                return;
            }
        }
    }

    /// The calling thread: takes boxes in order.
    fn collect(
        &self,
        finished: &Receiver<Result<Done, CopyError>>,
        pool: &Pool,
        order: &mut InOrder<'_>,
        journal: &mut Journal,
        flush: &SyncSender<Arc<fs::File>>,
    ) -> Result<(), CopyError> {
        let mut early: BTreeMap<usize, Done> = BTreeMap::new();
        let mut since_flush = 0;
        order.report()?;
        while order.next < self.pieces.len() {
            let done = finished.recv().map_err(|_| io::Error::other("a worker thread ended early"))??;
            early.insert(done.piece, done);
            while let Some(done) = early.remove(&order.next) {
                since_flush += done.buffer.len() as u64;
                let file = self.pieces.get(done.piece).map(|p| p.file);
                order.take(&done.buffer)?;
                journal.add(done.crc)?;
                pool.give(done.buffer);
                if let Some(file) = file
                    && since_flush >= FLUSH_EVERY
                    // If the last flush still runs, the next box tries again.
                    && flush.try_send(order.files.get(file)?).is_ok()
                {
                    since_flush = 0;
                }
                order.report()?;
            }
        }
        Ok(())
    }
}

fn flush_all(queue: &Receiver<Arc<fs::File>>) -> io::Result<()> {
    // The first error is kept, because the kernel reports it once; the rest is flushed all the same.
    let mut first = Ok(());
    for file in queue {
        first = first.and(file.sync_data());
    }
    first
}

/// The weights files, opened when first needed.
struct Files<'c> {
    dir: &'c Path,
    planned: &'c [PlannedFile],
    open: Vec<Mutex<Option<Arc<fs::File>>>>,
}

impl<'c> Files<'c> {
    fn new(dir: &'c Path, planned: &'c [PlannedFile]) -> Self {
        Files { dir, planned, open: planned.iter().map(|_| Mutex::new(None)).collect() }
    }

    fn slot(&self, index: usize) -> io::Result<(MutexGuard<'_, Option<Arc<fs::File>>>, &PlannedFile)> {
        let found = self.open.get(index).zip(self.planned.get(index));
        let (slot, planned) = found.ok_or_else(|| io::Error::other("a file outside of the plan"))?;
        Ok((slot.lock().unwrap_or_else(PoisonError::into_inner), planned))
    }

    fn get(&self, index: usize) -> io::Result<Arc<fs::File>> {
        let (mut slot, planned) = self.slot(index)?;
        if let Some(file) = &*slot {
            return Ok(Arc::clone(file));
        }
        let path = self.dir.join(&planned.name);
        let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        file.set_len(planned.bytes)?;
        file.file().write_all_at(&planned.header, 0)?;
        let file = Arc::new(file);
        *slot = Some(Arc::clone(&file));
        Ok(file)
    }

    fn close(&self, index: usize) -> io::Result<()> {
        *self.slot(index)?.0 = None;
        Ok(())
    }

    /// The bytes that lie where a box belongs; `None` if the file is not there or too short.
    fn read_back(&self, piece: &Piece) -> io::Result<Option<Vec<u8>>> {
        let Some(planned) = self.planned.get(piece.file) else { return Ok(None) };
        let path = self.dir.join(&planned.name);
        if !fs::metadata(&path).is_ok_and(|m| m.len() == planned.bytes) {
            return Ok(None);
        }
        let mut buffer = vec![0; piece.bytes];
        self.get(piece.file)?.file().read_exact_at(&mut buffer, piece.offset)?;
        Ok(Some(buffer))
    }

    fn named(&self, piece: &Piece, e: &io::Error) -> io::Error {
        let name = self.planned.get(piece.file).map_or("?", |p| p.name.as_str());
        io::Error::new(e.kind(), format!("cannot write {}: {e}", self.dir.join(name).display()))
    }
}

/// What happens to boxes in file order.
struct InOrder<'c> {
    copy: &'c Copy<'c>,
    files: &'c Files<'c>,
    next: usize,
    done: u64,
    file: usize,
    hasher: Sha256,
    manifest: Manifest,
}

impl<'c> InOrder<'c> {
    fn new(copy: &'c Copy<'c>, files: &'c Files<'c>) -> Self {
        let mut hasher = Sha256::new();
        if let Some(first) = copy.plan.files.first() {
            hasher.update(&first.header);
        }
        InOrder { copy, files, next: 0, done: 0, file: 0, hasher, manifest: Manifest::default() }
    }

    /// The next box, already in its place.
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some(piece) = self.copy.pieces.get(self.next) else { return Ok(()) };
        while self.file < piece.file {
            self.end_file()?;
        }
        self.hasher.update(bytes);
        self.done += bytes.len() as u64;
        self.next += 1;
        if piece.last_of_item
            && let Some(reader) = self.copy.readers.get(piece.item)
        {
            reader.done();
        }
        Ok(())
    }

    fn end_file(&mut self) -> io::Result<()> {
        if let Some(planned) = self.copy.plan.files.get(self.file) {
            // A file of empty tensors has no box that would have created it.
            self.files.get(self.file)?;
            self.files.close(self.file)?;
            let sha256 = hex(&self.hasher.finalize_reset());
            self.manifest.files.push(ManifestFile { name: planned.name.clone(), bytes: planned.bytes, sha256 });
        }
        self.file += 1;
        if let Some(next) = self.copy.plan.files.get(self.file) {
            self.hasher.update(&next.header);
        }
        Ok(())
    }

    fn report(&self) -> Result<(), CopyError> {
        match (self.copy.progress)(Progress { done: self.done, total: self.copy.plan.data_bytes }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(CopyError::Cancelled),
        }
    }

    fn finish(mut self) -> io::Result<Manifest> {
        while self.file < self.copy.plan.files.len() {
            self.end_file()?;
        }
        Ok(self.manifest)
    }
}

/// Hands out boxes in order, each with a buffer. Whoever has the earliest box has a buffer, so the calling thread always
/// gets what it waits for.
struct Pool {
    state: Mutex<PoolState>,
    changed: Condvar,
}

struct PoolState {
    next: usize,
    free: Vec<Vec<u8>>,
    stopped: bool,
}

impl Pool {
    fn new(next: usize, buffers: usize) -> Self {
        let free = (0..buffers).map(|_| Vec::new()).collect();
        Pool { state: Mutex::new(PoolState { next, free, stopped: false }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, end: usize) -> Option<(usize, Vec<u8>)> {
        let mut state = self.lock();
        loop {
            if state.stopped || state.next >= end {
                return None;
            }
            if let Some(buffer) = state.free.pop() {
                let index = state.next;
                state.next += 1;
                return Some((index, buffer));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give(&self, buffer: Vec<u8>) {
        self.lock().free.push(buffer);
        self.changed.notify_one();
    }

    fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }
}

/// Lets the other threads end when one panics, instead of waiting for its box.
struct StopOnPanic<'p>(&'p Pool);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop();
        }
    }
}
