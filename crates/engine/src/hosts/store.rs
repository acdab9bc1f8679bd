//! A key-value store on process 0, over TCP: `put`, `get` that waits, `try_get`.
//!
//! Devices of several processes exchange through it what they need to connect (topologies, identifiers of their collectives
//! library). It is no database: keys are written once, sizes are bounded, and everything is gone with process 0.
//!
//! Every connection begins with proof of the shared token: the server sends a random challenge, the client answers with
//! SHA-256 of challenge, token and its process number. The token never travels; what follows is not encrypted.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pjrt::KeyValueError;
use sha2::{Digest, Sha256};

/// Longest key.
const KEY: usize = 4096;
/// Largest value.
const VALUE: usize = 16 << 20;
/// Largest sum of all keys and values.
const TOTAL: usize = 256 << 20;
/// Most keys.
const KEYS: usize = 1 << 20;
/// A peer that sends nothing for so long while it should is gone.
const SILENCE: Duration = Duration::from_secs(20);
/// First bytes of a connection, both ways.
const MAGIC: [u8; 8] = *b"LPDKVS01";

const PUT: u8 = 1;
const GET: u8 = 2;
const TRY: u8 = 3;
const JOINED: u8 = 4;
const REMOVE: u8 = 5;

const OK: u8 = 0;
const ABSENT: u8 = 1;
const TIMEOUT: u8 = 2;
const TWICE: u8 = 3;
const TOO_LARGE: u8 = 4;
const REFUSED: u8 = 5;
const LOST: u8 = 6;

/// An operation of the store that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Process 0 cannot listen.
    #[error("process 0 cannot listen at {address}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Process 0 cannot be reached.
    #[error("process 0 cannot be reached at {address} after {waited:?}: is it running, and is the port open?")]
    Unreachable {
        /// Where.
        address: String,
        /// How long it was tried.
        waited: Duration,
        /// The last failure.
        #[source]
        source: io::Error,
    },
    /// The token is not the one of process 0, or the process number is taken or too large.
    #[error("process 0 refuses this process: {0}")]
    Refused(String),
    /// Nobody wrote the key in time.
    #[error("nobody wrote {key:?} within {waited:?}{}", missing_text(.missing))]
    Timeout {
        /// The key.
        key: String,
        /// How long it was waited for.
        waited: Duration,
        /// Processes that have not connected.
        missing: Vec<usize>,
    },
    /// A process that had connected is gone.
    #[error("{} of the run ended early; its own messages say why", process_text(.0))]
    Lost(
        /// The processes.
        Vec<usize>,
    ),
    /// The key is not there.
    #[error("there is no {0:?}")]
    Absent(String),
    /// The key was written before, with another value.
    #[error("{0:?} was written before, with another value")]
    Twice(String),
    /// Key, value or store too large.
    #[error("{0:?}: key, value or store would be too large")]
    TooLarge(String),
    /// The connection broke.
    #[error("the connection to process 0 broke")]
    Broken(#[source] io::Error),
}

fn missing_text(missing: &[usize]) -> String {
    if missing.is_empty() { String::new() } else { format!("; {} never connected", process_text(missing)) }
}

fn process_text(processes: &[usize]) -> String {
    match processes {
        [one] => format!("process {one}"),
        more => {
            let list: Vec<String> = more.iter().take(8).map(usize::to_string).collect();
            let etc = if more.len() > 8 { ", ..." } else { "" };
            format!("processes {}{etc}", list.join(", "))
        }
    }
}

#[derive(Debug, Default)]
struct Content {
    values: HashMap<Vec<u8>, Vec<u8>>,
    size: usize,
    joined: Vec<bool>,
    /// Connections of each process.
    open: Vec<usize>,
}

impl Content {
    /// Processes that were here and are gone.
    fn lost(&self) -> Vec<usize> {
        self.joined.iter().zip(&self.open).enumerate().filter(|(_, (j, n))| **j && **n == 0).map(|(i, _)| i).collect()
    }
}

/// What waiting for a value came to.
enum Waited {
    Value(Vec<u8>),
    Nothing,
    Lost(Vec<usize>),
}

#[derive(Debug)]
struct Shared {
    content: Mutex<Content>,
    written: Condvar,
    token: Vec<u8>,
    closed: AtomicBool,
}

