//! Writing a checkpoint chunk by chunk, from any number of threads.
//!
//! A plan fixes beforehand where every byte goes, so the result does not depend on the order in which threads finish, and
//! a run that was interrupted can be continued. Chunks are streamed: nothing but small buffers is held in memory. All of it
//! happens in a staging directory that becomes visible under its final name in one step at the end.

mod error;
mod finish;
mod journal;
mod plan;
mod sink;

use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use fs_err as fs;
use sha2::{Digest, Sha256};

pub use error::OrbaxWriteError;
pub use plan::{
    ArrayPlan, Layout, LinkedChunk, LinkedFile, OrbaxOptions, OrbaxPlan, Source, Target, ZarrVersion, dotted,
};

use self::journal::{JOURNAL, Journal, Record};
use self::plan::{Arrangement, INLINE, Place, Resolved, arrange, data_file};
use self::sink::Sink;
use super::checksums::{CHECKSUMS, Checksums};
use super::leaf::blocks;
use super::ocdbt::{DataFile, Location, Value as Stored};
use super::region::{Layout as Strides, Region, copy};
use super::tree::{CHECKPOINT_METADATA, COMMIT, METADATA, TreeLeaf, TreeMetadata};
use super::zarr::{ArrayMeta, BytesCodec};
use crate::commit::StagedDir;

/// A chunk that is done.
#[derive(Debug, Clone)]
struct Done {
    length: u64,
    crc: u32,
    inline: Option<Vec<u8>>,
}

/// What a finished write amounts to.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct WriteReport {
    /// The directory that holds the arrays.
    pub items: PathBuf,
    /// Bytes of elements.
    pub array_bytes: u64,
    /// Bytes of chunks as stored, without linked ones.
    pub stored_bytes: u64,
    /// Number of arrays.
    pub arrays: usize,
    /// Number of chunks.
    pub chunks: usize,
}

/// A checkpoint being written. Methods take `&self`; threads may write different chunks at the same time.
///
/// Dropping it without [`finish`](OrbaxWriter::finish) leaves nothing, unless [`keep`](OrbaxWriter::keep) was called.
#[derive(Debug)]
pub struct OrbaxWriter {
    plan: OrbaxPlan,
    options: OrbaxOptions,
    target: Target,
    arrangement: Arrangement,
    staged: StagedDir,
    items: PathBuf,
    files: Vec<OnceLock<Arc<fs::File>>>,
    /// Chunks of each data file that are not done.
    pending: Vec<AtomicUsize>,
    done: Mutex<Vec<Vec<Option<Done>>>>,
    journal: Journal,
    flusher: Flusher,
}

impl OrbaxWriter {
    /// Prepares a write: checks the plan, makes the staging directory, and takes over what an interrupted run of the
    /// same plan left, if the options say so.
    ///
    /// # Errors
    /// When the plan cannot be carried out, something lies at the destination, or the file system refuses.
    pub fn create(target: Target, plan: OrbaxPlan, options: OrbaxOptions) -> Result<Self, OrbaxWriteError> {
        let arrangement = arrange(&plan, &options)?;
        let destination = match &target {
            Target::Step { base, step } => base.join(step.to_string()),
            Target::Items(path) => path.clone(),
        };
        let items_of = |staged: &StagedDir| match &target {
            Target::Step { .. } => staged.path().join("items"),
            Target::Items(_) => staged.path().to_owned(),
        };
        let fingerprint = fingerprint(&arrangement, &options);
        let mut staged = if options.resume {
            StagedDir::resume(&destination, options.force)?.0
        } else {
            StagedDir::create(&destination, options.force)?
        };
        if options.resume && !Journal::is_of(&items_of(&staged), &fingerprint)? {
            // Files of another plan must not end up in this checkpoint.
            drop(staged);
            staged = StagedDir::create(&destination, options.force)?;
        }
        let items = items_of(&staged);
        fs::create_dir_all(if options.layout == Layout::Ocdbt { items.join("d") } else { items.clone() })?;
        let (journal, records) = Journal::open(&items, &fingerprint)?;
        let mut counts = vec![0; arrangement.files.len()];
        for place in arrangement.arrays.iter().flat_map(|a| &a.places) {
            if let Place::Range { file, .. } = place {
                counts[*file] += 1;
            }
        }
        let writer = OrbaxWriter {
            files: arrangement.files.iter().map(|_| OnceLock::new()).collect(),
            pending: counts.into_iter().map(AtomicUsize::new).collect(),
            done: Mutex::new(arrangement.arrays.iter().map(|a| vec![None; a.places.len()]).collect()),
            flusher: Flusher::start(),
            plan,
            options,
            target,
            arrangement,
            staged,
            items,
            journal,
        };
        for link in &writer.plan.links {
            let why = |e: io::Error| OrbaxWriteError::Link { path: link.target.clone(), why: e.to_string() };
            if !DataFile::new(&link.name).is_safe() {
                let why = format!("{:?} is no path inside of it", link.name);
                return Err(OrbaxWriteError::Link { path: link.target.clone(), why });
            }
            finish::link(&writer.items, link).map_err(why)?;
        }
        writer.write_known()?;
        for record in records {
            writer.take_over(&record)?;
        }
        Ok(writer)
    }

