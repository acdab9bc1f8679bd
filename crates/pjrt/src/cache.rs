//! Compiled programs on disk, so that the second start of a process does not compile.
//!
//! An entry is one file named by its key. The key is a hash over everything that may change the result of a
//! compilation: program text, options, plugin, API version, devices, processor, XLA's environment. Entries appear
//! complete (written beside, then renamed), and carry a checksum, because plugins are not hardened against damaged
//! bytes: an entry with anything wrong is compiled anew, replaced, and counted.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::client::Client;
use crate::error::Result;
use crate::executable::Executable;
use crate::options::CompileOptions;
use crate::plugins::hash;
use crate::signature::{ProgramSignature, StoredSignature};

/// Changes when the layout of an entry or the makings of a key do.
const FORMAT: u32 = 1;
const MAGIC: [u8; 8] = *b"LAPIDEXE";
const EXTENSION: &str = "exe";
const CHECKSUM: usize = 32;
/// Magic, checksum, length of the header.
const FIXED: usize = MAGIC.len() + CHECKSUM + 4;
/// A half-written entry this old belongs to a process that is gone.
const ABANDONED: Duration = Duration::from_secs(3600);

/// A directory of compiled programs. Threads and processes may share it.
#[derive(Debug)]
pub struct ExecutableCache {
    directory: PathBuf,
    limit: u64,
    counters: [AtomicU64; 5],
}

/// What a cache did so far in this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Programs loaded.
    pub hits: u64,
    /// Programs that were not there.
    pub misses: u64,
    /// Entries that were damaged, and compiled anew.
    pub damaged: u64,
    /// Entries written.
    pub stored: u64,
    /// Entries removed to stay within the size limit.
    pub pruned: u64,
}

/// Whether a program came from the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// No cache was given.
    Off,
    /// It was loaded.
    Hit,
    /// It was not there, and was compiled.
    Miss,
    /// It was there but of no use, for this reason, and was compiled.
    Damaged(String),
}

/// What the cache did for one program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheOutcome {
    /// Whether the program came from it.
    pub lookup: Lookup,
    /// Why a compiled program could not be stored, if it could not: a full disk does not stop the work.
    pub store_error: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    key: String,
    signature: StoredSignature,
}

const HITS: usize = 0;
const MISSES: usize = 1;
const DAMAGED: usize = 2;
const STORED: usize = 3;
const PRUNED: usize = 4;

impl ExecutableCache {
    /// The size limit of a new cache: 8 GiB.
    pub const DEFAULT_LIMIT: u64 = 8 << 30;

    /// A cache in a directory, which is made if it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(directory: impl Into<PathBuf>) -> io::Result<Self> {
        let directory = directory.into();
        fs_err::create_dir_all(&directory)?;
        Ok(ExecutableCache { directory, limit: Self::DEFAULT_LIMIT, counters: Default::default() })
    }

    /// The same cache with another size limit in bytes. The oldest entries go first; the newest always stays.
    #[must_use]
    pub fn with_limit(mut self, bytes: u64) -> Self {
        self.limit = bytes;
        self
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What it did so far.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        let get = |i: usize| self.counters[i].load(Ordering::Relaxed);
        CacheStats {
            hits: get(HITS),
            misses: get(MISSES),
            damaged: get(DAMAGED),
            stored: get(STORED),
            pruned: get(PRUNED),
        }
    }

    fn count(&self, what: usize) {
        self.counters[what].fetch_add(1, Ordering::Relaxed);
    }

    fn path(&self, key: &str) -> PathBuf {
        self.directory.join(key).with_extension(EXTENSION)
    }

    /// The signature and bytes of an entry. `Ok(None)`: not there. `Err`: damaged, and how.
    fn read(&self, key: &str) -> Result<Option<(ProgramSignature, Vec<u8>)>, String> {
        let path = self.path(key);
        let file = match fs_err::read(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e.to_string()),
        };
        let entry = decode(key, &file)?;
        // Used just now: the last to be pruned. Failing to note that does no harm.
        let _ = fs_err::OpenOptions::new().append(true).open(&path).and_then(|f| f.set_modified(SystemTime::now()));
        Ok(Some(entry))
    }

    fn write(&self, key: &str, signature: &ProgramSignature, program: &[u8]) -> io::Result<()> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let head = encode_head(key, signature, program)?;
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let temporary = self.directory.join(format!(".{}-{serial}.part", std::process::id()));
        let written = (|| {
            let mut file = fs_err::File::create(&temporary)?;
            file.write_all(&head)?;
            file.write_all(program)?;
            file.sync_all()?;
            drop(file);
            fs_err::rename(&temporary, self.path(key))
        })();
        if written.is_err() {
            let _ = fs_err::remove_file(&temporary);
        }
        written?;
        self.count(STORED);
        self.prune(key)
    }

    /// Removes the entries used longest ago until the rest fits the limit, and what dead processes left behind.
    fn prune(&self, newest: &str) -> io::Result<()> {
        let mut entries = Vec::new();
        let now = SystemTime::now();
        for entry in fs_err::read_dir(&self.directory)? {
            let entry = entry?;
            let path = entry.path();
            // Another process may have removed it meanwhile.
            let Ok(metadata) = entry.metadata() else { continue };
            let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            if path.extension().is_some_and(|e| e == EXTENSION) {
                entries.push((modified, metadata.len(), path));
            } else if path.extension().is_some_and(|e| e == "part")
                && now.duration_since(modified).is_ok_and(|age| age > ABANDONED)
            {
                let _ = fs_err::remove_file(&path);
            }
        }
        entries.sort();
        let keep = self.path(newest);
        let mut total: u64 = entries.iter().map(|e| e.1).sum();
        for (_, size, path) in entries {
            if total <= self.limit {
                break;
            }
            if path != keep && fs_err::remove_file(&path).is_ok() {
                total -= size;
                self.count(PRUNED);
            }
        }
        Ok(())
    }
}

