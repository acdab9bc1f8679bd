//! Processes whose devices form one mesh: they meet at the key-value store of process 0.
//!
//! Gradients are summed by the program itself, over the devices' own links. What is left to say between processes is little
//! (whether all stand at the same step, whether one was asked to stop) and goes through the store.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use super::Identity;
use super::peers::{Peers, PeersError};
use super::store::{Server, Store, StoreError};

/// How long processes wait for one that has not started, or is slower: a compiler may take this long on one of them.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

/// How long process 0 stays for the others to hear its last word.
const FAREWELL: Duration = Duration::from_secs(30);

/// The other processes, as one of them sees them.
#[derive(Debug)]
pub struct Control {
    store: Arc<Store>,
    process: usize,
    count: usize,
    /// Number of the next sum.
    next: Cell<u64>,
    server: Option<Server>,
}

impl Control {
    /// Opens the store, if this is process 0, and connects to it; returns when all processes have come.
    ///
    /// # Errors
    /// When the store cannot be opened or reached, the tokens differ, or a process does not come in time.
    pub fn start(identity: &Identity, token: &[u8]) -> Result<Control, StoreError> {
        let Identity { process, count, .. } = *identity;
        let address = identity.coordinator.as_deref().unwrap_or_default();
        let server = match process {
            0 => Some(Server::listen(&listening(address), count, token)?),
            _ => None,
        };
        let store = Arc::new(Store::connect(address, process, token, PATIENCE)?);
        store.barrier("start", count, PATIENCE)?;
        Ok(Control { store, process, count, next: Cell::new(0), server })
    }

    /// The store, for a plugin's callbacks.
    #[must_use]
    pub fn store(&self) -> Arc<Store> {
        Arc::clone(&self.store)
    }
}

/// Process 0 may know its own machine by another name than the others do: all its addresses are listened at, unless they are all on
/// one machine.
fn listening(address: &str) -> String {
    match address.rsplit_once(':') {
        Some((host, _)) if host == "localhost" || host.starts_with("127.") || host == "[::1]" => address.to_owned(),
        Some((host, port)) if host.starts_with('[') => format!("[::]:{port}"),
        Some((_, port)) => format!("0.0.0.0:{port}"),
        None => address.to_owned(),
    }
}

impl Peers for Control {
    fn rank(&self) -> usize {
        self.process
    }

    fn count(&self) -> usize {
        self.count
    }

    fn sums_gradients(&self) -> bool {
        false
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), PeersError> {
        let failed = |e: StoreError| PeersError(e.to_string());
        let number = self.next.get();
        let key = |number: u64, process: usize| format!("sum/{number}/{process}");
        let own: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.store.put(&key(number, self.process), &own).map_err(failed)?;
        values.fill(0.0);
        for process in 0..self.count {
            let theirs = self.store.get(&key(number, process), PATIENCE).map_err(failed)?;
            if theirs.len() != own.len() {
                return Err(PeersError(format!("process {process} is at another place of the program")));
            }
            for (sum, b) in values.iter_mut().zip(theirs.chunks_exact(4)) {
                *sum += f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        // Whoever has given this number has read all of the one before.
        if let Some(before) = number.checked_sub(1) {
            self.store.remove(&key(before, self.process)).map_err(failed)?;
        }
        self.next.set(number + 1);
        Ok(())
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Some(server) = &self.server {
            server.wait_for_ends(self.process, FAREWELL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::Origin;

    fn identity(process: usize, count: usize, address: &str) -> Identity {
        Identity { process, count, coordinator: Some(address.into()), origin: Origin::Flags }
    }

    /// A port that was free a moment ago.
    fn address() -> String {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
    }

    #[test]
    fn sums_are_those_of_all_and_leave_nothing_behind() {
        let address = address();
        std::thread::scope(|scope| {
            let run = |process: usize| {
                let control = Control::start(&identity(process, 3, &address), b"t").unwrap();
                assert_eq!((control.rank(), control.count(), control.sums_gradients()), (process, 3, false));
                for step in 0..5 {
                    let mut values = [process as f32, step as f32];
                    control.sum(&mut values).unwrap();
                    assert_eq!(values, [3.0, 3.0 * step as f32]);
                }
                assert!(control.store().try_get(&format!("sum/3/{process}")).is_err());
                assert!(control.store().try_get(&format!("sum/4/{process}")).is_ok());
            };
            let others: Vec<_> = (1..3).map(|p| scope.spawn(move || run(p))).collect();
            run(0);
            others.into_iter().for_each(|t| t.join().unwrap());
        });
    }

    #[test]
    fn a_process_that_ends_is_named_to_those_who_wait() {
        let address = address();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| drop(Control::start(&identity(1, 2, &address), b"t").unwrap()));
            let control = Control::start(&identity(0, 2, &address), b"t").unwrap();
            let error = control.sum(&mut [1.0]).unwrap_err().to_string();
            assert!(error.contains("process 1 of the run ended early"), "{error}");
            other.join().unwrap();
        });
    }

    #[test]
    fn where_process_0_listens() {
        for (told, listened) in [
            ("node7:99", "0.0.0.0:99"),
            ("10.0.0.1:99", "0.0.0.0:99"),
            ("[fe80::1]:99", "[::]:99"),
            ("127.0.0.1:99", "127.0.0.1:99"),
            ("localhost:99", "localhost:99"),
        ] {
            assert_eq!(listening(told), listened);
        }
    }
}