    /// Keeps what was written when this value is dropped unfinished, so that a later run can continue.
    pub fn keep(&mut self) {
        self.staged.keep();
    }

    /// The staging directory.
    #[must_use]
    pub fn staging(&self) -> &Path {
        self.staged.path()
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &OrbaxPlan {
        &self.plan
    }

    /// Bytes that will be on disk if nothing is compressed, without what is linked.
    #[must_use]
    pub fn planned_bytes(&self) -> u64 {
        let arrays = self.plan.arrays.iter().zip(&self.arrangement.arrays);
        arrays
            .filter(|(p, _)| !matches!(p.source, Source::Linked { .. }))
            .map(|(_, a)| (a.chunk_bytes as u64 + 4).saturating_mul(a.places.len() as u64))
            .fold(0, u64::saturating_add)
    }

    /// Number of chunks of an array, by its position in the plan.
    #[must_use]
    pub fn chunk_count(&self, array: usize) -> usize {
        self.arrangement.arrays[array].places.len()
    }

    /// The part of an array that a chunk covers, without padding.
    #[must_use]
    pub fn chunk_region(&self, array: usize, number: usize) -> Region {
        let a = &self.arrangement.arrays[array];
        a.meta.chunk_region(&a.index(number))
    }

    /// Whether a chunk needs no writing: done, known, linked, or left by an interrupted run.
    #[must_use]
    pub fn is_done(&self, array: usize, number: usize) -> bool {
        matches!(self.arrangement.arrays[array].places[number], Place::Linked(_))
            || self.lock()[array][number].is_some()
    }

    /// Starts a chunk. Its elements are pushed row-major and little-endian; where it reaches beyond the array, padding
    /// is pushed too.
    ///
    /// # Errors
    /// When the chunk is done already, or the file system refuses.
    pub fn begin(&self, array: usize, number: usize) -> Result<ChunkWriter<'_>, OrbaxWriteError> {
        let a = &self.arrangement.arrays[array];
        if self.is_done(array, number) {
            return Err(self.wrong(array, number, "was written already"));
        }
        let sink = match &a.places[number] {
            Place::Range { file, offset } => Sink::range(self.file(*file)?, *offset),
            Place::Own(path) => {
                let limit = if self.options.layout == Layout::Files { 0 } else { INLINE };
                Sink::own(self.items.join(path), limit)
            }
            Place::Inline | Place::Linked(_) => Sink::memory(),
        };
        let level = a.meta.codecs.bytes.iter().find_map(|c| match c {
            BytesCodec::Zstd { level, checksum } => Some((*level, *checksum)),
            BytesCodec::Crc32c => None,
        });
        let encoder = match level {
            None => Encoder::Raw(sink),
            Some((level, checksum)) => Encoder::Zstd(Box::new(
                compressor(sink, level, checksum, a)
                    .map_err(|source| OrbaxWriteError::Compress { array: a.name.clone(), source })?,
            )),
        };
        Ok(ChunkWriter { writer: self, array, number, encoder, left: a.chunk_bytes })
    }