/// Everything of an entry that precedes the program: magic, checksum of all that follows, header length, header.
fn encode_head(key: &str, signature: &ProgramSignature, program: &[u8]) -> io::Result<Vec<u8>> {
    let header = serde_json::to_vec(&Header { key: key.to_owned(), signature: signature.to_stored() })?;
    let length = u32::try_from(header.len()).map_err(|_| io::Error::other("a header of 4 GiB"))?.to_le_bytes();
    let mut hasher = Sha256::new();
    for part in [&length[..], &header, program] {
        hasher.update(part);
    }
    Ok([&MAGIC[..], &hasher.finalize(), &length, &header].concat())
}

fn decode(key: &str, file: &[u8]) -> Result<(ProgramSignature, Vec<u8>), String> {
    if file.len() < FIXED || file[..MAGIC.len()] != MAGIC {
        return Err("it is not an entry of this cache".to_owned());
    }
    let (checksum, rest) = file[MAGIC.len()..].split_at(CHECKSUM);
    if Sha256::digest(rest)[..] != *checksum {
        return Err("its checksum is wrong".to_owned());
    }
    let wrong = || "its header makes no sense".to_owned();
    let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(wrong)?;
    let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| wrong())?;
    let (header, program) = rest.split_at_checked(length).ok_or_else(wrong)?;
    let header: Header = serde_json::from_slice(header).map_err(|_| wrong())?;
    if header.key != key {
        return Err("it belongs to another program".to_owned());
    }
    let signature = ProgramSignature::from_stored(header.signature).ok_or_else(wrong)?;
    Ok((signature, program.to_vec()))
}

impl Client {
    /// Compiles a program, or loads it from the cache if it was compiled before with the same options, plugin, number
    /// of devices and kind of processor. Custom-call handlers a stored program uses must be registered before.
    ///
    /// # Errors
    /// As [`Client::compile`]. Trouble with the cache is no error: it is in the outcome.
    pub fn compile_cached(
        &self,
        program: &str,
        options: &CompileOptions,
        cache: Option<&ExecutableCache>,
    ) -> Result<(Executable, CacheOutcome)> {
        let Some(cache) = cache.filter(|_| options.is_serializable()) else {
            let executable = self.compile(program, options)?;
            return Ok((executable, CacheOutcome { lookup: Lookup::Off, store_error: None }));
        };
        let key = self.cache_key(program, options)?;
        let found = match cache.read(&key) {
            Ok(None) => None,
            Ok(Some((signature, bytes))) => Some(self.deserialize(&bytes, Some(signature)).map_err(|e| e.to_string())),
            Err(reason) => Some(Err(reason)),
        };
        let lookup = match found {
            Some(Ok(executable)) => {
                cache.count(HITS);
                return Ok((executable, CacheOutcome { lookup: Lookup::Hit, store_error: None }));
            }
            Some(Err(reason)) => {
                cache.count(DAMAGED);
                Lookup::Damaged(reason)
            }
            None => {
                cache.count(MISSES);
                Lookup::Miss
            }
        };
        let executable = self.compile(program, options)?;
        let stored = executable
            .serialize()
            .map_err(|e| e.to_string())
            .and_then(|bytes| cache.write(&key, executable.signature(), &bytes).map_err(|e| e.to_string()));
        Ok((executable, CacheOutcome { lookup, store_error: stored.err() }))
    }