impl Shared {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, key: &[u8], value: &[u8]) -> u8 {
        let mut content = self.content();
        if let Some(before) = content.values.get(key) {
            // Written again the same: a repeated attempt.
            return if before == value { OK } else { TWICE };
        }
        let size = content.size + key.len() + value.len();
        if key.len() > KEY || value.len() > VALUE || size > TOTAL || content.values.len() >= KEYS {
            return TOO_LARGE;
        }
        content.size = size;
        content.values.insert(key.to_vec(), value.to_vec());
        self.written.notify_all();
        OK
    }

    /// Waits for a value, as long as all who could write it are there.
    fn get(&self, key: &[u8], timeout: Duration) -> Waited {
        let end = Instant::now() + timeout;
        let mut content = self.content();
        loop {
            if let Some(v) = content.values.get(key) {
                return Waited::Value(v.clone());
            }
            let left = end.checked_duration_since(Instant::now()).filter(|d| !d.is_zero());
            let (Some(left), false) = (left, self.closed.load(Ordering::Relaxed)) else { return Waited::Nothing };
            let lost = content.lost();
            if !lost.is_empty() {
                return Waited::Lost(lost);
            }
            content = self.written.wait_timeout(content, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn missing(&self) -> Vec<usize> {
        self.content().joined.iter().enumerate().filter(|(_, j)| !**j).map(|(i, _)| i).collect()
    }

    fn remove(&self, key: &[u8]) {
        let mut content = self.content();
        if let Some(value) = content.values.remove(key) {
            content.size -= key.len() + value.len();
        }
    }
}

fn to_bytes(numbers: &[usize]) -> Vec<u8> {
    numbers.iter().flat_map(|&i| (i as u32).to_le_bytes()).collect()
}

fn from_bytes(bytes: &[u8]) -> Vec<usize> {
    bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]) as usize).collect()
}

