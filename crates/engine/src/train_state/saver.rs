//! Saves on a thread, so that training goes on.

use std::sync::Arc;
use std::thread::JoinHandle;

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
    /// # Errors
    /// The error of the save before; the new snapshot is then not saved.
    pub fn submit(&mut self, snapshot: Snapshot) -> Result<(), StateError> {
        self.finish()?;
        let step = snapshot.state.step;
        let store = Arc::clone(&self.store);
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || store.save(&snapshot, &mut |_, _| {}))?;
        self.running = Some((step, thread));
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