    /// Writes all chunks of an array that are not done from its elements, row-major and little-endian.
    ///
    /// # Errors
    /// When `bytes` does not fill the array, or the file system refuses.
    pub fn write_array(&self, array: usize, bytes: &[u8]) -> Result<(), OrbaxWriteError> {
        let a = &self.arrangement.arrays[array];
        let wanted = a.meta.shape.elements() * a.meta.dtype.size();
        if bytes.len() != wanted {
            let why = format!("{} bytes are given and {wanted} needed", bytes.len());
            return Err(OrbaxWriteError::Plan { array: a.name.clone(), why });
        }
        for number in 0..a.places.len() {
            if !self.is_done(array, number) {
                self.write_chunk(array, number, bytes)?;
            }
        }
        Ok(())
    }

    fn write_chunk(&self, array: usize, number: usize, bytes: &[u8]) -> Result<(), OrbaxWriteError> {
        let meta = &self.arrangement.arrays[array].meta;
        let size = meta.dtype.size();
        let region = meta.chunk_region(&self.arrangement.arrays[array].index(number));
        let mut chunk = self.begin(array, number)?;
        let mut scratch = Vec::new();
        blocks(&meta.chunk_shape, (1 << 20) / size, &mut |origin, shape| {
            if shape.is_empty() {
                return chunk.push(bytes);
            }
            scratch.clear();
            scratch.resize(shape.iter().product::<usize>() * size, 0);
            let start = region.origin.iter().zip(origin).map(|(a, b)| a + b).collect();
            let block = Region { origin: start, shape: shape.to_vec() };
            if let Some(part) = block.intersection(&region) {
                let relative: Vec<usize> = part.origin.iter().zip(&block.origin).map(|(a, b)| a - b).collect();
                let (to, from) = (Strides::dense(shape, &relative), Strides::dense(&meta.shape, &part.origin));
                copy(&mut scratch, &to, bytes, &from, &part.shape, size);
            }
            chunk.push(&scratch)
        })?;
        chunk.finish()
    }

    /// Writes every chunk that is not done: `fill` gets the array's position in the plan, the part of it to push, and where
    /// to push it. `threads` of them run at a time, in plan order.
    ///
    /// # Errors
    /// The first error of `fill` or of the file system; the other threads stop after their chunk.
    pub fn write_all<E: From<OrbaxWriteError> + Send>(
        &self,
        threads: usize,
        fill: impl Fn(usize, &Region, &mut ChunkWriter<'_>) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let work: Vec<(usize, usize)> = (0..self.plan.arrays.len())
            .flat_map(|a| (0..self.chunk_count(a)).map(move |c| (a, c)))
            .filter(|&(a, c)| !self.is_done(a, c))
            .collect();
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let failed: Mutex<Option<E>> = Mutex::new(None);
        thread::scope(|scope| {
            for _ in 0..threads.clamp(1, work.len().max(1)) {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed)
                        && let Some(&(array, number)) = work.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        let region = self.chunk_region(array, number);
                        let result = self.begin(array, number).map_err(E::from).and_then(|mut chunk| {
                            fill(array, &region, &mut chunk)?;
                            Ok(chunk.finish()?)
                        });
                        if let Err(e) = result {
                            stop.store(true, Ordering::Relaxed);
                            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                        }
                    }
                });
            }
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Writes the tree and all metadata, flushes everything and makes the checkpoint visible.
    ///
    /// # Errors
    /// When a chunk was never written, something appeared at the destination, or the file system refuses.
    pub fn finish(mut self) -> Result<WriteReport, OrbaxWriteError> {
        let done = std::mem::take(&mut *self.lock());
        for (array, chunks) in done.iter().enumerate() {
            for (number, chunk) in chunks.iter().enumerate() {
                if chunk.is_none() && !matches!(self.arrangement.arrays[array].places[number], Place::Linked(_)) {
                    return Err(self.wrong(array, number, "was never written"));
                }
            }
        }
        self.flusher.finish()?;
        let time = self.options.time.unwrap_or_else(now);
        let mut sums = Checksums::default();
        match self.options.layout {
            Layout::Ocdbt => self.write_store(&done, time, &mut sums)?,
            Layout::Files => self.write_files(&done, &mut sums)?,
        }
        finish::put(&self.items, METADATA, &self.tree().to_json(), &mut sums)?;
        let own = finish::checkpoint_metadata(&self.options, time, false);
        finish::put(&self.items, CHECKPOINT_METADATA, &own, &mut sums)?;
        let target = self.staged.target().to_owned();
        let (final_items, is_step) = match &self.target {
            Target::Step { .. } => (target.join("items"), true),
            Target::Items(_) => (target.clone(), false),
        };
        let commit = |p: &Path| format!("Checkpoint commit was successful to {}", p.display()).into_bytes();
        finish::put(&self.items, COMMIT, &commit(&final_items), &mut sums)?;
        fs::write(self.items.join(CHECKSUMS), sums.to_json())?;
        if is_step {
            let step = finish::checkpoint_metadata(&self.options, time, true);
            fs::write(self.staged.path().join(CHECKPOINT_METADATA), step)?;
            fs::write(self.staged.path().join(COMMIT), commit(&target))?;
        }
        fs::remove_file(self.items.join(JOURNAL))?;
        let report = WriteReport {
            items: final_items,
            array_bytes: (self.arrangement.arrays.iter())
                .map(|a| a.meta.shape.elements() as u64 * a.meta.dtype.size() as u64)
                .sum(),
            stored_bytes: done.iter().flatten().flatten().map(|d| d.length).sum(),
            arrays: done.len(),
            chunks: done.iter().map(Vec::len).sum(),
        };
        self.staged.commit()?;
        Ok(report)
    }