/// The store itself, on process 0. It serves until it is dropped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Server {
    /// Listens at `address` for `count` processes that know `token`.
    ///
    /// # Errors
    /// When the address cannot be listened at.
    pub fn listen(address: &str, count: usize, token: &[u8]) -> Result<Server, StoreError> {
        let failed = |source| StoreError::Listen { address: address.to_owned(), source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let local = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared {
            content: Mutex::new(Content { joined: vec![false; count], open: vec![0; count], ..Content::default() }),
            written: Condvar::new(),
            token: token.to_vec(),
            closed: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.closed.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let shared = Arc::clone(&serving);
                // A client that breaks the protocol loses its connection, nobody else does.
                std::thread::spawn(move || serve(&shared, stream).ok());
            }
        });
        Ok(Server { shared, address: local })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Processes that have not connected yet.
    #[must_use]
    pub fn missing(&self) -> Vec<usize> {
        self.shared.missing()
    }

    /// Waits until every process but `own` has closed its connections, at most this long.
    pub fn wait_for_ends(&self, own: usize, limit: Duration) {
        let end = Instant::now() + limit;
        let mut content = self.shared.content();
        while content.open.iter().enumerate().any(|(i, n)| i != own && *n > 0) {
            let Some(left) = end.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else { return };
            content = self.shared.written.wait_timeout(content, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
        self.shared.written.notify_all();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

fn proof(challenge: &[u8; 16], token: &[u8], process: u32) -> [u8; 32] {
    let mut hasher = Sha256::new();
    hasher.update(MAGIC);
    hasher.update(challenge);
    hasher.update((token.len() as u64).to_le_bytes());
    hasher.update(token);
    hasher.update(process.to_le_bytes());
    hasher.finalize().into()
}

/// Bytes that no two connections share.
fn challenge() -> [u8; 16] {
    use std::hash::{BuildHasher as _, RandomState};
    let (a, b) = (RandomState::new().hash_one(Instant::now()), RandomState::new().hash_one(std::process::id()));
    let mut out = [0; 16];
    out[..8].copy_from_slice(&a.to_le_bytes());
    out[8..].copy_from_slice(&b.to_le_bytes());
    out
}

fn serve(shared: &Shared, mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let challenge = challenge();
    stream.write_all(&[&MAGIC[..], &challenge].concat())?;
    let mut hello = [0; 8 + 4 + 32];
    stream.read_exact(&mut hello)?;
    let process = u32::from_le_bytes([hello[8], hello[9], hello[10], hello[11]]);
    let wanted = proof(&challenge, &shared.token, process);
    // All bytes are looked at, so that time tells nothing.
    let different = hello[12..].iter().zip(&wanted).fold(0, |d, (a, b)| d | (a ^ b));
    if hello[..8] != MAGIC || different != 0 {
        return answer(&mut stream, REFUSED, b"its token is another one");
    }
    {
        let mut content = shared.content();
        let count = content.joined.len();
        match content.joined.get_mut(process as usize) {
            Some(joined) => {
                *joined = true;
                content.open[process as usize] += 1;
            }
            None => {
                drop(content);
                let reason = format!("it calls itself process {process}, but there are {count}");
                return answer(&mut stream, REFUSED, reason.as_bytes());
            }
        }
    }
    // A connection lives as long as its process.
    let ended = answer(&mut stream, OK, b"").and_then(|()| answer_all(shared, &mut stream));
    shared.content().open[process as usize] -= 1;
    shared.written.notify_all();
    ended
}

/// Answers until the connection ends.
fn answer_all(shared: &Shared, stream: &mut TcpStream) -> io::Result<()> {
    stream.set_read_timeout(None)?;
    loop {
        let mut head = [0; 1 + 4 + 4 + 4];
        stream.read_exact(&mut head)?;
        let field = |i: usize| u32::from_le_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]) as usize;
        let (key_size, value_size, timeout) = (field(1), field(5), field(9));
        if key_size > KEY || value_size > VALUE {
            return answer(stream, TOO_LARGE, b"");
        }
        let mut body = vec![0; key_size + value_size];
        stream.read_exact(&mut body)?;
        let (key, value) = body.split_at(key_size);
        let found = |v: Waited, otherwise: u8, stream: &mut TcpStream| match v {
            Waited::Value(v) => answer(stream, OK, &v),
            Waited::Nothing => answer(stream, otherwise, b""),
            Waited::Lost(processes) => answer(stream, LOST, &to_bytes(&processes)),
        };
        match head[0] {
            PUT => answer(stream, shared.put(key, value), b"")?,
            GET => found(shared.get(key, Duration::from_millis(timeout as u64)), TIMEOUT, stream)?,
            TRY => found(shared.get(key, Duration::ZERO), ABSENT, stream)?,
            JOINED => answer(stream, OK, &to_bytes(&shared.missing()))?,
            REMOVE => {
                shared.remove(key);
                answer(stream, OK, b"")?;
            }
            _ => return Ok(()),
        }
    }
}

fn answer(stream: &mut TcpStream, status: u8, body: &[u8]) -> io::Result<()> {
    stream.write_all(&[&[status][..], &(body.len() as u32).to_le_bytes(), body].concat())
}

/// A process's end of the store.
#[derive(Debug)]
pub struct Store {
    /// Connections that nobody waits on: a waiting `get` takes one for itself.
    idle: Mutex<Vec<TcpStream>>,
    address: String,
    process: u32,
    token: Vec<u8>,
}

impl Store {
    /// Connects to the store of process 0, trying again for as long as `patience`: processes do not start at the same time.
    ///
    /// # Errors
    /// When process 0 cannot be reached in that time, or refuses token or process number.
    pub fn connect(address: &str, process: usize, token: &[u8], patience: Duration) -> Result<Store, StoreError> {
        let process = u32::try_from(process).map_err(|_| StoreError::Refused("absurd process number".to_owned()))?;
        let store = Store { idle: Mutex::new(Vec::new()), address: address.to_owned(), process, token: token.to_vec() };
        let stream = store.open(patience)?;
        store.give_back(stream);
        Ok(store)
    }

    fn give_back(&self, stream: TcpStream) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
    }

    fn open(&self, patience: Duration) -> Result<TcpStream, StoreError> {
        let start = Instant::now();
        loop {
            match self.attempt() {
                Ok(stream) => return Ok(stream),
                Err(Attempt::Refused(reason)) => return Err(StoreError::Refused(reason)),
                Err(Attempt::Io(source)) if start.elapsed() >= patience => {
                    return Err(StoreError::Unreachable {
                        address: self.address.clone(),
                        waited: start.elapsed(),
                        source,
                    });
                }
                Err(Attempt::Io(_)) => {
                    std::thread::sleep(Duration::from_millis(200).min(patience));
                }
            }
        }
    }

    fn attempt(&self) -> Result<TcpStream, Attempt> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in self.address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
                Ok(stream) => return self.greet(stream),
                Err(e) => last = e,
            }
        }
        Err(last.into())
    }

    fn greet(&self, mut stream: TcpStream) -> Result<TcpStream, Attempt> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        let mut hello = [0; 8 + 16];
        stream.read_exact(&mut hello)?;
        let mut challenge = [0; 16];
        challenge.copy_from_slice(&hello[8..]);
        if hello[..8] != MAGIC {
            return Err(Attempt::Refused("something else listens at its address".to_owned()));
        }
        let proof = proof(&challenge, &self.token, self.process);
        stream.write_all(&[&MAGIC[..], &self.process.to_le_bytes(), &proof].concat())?;
        match read_answer(&mut stream)? {
            (OK, _) => Ok(stream),
            (_, reason) => Err(Attempt::Refused(String::from_utf8_lossy(&reason).into_owned())),
        }
    }

    fn ask(&self, op: u8, key: &str, value: &[u8], timeout: Duration) -> Result<(u8, Vec<u8>), StoreError> {
        if key.len() > KEY || value.len() > VALUE {
            return Err(StoreError::TooLarge(key.to_owned()));
        }
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut stream = match idle {
            Some(stream) => stream,
            None => self.open(Duration::ZERO)?,
        };
        let exchanged = (|| {
            // The answer takes as long as the server waits.
            stream.set_read_timeout(Some(SILENCE + timeout))?;
            let mut message = vec![op];
            for n in [key.len() as u32, value.len() as u32, u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX)] {
                message.extend(n.to_le_bytes());
            }
            message.extend(key.as_bytes());
            message.extend(value);
            stream.write_all(&message)?;
            read_answer(&mut stream)
        })();
        let answer = exchanged.map_err(StoreError::Broken)?;
        self.give_back(stream);
        Ok(answer)
    }

    /// Writes a value once. The same value again is no error.
    ///
    /// # Errors
    /// When another value is there, something is too large, or the connection breaks.
    pub fn put(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        match self.ask(PUT, key, value, Duration::ZERO)?.0 {
            OK => Ok(()),
            TWICE => Err(StoreError::Twice(key.to_owned())),
            _ => Err(StoreError::TooLarge(key.to_owned())),
        }
    }

    /// Waits for a value.
    ///
    /// # Errors
    /// When nobody writes it in time (the error names processes that never connected), a process that had connected is gone, or
    /// the connection breaks.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>, StoreError> {
        match self.ask(GET, key, b"", timeout)? {
            (OK, value) => Ok(value),
            (LOST, processes) => Err(StoreError::Lost(from_bytes(&processes))),
            _ => {
                let missing = self.missing().unwrap_or_default();
                Err(StoreError::Timeout { key: key.to_owned(), waited: timeout, missing })
            }
        }
    }

    /// The value if it is there.
    ///
    /// # Errors
    /// [`StoreError::Absent`] when it is not, others when the connection breaks.
    pub fn try_get(&self, key: &str) -> Result<Vec<u8>, StoreError> {
        match self.ask(TRY, key, b"", Duration::ZERO)? {
            (OK, value) => Ok(value),
            _ => Err(StoreError::Absent(key.to_owned())),
        }
    }

    /// Processes that have not connected yet.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn missing(&self) -> Result<Vec<usize>, StoreError> {
        let (_, body) = self.ask(JOINED, "", b"", Duration::ZERO)?;
        Ok(from_bytes(&body))
    }

    /// Takes a key away that nobody will ask for again.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn remove(&self, key: &str) -> Result<(), StoreError> {
        self.ask(REMOVE, key, b"", Duration::ZERO).map(|_| ())
    }

    /// Waits until every process of `count` has come to this point. A name is used once.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn barrier(&self, name: &str, count: usize, timeout: Duration) -> Result<(), StoreError> {
        let end = Instant::now() + timeout;
        self.put(&format!("barrier/{name}/{}", self.process), b"")?;
        for i in 0..count {
            self.get(&format!("barrier/{name}/{i}"), end.saturating_duration_since(Instant::now()))?;
        }
        Ok(())
    }
}

