//! Removes old steps and what killed runs left.

use std::io;
use std::path::Path;

use checkpoint::commit::{CommitError, StagedDir};
use fs_err as fs;

use super::{StateError, Store};

/// End of the name of a step that is being removed.
const DELETED: &str = ".lapidary-deleted";
/// Ends of the names that [`StagedDir`] uses for a step that is being written, and for one that is being replaced.
const PARTIAL: &str = ".lapidary-partial";
const REPLACED: &str = ".lapidary-partial-old";

/// Removes one step. It loses its name first, so that no half of it is ever taken for a checkpoint.
pub(super) fn remove_step(dir: &Path, step: u64) -> io::Result<()> {
    let hidden = dir.join(format!(".{step}{DELETED}"));
    if hidden.exists() {
        fs::remove_dir_all(&hidden)?;
    }
    fs::rename(dir.join(step.to_string()), &hidden)?;
    fs::File::open(dir)?.sync_all()?;
    fs::remove_dir_all(&hidden)
}

/// Removes what killed runs left: unfinished saves and removals. What a live process is writing stays.
pub(super) fn remove_leftovers(dir: &Path) -> Result<(), StateError> {
    if !dir.is_dir() {
        return Ok(());
    }
    let mut names: Vec<String> = fs::read_dir(dir)?.filter_map(|e| e.ok()?.file_name().into_string().ok()).collect();
    // Longer ends first among those of one step: a replaced checkpoint is put back before its replacement is cleared.
    names.sort_by_key(|n| std::cmp::Reverse(n.len()));
    for name in &names {
        let step_of = |end: &str| {
            let step = name.strip_prefix('.')?.strip_suffix(end)?;
            step.parse::<u64>().is_ok_and(|s| s.to_string() == step).then(|| dir.join(step))
        };
        if step_of(DELETED).is_some() {
            fs::remove_dir_all(dir.join(name))?;
        } else if let Some(target) = step_of(REPLACED) {
            if target.exists() {
                fs::remove_dir_all(dir.join(name))?;
            } else {
                fs::rename(dir.join(name), &target)?;
            }
        } else if let Some(target) = step_of(PARTIAL) {
            match StagedDir::create(&target, true) {
                // Dropped without a commit, it is removed.
                Ok(staged) => drop(staged),
                Err(CommitError::Busy { .. }) => {}
                // The target is in no state to be replaced; the leftover is all the same not needed.
                Err(CommitError::NotACheckpoint { .. } | CommitError::NotADirectory { .. }) => {
                    fs::remove_dir_all(dir.join(name))?;
                }
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(())
}

impl Store {
    /// Removes complete steps beyond the number to keep, oldest first; never the one just saved, nor damaged ones, which a
    /// person may want to look at. Gives the steps removed, and what could not be.
    pub(super) fn remove_old(&self, saved: u64) -> (Vec<u64>, Vec<String>) {
        let (mut removed, mut problems) = (Vec::new(), Vec::new());
        let Some(keep) = self.options.keep else { return (removed, problems) };
        let mut old: Vec<u64> =
            self.complete().map(|(s, _)| s).filter(|&s| s != saved).skip(keep.saturating_sub(1)).collect();
        old.sort_unstable();
        for step in old {
            match remove_step(&self.dir, step) {
                Ok(()) => removed.push(step),
                Err(e) => problems.push(format!("step {step} could not be removed: {e}")),
            }
        }
        (removed, problems)
    }
}