    fn write_store(&self, done: &[Vec<Option<Done>>], time: u64, sums: &mut Checksums) -> Result<(), OrbaxWriteError> {
        let mut entries: Vec<(Vec<u8>, Stored)> = Vec::new();
        let at =
            |file: String, offset, length| Stored::Indirect(Location { file: DataFile::new(file), offset, length });
        for (a, chunks) in self.arrangement.arrays.iter().zip(done) {
            entries.push((format!("{}/{}", a.name, a.meta.metadata_key()).into_bytes(), Stored::Inline(json(a)?)));
            for (number, (place, chunk)) in a.places.iter().zip(chunks).enumerate() {
                let length = chunk.as_ref().map_or(a.chunk_bytes as u64, |c| c.length);
                let value = match (place, chunk.as_ref().and_then(|c| c.inline.clone())) {
                    (_, Some(bytes)) => Stored::Inline(bytes),
                    (Place::Range { file, offset }, None) => at(data_file(*file), *offset, length),
                    (Place::Linked(l), None) => at(self.plan.links[l.file].name.clone(), l.offset, length),
                    (Place::Own(path), None) => at(path.clone(), 0, length),
                    (Place::Inline, None) => Stored::Inline(vec![]),
                };
                entries.push((format!("{}/{}", a.name, a.meta.chunk_key(&a.index(number))).into_bytes(), value));
            }
        }
        if entries.is_empty() {
            return Err(OrbaxWriteError::Plan { array: "(none)".into(), why: "the plan has no arrays".into() });
        }
        Ok(finish::store(&self.items, entries, time, sums)?)
    }

    fn write_files(&self, done: &[Vec<Option<Done>>], sums: &mut Checksums) -> Result<(), OrbaxWriteError> {
        for (a, chunks) in self.arrangement.arrays.iter().zip(done) {
            finish::put(&self.items, &format!("{}/{}", a.name, a.meta.metadata_key()), &json(a)?, sums)?;
            for (place, chunk) in a.places.iter().zip(chunks) {
                if let (Place::Own(path), Some(c)) = (place, chunk) {
                    sums.insert(path.clone(), c.length, c.crc);
                }
            }
        }
        Ok(())
    }

    fn tree(&self) -> TreeMetadata {
        let arrays = self.plan.arrays.iter().map(|a| (a.path.clone(), a.value_type, false));
        let empty = self.plan.empty.iter().map(|(path, kind)| (path.clone(), *kind, true));
        TreeMetadata {
            leaves: arrays
                .chain(empty)
                .map(|(path, kind, empty)| TreeLeaf { path, value_type: kind.to_owned(), empty })
                .collect(),
            use_ocdbt: Some(self.options.layout == Layout::Ocdbt),
            use_zarr3: Some(self.options.zarr == ZarrVersion::V3),
        }
    }

