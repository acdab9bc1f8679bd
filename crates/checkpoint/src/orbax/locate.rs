//! From the path that a user gives to the directory that holds the arrays.

use std::path::{Path, PathBuf};

use fs_err as fs;

use super::OrbaxError;
use super::container::{MANIFEST, PROCESS};
use super::tree::{CHECKPOINT_METADATA, COMMIT, METADATA};
use crate::commit::is_incomplete;

/// Part of the names of directories that Orbax has not finished.
const TEMPORARY: &str = ".orbax-checkpoint-tmp";

/// Names that Orbax and MaxText give to the item with the weights, preferred first.
const ITEMS: [&str; 6] = ["items", "model_params", "state", "params", "default", "pytree"];

/// The directories of one checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// The directory that holds the arrays.
    pub items: PathBuf,
    /// The step directory around it, if there is one.
    pub step_dir: Option<PathBuf>,
    /// The step, if the directory's name says so.
    pub step: Option<u64>,
    /// What else was there and was passed over.
    pub notes: Vec<String>,
}

/// Whether a path leads to an Orbax checkpoint, finished or not: the items, a step or a run with steps.
#[must_use]
pub fn is_orbax(path: &Path) -> bool {
    looks_like_items(path)
        || item_of(path).is_some()
        || [path.to_owned(), path.join("checkpoints")]
            .iter()
            .any(|p| steps(p).iter().any(|(_, s)| item_of(s).is_some()))
}

/// Finds the arrays: `path` may be the items themselves, a step, or a run of which the newest finished step is taken.
///
/// # Errors
/// When there is nothing of the kind, or only something unfinished.
pub fn locate(path: &Path) -> Result<Located, OrbaxError> {
    if !path.is_dir() {
        let why = if path.exists() { "it is a file, not a directory" } else { "it does not exist" };
        return Err(OrbaxError::NotFound { path: path.to_owned(), why: why.to_owned() });
    }
    if looks_like_items(path) {
        let absolute = std::path::absolute(path)?;
        for dir in absolute.ancestors().take(2) {
            check_finished(dir)?;
        }
        let parent = absolute.parent().filter(|p| step_number(p).is_some() || p.join(CHECKPOINT_METADATA).is_file());
        return Ok(Located {
            items: path.to_owned(),
            step_dir: parent.map(Path::to_owned),
            step: parent.and_then(step_number),
            notes: vec![],
        });
    }
    if let Some(items) = item_of(path) {
        check_finished(&std::path::absolute(path)?)?;
        check_finished(&items)?;
        return Ok(Located { items, step_dir: Some(path.to_owned()), step: step_number(path), notes: vec![] });
    }
    for run in [path.to_owned(), path.join("checkpoints")] {
        if let Some(found) = newest(&run)? {
            return Ok(found);
        }
    }
    let why = "no array data, no step with an `items` directory and no run with steps was found there".to_owned();
    Err(OrbaxError::NotFound { path: path.to_owned(), why })
}

fn looks_like_items(path: &Path) -> bool {
    if path.join(MANIFEST).is_file() || path.join(METADATA).is_file() {
        return true;
    }
    let Ok(entries) = fs::read_dir(path) else { return false };
    entries.flatten().any(|e| {
        let p = e.path();
        let process = e.file_name().to_string_lossy().starts_with(PROCESS) && p.join(MANIFEST).is_file();
        process || p.join("zarr.json").is_file() || p.join(".zarray").is_file()
    })
}

/// The item with the weights inside a step directory.
fn item_of(step: &Path) -> Option<PathBuf> {
    let named = ITEMS.iter().map(|n| step.join(n)).find(|p| p.is_dir() && looks_like_items(p));
    named.or_else(|| {
        // Another name, if it is the only one.
        step.join(CHECKPOINT_METADATA).is_file().then_some(())?;
        let mut found = fs::read_dir(step)
            .ok()?
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.is_dir() && !p.to_string_lossy().contains(TEMPORARY) && looks_like_items(p));
        let only = found.next()?;
        found.next().is_none().then_some(only)
    })
}

/// The number in the name of a step directory: `12`, or with a prefix `step_12`.
fn step_number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let digits = name.rsplit('_').next()?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok()
}

fn steps(run: &Path) -> Vec<(u64, PathBuf)> {
    let Ok(entries) = fs::read_dir(run) else { return Vec::new() };
    let mut found: Vec<(u64, PathBuf)> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.is_dir())
        .filter_map(|p| step_number(&p).map(|n| (n, p)))
        .collect();
    found.sort();
    found
}

