//! Output directories that appear complete or not at all.
//!
//! A writer fills a hidden sibling of its final directory and commits it last: every file is flushed, a marker that
//! says "incomplete" is taken away, and one rename makes the result visible. Whatever happens before that rename
//! leaves the final name as it was. The marker makes the readers of this crate refuse an abandoned sibling even when
//! somebody points at it by name.
//!
//! The sibling's name depends only on the final name, so that a later run finds what an interrupted one left: it
//! clears it ([`StagedDir::create`]) or continues it ([`StagedDir::resume`]). A file lock keeps two live writers apart.

use std::fs::TryLockError;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fs_err as fs;
use rustix::fs::{CWD, RenameFlags};

/// The file whose presence says that a directory is still being written.
pub const INCOMPLETE_MARKER: &str = ".lapidary-incomplete";

/// Files by which a directory is recognised as a checkpoint that `force` may replace.
const CHECKPOINT_FILES: [&str; 9] = [
    INCOMPLETE_MARKER,
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "lapidary_manifest.json",
    "manifest.ocdbt",
    "_METADATA",
    "_CHECKPOINT_METADATA",
    "commit_success.txt",
];

/// What can go wrong when an output directory is staged or committed.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The path has no last component, such as `/` or `..`.
    #[error("{path} cannot be written as a directory: it has no name of its own")]
    NoName {
        /// The path asked for.
        path: PathBuf,
    },
    /// Something lies there already.
    #[error("{path} exists already; choose another output or ask for it to be replaced (force)")]
    Exists {
        /// The path asked for.
        path: PathBuf,
    },
    /// The path is a file.
    #[error("{path} is a file, not a directory")]
    NotADirectory {
        /// The path asked for.
        path: PathBuf,
    },
    /// `force` was given, but what lies there is no checkpoint.
    #[error("{path} does not look like a checkpoint, so it is not replaced; remove it by hand if that is wanted")]
    NotACheckpoint {
        /// The path asked for.
        path: PathBuf,
    },
    /// Another live process writes the same output.
    #[error("{path} is being written by another process (it holds {staging})")]
    Busy {
        /// The path asked for.
        path: PathBuf,
        /// The directory that the other process holds.
        staging: PathBuf,
    },
    /// The file system has too little room.
    #[error("{path} needs {needed} bytes and its file system has {available} free")]
    Space {
        /// Where the output would go.
        path: PathBuf,
        /// Bytes to be written.
        needed: u64,
        /// Bytes free for this user.
        available: u64,
    },
    /// The file system refused; the source names the path.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Whether a directory carries the mark of an unfinished or abandoned write.
#[must_use]
pub fn is_incomplete(dir: &Path) -> bool {
    dir.join(INCOMPLETE_MARKER).symlink_metadata().is_ok()
}