    fn write_known(&self) -> Result<(), OrbaxWriteError> {
        for (i, a) in self.plan.arrays.iter().enumerate() {
            if let Source::Bytes(bytes) = &a.source {
                self.write_array(i, bytes)?;
            }
        }
        Ok(())
    }

    /// Believes a record of an interrupted run if the bytes are as it says.
    fn take_over(&self, r: &Record) -> Result<(), OrbaxWriteError> {
        let Some(place) = self.arrangement.arrays.get(r.array).and_then(|a| a.places.get(r.number)) else {
            return Ok(());
        };
        if self.is_done(r.array, r.number) {
            return Ok(());
        }
        let (path, offset, whole) = match place {
            Place::Range { file, offset } => (data_file(*file), *offset, false),
            Place::Own(path) => (path.clone(), 0, true),
            Place::Inline | Place::Linked(_) => return Ok(()),
        };
        if checksum_of(&self.items.join(path), offset, r.length, whole)? == Some(r.crc) {
            self.record(r.array, r.number, Done { length: r.length, crc: r.crc, inline: None })?;
        }
        Ok(())
    }

    fn record(&self, array: usize, number: usize, done: Done) -> Result<(), OrbaxWriteError> {
        {
            let mut all = self.lock();
            if all[array][number].is_some() {
                drop(all);
                return Err(self.wrong(array, number, "was written already"));
            }
            all[array][number] = Some(done);
        }
        if let Place::Range { file, .. } = self.arrangement.arrays[array].places[number]
            && self.pending[file].fetch_sub(1, Ordering::AcqRel) == 1
        {
            self.flusher.send(self.file(file)?);
        }
        Ok(())
    }

    fn file(&self, number: usize) -> io::Result<Arc<fs::File>> {
        if let Some(f) = self.files[number].get() {
            return Ok(Arc::clone(f));
        }
        // Never truncated: another thread may be ahead, and an interrupted run may have left chunks.
        let path = self.items.join(data_file(number));
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        file.set_len(self.arrangement.files[number])?;
        Ok(Arc::clone(self.files[number].get_or_init(|| Arc::new(file))))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<Option<Done>>>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrong(&self, array: usize, number: usize, why: impl Into<String>) -> OrbaxWriteError {
        let a = &self.arrangement.arrays[array];
        OrbaxWriteError::Chunk { array: a.name.clone(), chunk: a.meta.chunk_key(&a.index(number)), why: why.into() }
    }
}

fn json(a: &Resolved) -> Result<Vec<u8>, OrbaxWriteError> {
    a.meta.to_json().map_err(|e| OrbaxWriteError::Plan { array: a.name.clone(), why: e.to_string() })
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|d| u64::try_from(d.as_nanos()).ok()).unwrap_or(0)
}

/// Identifies a plan and everything that decides its bytes.
fn fingerprint(arrangement: &Arrangement, options: &OrbaxOptions) -> String {
    let mut hash = Sha256::new();
    for a in &arrangement.arrays {
        let ArrayMeta { version, shape, dtype, chunk_shape, codecs, .. } = &a.meta;
        let line = format!("{:?} {version} {shape} {dtype} {chunk_shape:?} {codecs:?} {:?}\n", a.name, a.places);
        hash.update(line.as_bytes());
    }
    hash.update(options.source_id.as_bytes());
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// The checksum of a part of a file, or `None` if it has no such part (or is longer where it must not be).
fn checksum_of(path: &Path, offset: u64, length: u64, whole: bool) -> io::Result<Option<u32>> {
    let file = match fs::File::open(path) {
        Ok(f) => f,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let size = file.metadata()?.len();
    if offset.checked_add(length).is_none_or(|end| end > size) || (whole && size != length) {
        return Ok(None);
    }
    let (mut crc, mut at, mut buffer) = (0, offset, vec![0; 1 << 20]);
    while at < offset + length {
        let n = usize::try_from(offset + length - at).map_or(buffer.len(), |n| n.min(buffer.len()));
        file.file().read_exact_at(&mut buffer[..n], at)?;
        crc = crc32c::crc32c_append(crc, &buffer[..n]);
        at += n as u64;
    }
    Ok(Some(crc))
}

fn compressor(
    sink: Sink,
    level: i32,
    checksum: bool,
    a: &Resolved,
) -> io::Result<zstd::stream::write::Encoder<'static, Sink>> {
    let mut encoder = zstd::stream::write::Encoder::new(sink, level)?;
    encoder.include_checksum(checksum)?;
    // Readers may rely on the size in the frame.
    encoder.set_pledged_src_size(Some(a.chunk_bytes as u64))?;
    encoder.include_contentsize(true)?;
    Ok(encoder)
}

enum Encoder {
    Raw(Sink),
    Zstd(Box<ZstdEncoder>),
}

type ZstdEncoder = zstd::stream::write::Encoder<'static, Sink>;

/// A chunk being written. Dropping it unfinished leaves the chunk to be written again.
pub struct ChunkWriter<'w> {
    writer: &'w OrbaxWriter,
    array: usize,
    number: usize,
    encoder: Encoder,
    left: usize,
}