/// The newest finished step of a run.
fn newest(run: &Path) -> Result<Option<Located>, OrbaxError> {
    let steps: Vec<(u64, PathBuf)> = steps(run).into_iter().filter(|(_, p)| item_of(p).is_some()).collect();
    // Where other steps say that they were committed, one that does not was interrupted (as on object stores, which know
    // no rename). Where none says so, they were written by a version that did not.
    let says_so = |p: &Path| p.join(COMMIT).is_file();
    let expected = steps.iter().any(|(_, p)| says_so(p));
    let mut notes = Vec::new();
    let mut last_error = None;
    for (step, path) in steps.into_iter().rev() {
        let Some(items) = item_of(&path) else { continue };
        let unfinished = check_finished(&path).and_then(|()| check_finished(&items)).err().or_else(|| {
            (expected && !says_so(&path)).then(|| OrbaxError::Uncommitted {
                path: path.clone(),
                why: format!("it has no {COMMIT} and other steps have"),
            })
        });
        match unfinished {
            None => return Ok(Some(Located { items, step_dir: Some(path), step: Some(step), notes })),
            Some(e) => {
                notes.push(format!("step {step} was passed over: {e}"));
                last_error = Some(e);
            }
        }
    }
    last_error.map_or(Ok(None), Err)
}

fn check_finished(dir: &Path) -> Result<(), OrbaxError> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let why = if name.contains(TEMPORARY) {
        "its name is that of a temporary directory"
    } else if is_incomplete(dir) {
        "it carries the mark of an unfinished write"
    } else {
        return Ok(());
    };
    Err(OrbaxError::Uncommitted { path: dir.to_owned(), why: why.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(path: &Path) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join(METADATA), "{}").unwrap();
    }

    #[test]
    fn every_kind_of_path_leads_to_the_items() {
        let tmp = tempfile::tempdir().unwrap();
        let run = tmp.path().join("run");
        for step in ["0", "5", "10"] {
            item(&run.join("checkpoints").join(step).join("items"));
        }
        let want = run.join("checkpoints/10/items");
        for path in [run.clone(), run.join("checkpoints"), run.join("checkpoints/10"), want.clone()] {
            let found = locate(&path).unwrap();
            assert_eq!((found.items, found.step), (want.clone(), Some(10)), "{}", path.display());
            assert!(is_orbax(&path));
        }
        let nothing = tmp.path().join("nothing");
        fs::create_dir(&nothing).unwrap();
        assert!(!is_orbax(&nothing));
        assert!(matches!(locate(&nothing), Err(OrbaxError::NotFound { .. })));
        assert!(matches!(locate(&tmp.path().join("absent")), Err(OrbaxError::NotFound { .. })));
    }

    #[test]
    fn unfinished_steps_are_passed_over() {
        let tmp = tempfile::tempdir().unwrap();
        for step in ["1", "2", "3", "4.orbax-checkpoint-tmp"] {
            item(&tmp.path().join(step).join("items"));
        }
        for step in ["1", "2"] {
            fs::write(tmp.path().join(step).join(COMMIT), "").unwrap();
        }
        let found = locate(tmp.path()).unwrap();
        assert_eq!(found.step, Some(2));
        assert_eq!(found.notes.len(), 1);
        // An explicit path is taken at its word: local directories of older versions have no such file.
        assert_eq!(locate(&tmp.path().join("3")).unwrap().step, Some(3));
        fs::write(tmp.path().join("2").join(crate::commit::INCOMPLETE_MARKER), "").unwrap();
        assert_eq!(locate(tmp.path()).unwrap().step, Some(1));
        for path in ["4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp/items", "2", "2/items"] {
            assert!(matches!(locate(&tmp.path().join(path)), Err(OrbaxError::Uncommitted { .. })), "{path}");
        }
    }

    #[test]
    fn other_item_names() {
        let tmp = tempfile::tempdir().unwrap();
        for name in ["model_params", "state", "weights"] {
            let step = tmp.path().join(format!("{name}/7"));
            item(&step.join(name));
            fs::write(step.join(CHECKPOINT_METADATA), "{}").unwrap();
            assert_eq!(locate(&step).unwrap().items, step.join(name));
        }
        // A bare tree, as `save_params_to_path` leaves it.
        let bare = tmp.path().join("bare");
        item(&bare);
        let found = locate(&bare).unwrap();
        assert_eq!((found.step_dir, found.step), (None, None));
    }
}