impl pjrt::KeyValueStore for Store {
    fn get(&self, key: &[u8], timeout: Duration) -> Result<Vec<u8>, KeyValueError> {
        Store::get(self, &text(key), timeout).map_err(foreign)
    }

    fn try_get(&self, key: &[u8]) -> Result<Vec<u8>, KeyValueError> {
        Store::try_get(self, &text(key)).map_err(foreign)
    }

    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), KeyValueError> {
        Store::put(self, &text(key), value).map_err(foreign)
    }
}

/// A plugin's key among our own.
fn text(key: &[u8]) -> String {
    format!("plugin/{}", String::from_utf8_lossy(key))
}

fn foreign(e: StoreError) -> KeyValueError {
    match e {
        StoreError::Absent(_) => KeyValueError::NotFound(e.to_string()),
        StoreError::Timeout { .. } => KeyValueError::Timeout(e.to_string()),
        _ => KeyValueError::Failed(e.to_string()),
    }
}

/// Why a connection did not come about.
enum Attempt {
    Io(io::Error),
    Refused(String),
}

impl From<io::Error> for Attempt {
    fn from(e: io::Error) -> Self {
        Attempt::Io(e)
    }
}

fn read_answer(stream: &mut TcpStream) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let size = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if size > VALUE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer larger than any value"));
    }
    let mut body = vec![0; size];
    stream.read_exact(&mut body)?;
    Ok((head[0], body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(20);

    fn server(count: usize) -> (Server, String) {
        let server = Server::listen("127.0.0.1:0", count, b"secret").unwrap();
        let address = server.address().to_string();
        (server, address)
    }

    #[test]
    fn values_travel_and_a_reader_waits_for_a_writer() {
        let (server, address) = server(2);
        let a = Store::connect(&address, 0, b"secret", LONG).unwrap();
        assert!(matches!(a.try_get("k"), Err(StoreError::Absent(k)) if k == "k"));
        let message = a.get("k", SHORT).unwrap_err().to_string();
        assert!(message.contains("\"k\"") && message.contains("process 1 never connected"), "{message}");
        assert_eq!(server.missing(), [1]);
        let reader = {
            let address = address.clone();
            std::thread::spawn(move || Store::connect(&address, 1, b"secret", LONG)?.get("k", LONG))
        };
        a.put("k", b"value").unwrap();
        assert_eq!(reader.join().unwrap().unwrap(), b"value");
        a.put("k", b"value").unwrap();
        assert!(matches!(a.put("k", b"other"), Err(StoreError::Twice(_))));
        assert_eq!(a.missing().unwrap(), [0usize; 0]);
        let b = Store::connect(&address, 1, b"secret", LONG).unwrap();
        let other = std::thread::spawn(move || b.barrier("start", 2, LONG));
        a.barrier("start", 2, LONG).unwrap();
        other.join().unwrap().unwrap();
    }

    #[test]
    fn strangers_are_refused() {
        let (_server, address) = server(2);
        let refused = |process, token: &[u8]| Store::connect(&address, process, token, LONG).unwrap_err().to_string();
        assert!(refused(0, b"guess").contains("token"));
        assert!(refused(2, b"secret").contains("process 2, but there are 2"));
        // Garbage does not stop the server.
        let mut raw = TcpStream::connect(&address).unwrap();
        raw.write_all(&[7; 200]).unwrap();
        let a = Store::connect(&address, 0, b"secret", LONG).unwrap();
        assert!(matches!(a.put("k", &vec![0; VALUE + 1]), Err(StoreError::TooLarge(_))));
        assert!(matches!(a.put(&"k".repeat(KEY + 1), b""), Err(StoreError::TooLarge(_))));
        a.put("k", b"v").unwrap();
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let message = Store::connect(&gone, 0, b"", SHORT).unwrap_err().to_string();
        assert!(message.contains(&gone), "{message}");
    }

    #[test]
    fn several_wait_at_once_over_one_end() {
        let (_server, address) = server(1);
        let store = Arc::new(Store::connect(&address, 0, b"secret", LONG).unwrap());
        let readers: Vec<_> = (0..4)
            .map(|i| {
                let store = Arc::clone(&store);
                std::thread::spawn(move || store.get(&format!("k{i}"), LONG))
            })
            .collect();
        for i in (0..4u8).rev() {
            store.put(&format!("k{i}"), &[i]).unwrap();
        }
        for (i, r) in readers.into_iter().enumerate() {
            assert_eq!(r.join().unwrap().unwrap(), [i as u8]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn any_bytes_come_back(pairs in proptest::collection::hash_map(".{0,40}", proptest::collection::vec(any::<u8>(), 0..300), 0..8)) {
            let (_server, address) = server(1);
            let store = Store::connect(&address, 0, b"secret", LONG).unwrap();
            for (k, v) in &pairs {
                store.put(k, v).unwrap();
            }
            for (k, v) in &pairs {
                prop_assert_eq!(&store.try_get(k).unwrap(), v);
            }
        }
    }
}