/// Bytes that this user may still write to the file system of `path` (or of its nearest existing ancestor).
///
/// # Errors
/// When the file system cannot be asked.
pub fn available_bytes(path: &Path) -> Result<u64, CommitError> {
    let absolute = std::path::absolute(path)?;
    let existing = absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(existing)
        .map_err(|e| io::Error::new(io::Error::from(e).kind(), format!("free space of {}: {e}", existing.display())))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Checks that `needed` bytes fit the file system of `path`.
///
/// # Errors
/// [`CommitError::Space`] when they do not.
pub fn check_space(path: &Path, needed: u64) -> Result<(), CommitError> {
    let available = available_bytes(path)?;
    if needed > available {
        return Err(CommitError::Space { path: path.to_owned(), needed, available });
    }
    Ok(())
}

/// A directory under construction beside its final place.
///
/// Dropping it without [`commit`](StagedDir::commit) removes it, unless [`keep`](StagedDir::keep) was called.
#[derive(Debug)]
pub struct StagedDir {
    target: PathBuf,
    staging: PathBuf,
    force: bool,
    // Holds the lock; `None` after the directory was handed over.
    lock: Option<fs::File>,
    keep: bool,
}

impl StagedDir {
    /// Starts an empty directory that will become `target`. What an earlier, interrupted run left behind is cleared.
    ///
    /// An existing empty directory may be the target; any other needs `force`, which replaces a checkpoint (and
    /// nothing else) at commit, not before.
    ///
    /// # Errors
    /// When the target exists without `force`, is no checkpoint, is being written by another process, or the file
    /// system refuses.
    pub fn create(target: &Path, force: bool) -> Result<Self, CommitError> {
        let staged = Self::open(target, force)?;
        clear(&staged.staging)?;
        staged.mark()?;
        Ok(staged)
    }

    /// As [`create`](StagedDir::create), but what an interrupted run left is kept for the caller to continue.
    /// The flag says whether there was anything.
    ///
    /// # Errors
    /// As [`create`](StagedDir::create).
    pub fn resume(target: &Path, force: bool) -> Result<(Self, bool), CommitError> {
        let staged = Self::open(target, force)?;
        // Without its marker the directory is no unfinished write: an exchange with an old checkpoint may have been
        // interrupted before the old one was removed.
        let found = is_incomplete(&staged.staging);
        if !found {
            clear(&staged.staging)?;
            staged.mark()?;
        }
        Ok((staged, found))
    }

    fn open(target: &Path, force: bool) -> Result<Self, CommitError> {
        let target = resolve(target)?;
        check_target(&target, force)?;
        let staging = sibling(&target)?;
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        let lock = lock_dir(&target, &staging)?;
        Ok(StagedDir { target, staging, force, lock: Some(lock), keep: false })
    }

    fn mark(&self) -> Result<(), CommitError> {
        fs::write(
            self.staging.join(INCOMPLETE_MARKER),
            "This directory is being written, or the writing was interrupted. It is not a complete checkpoint.\n",
        )?;
        Ok(())
    }

    /// Where to write: a directory in the same file system as the target.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.staging
    }

    /// The final path, with symbolic links resolved.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Leaves the unfinished directory on disk when this value is dropped, so that a later run can
    /// [`resume`](StagedDir::resume).
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Flushes every file to the device and gives the directory its final name in one step.
    ///
    /// # Errors
    /// When something appeared at the target meanwhile, or the file system refuses. The target is then unchanged.
    pub fn commit(mut self) -> Result<(), CommitError> {
        sync_tree(&self.staging)?;
        // The target may have changed during a long write.
        check_target(&self.target, self.force)?;
        fs::remove_file(self.staging.join(INCOMPLETE_MARKER))?;
        sync_dir(&self.staging)?;
        if let Err(e) = self.publish() {
            // Still unfinished as far as anybody else is concerned.
            let _ = self.mark();
            return Err(e);
        }
        // From here the staging name is ours no more: nothing to clean up on drop.
        self.lock = None;
        if let Some(parent) = self.target.parent() {
            sync_dir(parent)?;
        }
        Ok(())
    }

    fn publish(&self) -> Result<(), CommitError> {
        let (from, to) = (&self.staging, &self.target);
        let occupied = to.is_dir() && fs::read_dir(to)?.next().is_some();
        if !occupied {
            // Plain rename replaces an empty directory and fails on a filled one.
            return Ok(fs::rename(from, to)?);
        }
        match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(fs::remove_dir_all(from)?),
            Err(_) => {
                // File systems without exchange: the target is absent for a moment.
                let mut name = from.file_name().unwrap_or_default().to_owned();
                name.push("-old");
                let old = from.with_file_name(name);
                fs::rename(to, &old)?;
                if let Err(e) = fs::rename(from, to) {
                    fs::rename(&old, to)?;
                    return Err(e.into());
                }
                Ok(fs::remove_dir_all(&old)?)
            }
        }
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if self.lock.is_some() && !self.keep {
            // Nobody is left to hear of a failure; the marker keeps the rest from being taken for a checkpoint.
            let _ = fs::remove_dir_all(&self.staging);
        }
    }
}

/// The hidden directory in which `target` is made, for other processes that write into it too.
///
/// # Errors
/// When the path has no last component.
pub fn staging_path(target: &Path) -> Result<PathBuf, CommitError> {
    sibling(&resolve(target)?)
}

fn sibling(target: &Path) -> Result<PathBuf, CommitError> {
    let name = target.file_name().ok_or_else(|| CommitError::NoName { path: target.to_owned() })?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".lapidary-partial");
    Ok(target.with_file_name(hidden))
}

/// Follows a symbolic link at the target, so that its destination is replaced and not the link.
fn resolve(target: &Path) -> Result<PathBuf, CommitError> {
    let absolute = std::path::absolute(target)?;
    if absolute.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
        return Ok(fs::canonicalize(&absolute)?);
    }
    match absolute.file_name() {
        Some(_) => Ok(absolute),
        None => Err(CommitError::NoName { path: target.to_owned() }),
    }
}

fn check_target(target: &Path, force: bool) -> Result<(), CommitError> {
    let Ok(meta) = target.symlink_metadata() else { return Ok(()) };
    let path = target.to_owned();
    if !meta.is_dir() {
        return Err(CommitError::NotADirectory { path });
    }
    if fs::read_dir(target)?.next().is_none() {
        return Ok(());
    }
    if !force {
        return Err(CommitError::Exists { path });
    }
    // Replacing deletes a whole tree; a mistyped home directory must survive it.
    let holds_one = |dir: &Path| CHECKPOINT_FILES.iter().any(|f| dir.join(f).is_file());
    let inside_it = std::env::current_dir().is_ok_and(|d| d.starts_with(target));
    if inside_it || !["", "items", "0", "0/items"].iter().any(|sub| holds_one(&target.join(sub))) {
        return Err(CommitError::NotACheckpoint { path });
    }
    Ok(())
}

