//! Saves on a thread, so that training goes on.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use tensor::HostArray;

use super::{Saved, Snapshot, StateError, Store};

/// One save at a time on a thread of its own.
///
/// Dropping it waits for the save under way; its error is then lost, so call [`finish`](AsyncSaver::finish) first.
#[derive(Debug)]
pub struct AsyncSaver {
    store: Arc<Store>,
    running: Option<(u64, JoinHandle<Result<Saved, StateError>>)>,
    saved: Vec<Saved>,
}

impl AsyncSaver {
    /// A saver that has nothing to do yet.
    #[must_use]
    pub fn new(store: Arc<Store>) -> Self {
        AsyncSaver { store, running: None, saved: Vec::new() }
    }

    /// Waits for the save before, if one is under way, and starts this one.
    ///
    /// Arrays that the snapshot does not hold are asked of `fetch`, each once, when they are written; this returns when it
    /// has given the last.
    ///
    /// # Errors
    /// The error of the save before; the new snapshot is then not saved. Those of `fetch`.
    pub fn submit<E: From<StateError>>(
        &mut self,
        snapshot: Snapshot,
        fetch: &mut dyn FnMut(&str) -> Result<HostArray, E>,
    ) -> Result<(), E> {
        self.finish()?;
        let (step, later) = (snapshot.state.step, snapshot.later());
        let store = Arc::clone(&self.store);
        // One array at a time: the next is asked for when one has been written.
        let (ask, asked) = channel::<String>();
        let (give, given) = channel::<HostArray>();
        let save = move || {
            let mut fetch = |name: &str| {
                let gone = |_| StateError::Thread(format!("{name}, which was not given"));
                ask.send(name.to_owned()).map_err(|e| gone(e.to_string()))?;
                given.recv().map_err(|e| gone(e.to_string()))
            };
            store.save(&snapshot, &mut fetch, &mut |_, _| {})
        };
        let thread = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(save).map_err(StateError::from)?;
        self.running = Some((step, thread));
        for _ in 0..later {
            // A save that failed asks no more; its error comes with `finish`.
            let Ok(name) = asked.recv() else { break };
            match fetch(&name) {
                Ok(array) => {
                    if give.send(array).is_err() {
                        break;
                    }
                }
                Err(e) => {
                    // The save ends for want of the array, which is not the reason.
                    drop(give);
                    let _ = self.finish();
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    /// Waits for the save under way, if there is one.
    ///
    /// # Errors
    /// Its error.
    pub fn finish(&mut self) -> Result<(), StateError> {
        let Some((step, thread)) = self.running.take() else { return Ok(()) };
        let saved = thread.join().map_err(|_| StateError::Thread(format!("step {step}")))??;
        self.saved.push(saved);
        Ok(())
    }

    /// Whether a save is under way: [`submit`](AsyncSaver::submit) would wait.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.running.as_ref().is_some_and(|(_, thread)| !thread.is_finished())
    }

    /// What was saved since the last call, oldest first. Knows of a save only after the call that waited for it.
    pub fn take_saved(&mut self) -> Vec<Saved> {
        std::mem::take(&mut self.saved)
    }
}

impl Drop for AsyncSaver {
    fn drop(&mut self) {
        // A process that ends now would leave an unfinished directory.
        let _ = self.finish();
    }
}