    /// The name of a program's entry in a cache.
    fn cache_key(&self, program: &str, options: &CompileOptions) -> Result<String> {
        let plugin = self.plugin();
        let (major, minor) = plugin.api_version();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let flags = std::env::var_os("XLA_FLAGS").unwrap_or_default();
        let kinds: Vec<&str> = self.devices().iter().map(|d| d.kind.as_str()).collect();
        let numbers =
            format!("{FORMAT} {major}.{minor} {cores} {} {}", self.devices().len(), self.mesh_devices().len());
        let mut hasher = Sha256::new();
        for part in [
            numbers.as_bytes(),
            plugin.sha256().as_bytes(),
            self.platform_version().as_bytes(),
            kinds.join("\n").as_bytes(),
            processor().as_bytes(),
            flags.as_encoded_bytes(),
            &self.encode_options(options)?,
            program.as_bytes(),
        ] {
            // The length first, so that no two lists of parts read the same.
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Ok(hash::hex(&hasher.finalize()))
    }
}

/// What XLA's CPU code generator looks at: the processor's model and instruction sets.
fn processor() -> &'static str {
    static PROCESSOR: OnceLock<String> = OnceLock::new();
    PROCESSOR.get_or_init(|| {
        let mut text = format!("{} {}", std::env::consts::ARCH, std::env::consts::OS);
        let info = fs_err::read_to_string("/proc/cpuinfo").unwrap_or_default();
        // The first processor stands for all; frequency and the like change and are left out.
        let first = info.split("\n\n").next().unwrap_or_default();
        for line in first.lines() {
            let name = line.split(':').next().unwrap_or_default().trim();
            if ["model name", "flags", "Features", "CPU implementer", "CPU part"].contains(&name) {
                text.push('\n');
                text.push_str(line);
            }
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensor::{DType, Shape};

    fn signature() -> ProgramSignature {
        let a = crate::signature::ArrayType { dtype: DType::BF16, shape: Shape::from([2, 3]) };
        ProgramSignature { inputs: vec![a.clone(), a.clone()], outputs: vec![a], donated: vec![1] }
    }

    #[test]
    fn an_entry_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::new(dir.path().join("new")).unwrap();
        assert_eq!(cache.read("k").unwrap(), None);
        cache.write("k", &signature(), b"program").unwrap();
        assert_eq!(cache.read("k").unwrap(), Some((signature(), b"program".to_vec())));
        assert_eq!(fs_err::read_dir(cache.directory()).unwrap().count(), 1);
    }

    #[test]
    fn any_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::new(dir.path()).unwrap();
        cache.write("k", &signature(), b"program").unwrap();
        let path = cache.path("k");
        let good = fs_err::read(&path).unwrap();
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 0x10;
            fs_err::write(&path, &bad).unwrap();
            assert!(cache.read("k").is_err(), "byte {i}");
            fs_err::write(&path, &good[..i]).unwrap();
            assert!(cache.read("k").is_err(), "{i} bytes");
        }
        fs_err::write(cache.path("other"), &good).unwrap();
        assert!(cache.read("other").unwrap_err().contains("another program"));
    }

    #[test]
    fn the_oldest_entries_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::new(dir.path()).unwrap().with_limit(2500);
        for (i, key) in ["a", "b"].into_iter().enumerate() {
            cache.write(key, &signature(), &[0; 1000]).unwrap();
            let past = SystemTime::now() - Duration::from_secs(100 - i as u64);
            let file = fs_err::OpenOptions::new().append(true).open(cache.path(key)).unwrap();
            file.set_modified(past).unwrap();
        }
        // Reading makes `a` the younger one.
        assert!(cache.read("a").unwrap().is_some());
        cache.write("c", &signature(), &[0; 1000]).unwrap();
        assert_eq!(cache.read("b").unwrap(), None);
        assert!(cache.read("a").unwrap().is_some() && cache.read("c").unwrap().is_some());
        // One larger than the limit stays until the next.
        cache.write("d", &signature(), &[0; 5000]).unwrap();
        assert!(cache.read("d").unwrap().is_some());
        assert_eq!(cache.stats().pruned, 3);
    }
}