impl std::fmt::Debug for ChunkWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChunkWriter(array {}, chunk {}, {} bytes left)", self.array, self.number, self.left)
    }
}

impl ChunkWriter<'_> {
    /// Appends elements. Any piece size works; large ones go to the file without a copy.
    ///
    /// # Errors
    /// When they are more than the chunk has, or the file system refuses.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), OrbaxWriteError> {
        let Some(left) = self.left.checked_sub(bytes.len()) else {
            let why = format!("gets {} bytes where {} are left", bytes.len(), self.left);
            return Err(self.writer.wrong(self.array, self.number, why));
        };
        self.left = left;
        match &mut self.encoder {
            Encoder::Raw(sink) => sink.push(bytes)?,
            Encoder::Zstd(z) => z.write_all(bytes)?,
        }
        Ok(())
    }

    /// Bytes that are still to be pushed.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left
    }

    /// Ends the chunk.
    ///
    /// # Errors
    /// When bytes are missing, the chunk was written by another thread meanwhile, or the file system refuses.
    pub fn finish(self) -> Result<(), OrbaxWriteError> {
        let ChunkWriter { writer, array, number, encoder, left } = self;
        if left > 0 {
            return Err(writer.wrong(array, number, format!("lacks {left} bytes")));
        }
        let mut sink = match encoder {
            Encoder::Raw(sink) => sink,
            Encoder::Zstd(z) => z.finish()?,
        };
        if writer.arrangement.arrays[array].meta.codecs.bytes.last() == Some(&BytesCodec::Crc32c) {
            let crc = sink.crc;
            sink.push(&crc.to_le_bytes())?;
        }
        let inline = sink.finish()?;
        let record = Record { array, number, length: sink.length, crc: sink.crc };
        if inline.is_none() {
            writer.journal.add(&record)?;
        }
        if let Some(file) = sink.own_file() {
            writer.flusher.send(file);
        }
        writer.record(array, number, Done { length: sink.length, crc: sink.crc, inline })
    }
}

/// Flushes finished data files to the device while others are still being written, so that the commit has little to wait for.
#[derive(Debug)]
struct Flusher {
    queue: Option<mpsc::SyncSender<Arc<fs::File>>>,
    thread: Option<thread::JoinHandle<io::Result<()>>>,
}

impl Flusher {
    fn start() -> Self {
        // Bounded, because every file in the queue is an open one.
        let (queue, files) = mpsc::sync_channel::<Arc<fs::File>>(32);
        // The first error is kept: the kernel reports it once.
        let thread = thread::spawn(move || {
            let mut first = Ok(());
            for file in files {
                first = first.and(file.sync_data());
            }
            first
        });
        Flusher { queue: Some(queue), thread: Some(thread) }
    }

    fn send(&self, file: Arc<fs::File>) {
        if let Some(queue) = &self.queue {
            // Without a receiver the commit flushes it.
            let _ = queue.send(file);
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        self.queue = None;
        match self.thread.take().map(thread::JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the thread that flushes data files died")),
            None => Ok(()),
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        // What it flushes is about to be removed or kept unfinished; either way nobody waits for the result.
        let _ = self.finish();
    }
}