/// Creates the directory if needed and locks it for this process.
fn lock_dir(target: &Path, staging: &Path) -> Result<fs::File, CommitError> {
    let busy = || CommitError::Busy { path: target.to_owned(), staging: staging.to_owned() };
    for _ in 0..16 {
        if let Err(e) = fs::create_dir(staging)
            && e.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(e.into());
        }
        let Ok(dir) = fs::File::open(staging) else { continue };
        match dir.file().try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(busy()),
            // Some network file systems know no locks: go on without.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(e)) => return Err(e.into()),
        }
        // Between opening and locking, its former owner may have renamed or removed it.
        let held = dir.metadata()?;
        if staging.symlink_metadata().is_ok_and(|m| m.is_dir() && m.ino() == held.ino() && m.dev() == held.dev()) {
            return Ok(dir);
        }
    }
    Err(busy())
}

fn clear(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            fs::File::open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_is_visible_before_the_commit() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("a/out");
        let staged = StagedDir::create(&target, false).unwrap();
        fs::create_dir(staged.path().join("d")).unwrap();
        fs::write(staged.path().join("d/x"), "data").unwrap();
        assert!(!target.exists());
        assert!(is_incomplete(staged.path()));
        staged.commit().unwrap();
        assert_eq!(fs::read_to_string(target.join("d/x")).unwrap(), "data");
        assert!(!is_incomplete(&target));
        assert_eq!(listing(target.parent().unwrap()), ["out"]);
    }

    #[test]
    fn a_dropped_directory_leaves_nothing() {
        let tmp = tempfile::tempdir().unwrap();
        let staged = StagedDir::create(&tmp.path().join("out"), false).unwrap();
        fs::write(staged.path().join("x"), "data").unwrap();
        drop(staged);
        assert!(listing(tmp.path()).is_empty());
    }

    #[test]
    fn an_interrupted_write_is_cleared_or_continued() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("out");
        let mut staged = StagedDir::create(&target, false).unwrap();
        fs::write(staged.path().join("x"), "data").unwrap();
        staged.keep();
        drop(staged);
        let (mut again, found) = StagedDir::resume(&target, false).unwrap();
        assert!(found && again.path().join("x").exists());
        again.keep();
        drop(again);
        let fresh = StagedDir::create(&target, false).unwrap();
        assert_eq!(listing(fresh.path()), [INCOMPLETE_MARKER]);
        drop(fresh);
        assert!(!StagedDir::resume(&target, false).unwrap().1);
    }

    #[test]
    fn existing_output_needs_force_and_must_be_a_checkpoint() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("out");
        fs::create_dir(&target).unwrap();
        drop(StagedDir::create(&target, false).unwrap());

        fs::write(target.join("diary.txt"), "dear").unwrap();
        assert!(matches!(StagedDir::create(&target, false), Err(CommitError::Exists { .. })));
        assert!(matches!(StagedDir::create(&target, true), Err(CommitError::NotACheckpoint { .. })));

        fs::write(target.join("config.json"), "{}").unwrap();
        let staged = StagedDir::create(&target, true).unwrap();
        fs::write(staged.path().join("new"), "data").unwrap();
        assert!(target.join("diary.txt").exists(), "the old one stays until the commit");
        staged.commit().unwrap();
        assert_eq!(listing(&target), ["new"]);
        assert_eq!(listing(tmp.path()), ["out"]);
    }

    #[test]
    fn what_appears_during_the_write_is_not_overwritten() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("out");
        let staged = StagedDir::create(&target, false).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("config.json"), "{}").unwrap();
        assert!(matches!(staged.commit(), Err(CommitError::Exists { .. })));
        assert_eq!(listing(tmp.path()), ["out"]);
        assert_eq!(listing(&target), ["config.json"]);
    }

    #[test]
    fn two_writers_do_not_meet() {
        let tmp = tempfile::tempdir().unwrap();
        let target = tmp.path().join("out");
        let _first = StagedDir::create(&target, false).unwrap();
        assert!(matches!(StagedDir::create(&target, false), Err(CommitError::Busy { .. })));
    }

    #[test]
    fn odd_targets_are_refused() {
        let tmp = tempfile::tempdir().unwrap();
        let file = tmp.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(matches!(StagedDir::create(&file, true), Err(CommitError::NotADirectory { .. })));
        assert!(matches!(StagedDir::create(Path::new("/"), true), Err(CommitError::NoName { .. })));
    }

    #[test]
    fn a_link_is_followed_not_replaced() {
        let tmp = tempfile::tempdir().unwrap();
        let real = tmp.path().join("real");
        fs::create_dir(&real).unwrap();
        let link = tmp.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let staged = StagedDir::create(&link, false).unwrap();
        fs::write(staged.path().join("x"), "data").unwrap();
        staged.commit().unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(listing(&real), ["x"]);
    }

    #[test]
    fn space_is_checked() {
        let tmp = tempfile::tempdir().unwrap();
        assert!(check_space(&tmp.path().join("not/yet/there"), 1).is_ok());
        assert!(matches!(check_space(tmp.path(), u64::MAX), Err(CommitError::Space { .. })));
    }
}
