//! The download of a wheel through the user's own installer, which knows the user's mirror and proxy.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::hash;
use super::locate::LocateError;
use super::table::PinnedPlugin;

/// No plugin is larger; a wheel that claims so is not unpacked.
const LARGEST_LIBRARY: u64 = 4 << 30;

/// A program and its first arguments, which understands the arguments of `pip` after those.
type Installer = (&'static str, &'static [&'static str]);

/// The installers, in the order they are tried. uv itself cannot download a wheel; it can run pip in an environment
/// of its own.
const INSTALLERS: [Installer; 5] = [
    ("python3", &["-m", "pip"]),
    ("python", &["-m", "pip"]),
    ("pip3", &[]),
    ("pip", &[]),
    ("uv", &["tool", "run", "--quiet", "pip"]),
];

/// A file of a wheel, and where it goes.
pub(super) struct Member<'a> {
    /// Its path inside the wheel.
    pub(super) path: &'static str,
    /// The file it becomes.
    pub(super) to: &'a Path,
    /// The SHA-256 it must have.
    pub(super) sha256: &'static str,
    /// What it is called in messages.
    pub(super) what: &'static str,
}

/// A wheel of the table.
#[derive(Clone, Copy)]
pub(super) struct Wheel {
    pub(super) package: &'static str,
    pub(super) version: &'static str,
    pub(super) sha256: &'static str,
}

/// Fetches a plugin to `target`, which appears complete and verified, or not at all.
pub(crate) fn fetch(plugin: &'static PinnedPlugin, target: &Path, progress: &dyn Fn(&str)) -> Result<(), LocateError> {
    fetch_with(&INSTALLERS, plugin, target, progress)
}

fn fetch_with(
    installers: &[Installer],
    plugin: &'static PinnedPlugin,
    target: &Path,
    progress: &dyn Fn(&str),
) -> Result<(), LocateError> {
    let wheel = Wheel { package: plugin.package, version: plugin.version, sha256: plugin.pin.wheel };
    let member = Member { path: plugin.file, to: target, sha256: plugin.pin.library, what: "the plugin" };
    fetch_members_with(installers, wheel, &[member], progress)
}

/// Fetches files of a wheel, each of which appears complete and verified, or not at all.
pub(super) fn fetch_members(wheel: Wheel, members: &[Member<'_>], progress: &dyn Fn(&str)) -> Result<(), LocateError> {
    fetch_members_with(&INSTALLERS, wheel, members, progress)
}

fn fetch_members_with(
    installers: &[Installer],
    wheel: Wheel,
    members: &[Member<'_>],
    progress: &dyn Fn(&str),
) -> Result<(), LocateError> {
    let Some(first) = members.first() else { return Ok(()) };
    let directory = first.to.parent().unwrap_or(Path::new("."));
    fs_err::create_dir_all(directory)?;
    // Beside the target, so that the last step is a rename within one file system.
    let work = WorkDirectory::new(directory)?;
    let name = format!("{} {}", wheel.package, wheel.version);
    progress(&format!("downloading {name}"));
    download(installers, wheel, first.path, &work.0)?;
    let file = the_wheel(&work.0)?;
    progress(&format!("verifying {name}"));
    let got = hash::sha256_of_file(&file)?;
    if got != wheel.sha256 {
        return Err(LocateError::WrongHash { what: "the wheel", path: file, got, wanted: wheel.sha256 });
    }
    progress(&format!("unpacking {name}"));
    for member in members {
        let part = work.0.join("member.part");
        unpack(&file, member.path, &part)?;
        let got = hash::sha256_of_file(&part)?;
        if got != member.sha256 {
            return Err(LocateError::WrongHash { what: member.what, path: part, got, wanted: member.sha256 });
        }
        if let Some(parent) = member.to.parent() {
            fs_err::create_dir_all(parent)?;
        }
        executable(&part, member.to)?;
        fs_err::rename(&part, member.to)?;
    }
    Ok(())
}

/// Lets a program of a toolkit be run: archives do not always say that it is one.
fn executable(part: &Path, to: &Path) -> io::Result<()> {
    #[cfg(unix)]
    if to.parent().is_some_and(|p| p.ends_with("bin")) {
        use std::os::unix::fs::PermissionsExt as _;
        fs_err::set_permissions(part, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// A directory of this process's own, removed when done.
struct WorkDirectory(PathBuf);

impl WorkDirectory {
    fn new(parent: &Path) -> io::Result<Self> {
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.subsec_nanos());
        let path = parent.join(format!(".fetch-{}-{nanos}", std::process::id()));
        fs_err::create_dir(&path)?;
        Ok(WorkDirectory(path))
    }
}

impl Drop for WorkDirectory {
    fn drop(&mut self) {
        let _ = fs_err::remove_dir_all(&self.0);
    }
}

/// Runs the first installer that starts. One that starts and fails ends the search: its message is the one to show.
fn download(installers: &[Installer], wheel: Wheel, file: &'static str, into: &Path) -> Result<(), LocateError> {
    let requirement = format!("{}=={}", wheel.package, wheel.version);
    let pip: [&OsStr; 10] = [
        "download".as_ref(),
        "--quiet".as_ref(),
        "--disable-pip-version-check".as_ref(),
        "--no-deps".as_ref(),
        "--only-binary=:all:".as_ref(),
        // Wheels differ by Python version even where the plugin inside does not; the pinned hash is of this one,
        // whatever Python is here.
        "--python-version=3.12".as_ref(),
        "--dest".as_ref(),
        into.as_os_str(),
        "--".as_ref(),
        requirement.as_ref(),
    ];
    let mut tried = Vec::new();
    for (program, prefix) in installers.iter().copied() {
        let mut command = Command::new(program);
        command.args(prefix).args(pip).stdin(Stdio::null());
        let shown = [&[program], prefix, &["download", &requirement]].concat().join(" ");
        let output = match command.output() {
            Ok(output) => output,
            Err(_) => {
                tried.push(format!("{program}: not found"));
                continue;
            }
        };
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr);
        if message.contains("No module named pip") {
            tried.push(format!("{program}: has no pip"));
            continue;
        }
        return Err(LocateError::DownloadFailed { command: shown, message: tail(&message), file });
    }
    Err(LocateError::NoInstaller { package: wheel.package, version: wheel.version, tried: tried.join(", ") })
}

/// The last lines of what a command printed, on one line.
fn tail(message: &str) -> String {
    let lines: Vec<_> = message.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    if lines.is_empty() {
        return "it printed nothing".to_owned();
    }
    lines[lines.len().saturating_sub(3)..].join(" | ")
}

fn the_wheel(directory: &Path) -> Result<PathBuf, LocateError> {
    let mut wheels = Vec::new();
    for entry in fs_err::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "whl") {
            wheels.push(path);
        }
    }
    match wheels.pop() {
        Some(wheel) if wheels.is_empty() => Ok(wheel),
        _ => Err(LocateError::Unpack { path: directory.to_owned(), reason: "not exactly one wheel in it".to_owned() }),
    }
}

/// Writes one member of a wheel (a ZIP archive) to a file.
fn unpack(wheel: &Path, member: &str, to: &Path) -> Result<(), LocateError> {
    let failed = |reason: String| LocateError::Unpack { path: wheel.to_owned(), reason };
    let mut archive =
        zip::ZipArchive::new(fs_err::File::open(wheel)?).map_err(|e| failed(format!("not a ZIP archive: {e}")))?;
    let mut member = archive.by_name(member).map_err(|e| failed(format!("{member}: {e}")))?;
    if member.size() > LARGEST_LIBRARY {
        return Err(failed(format!("a member of {} bytes", member.size())));
    }
    let mut out = fs_err::File::create(to)?;
    // The limit again: what an archive says about a size is only a claim.
    let copied =
        io::copy(&mut io::Read::take(&mut member, LARGEST_LIBRARY + 1), &mut out).map_err(|e| failed(e.to_string()))?;
    if copied > LARGEST_LIBRARY {
        return Err(failed("a member larger than it claims".to_owned()));
    }
    out.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn wheel(path: &Path, member: &str, bytes: &[u8]) {
        let mut zip = zip::ZipWriter::new(fs_err::File::create(path).unwrap());
        zip.start_file(member, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
        zip.finish().unwrap();
    }

    #[test]
    fn a_member_is_unpacked_and_a_bad_wheel_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.whl");
        wheel(&path, "p/plugin.so", b"library");
        let to = dir.path().join("out");
        unpack(&path, "p/plugin.so", &to).unwrap();
        assert_eq!(fs_err::read(&to).unwrap(), b"library");
        assert!(unpack(&path, "other.so", &to).unwrap_err().to_string().contains("other.so"));
        fs_err::write(&path, b"no archive").unwrap();
        assert!(unpack(&path, "p/plugin.so", &to).unwrap_err().to_string().contains("a.whl"));
    }

    #[test]
    fn exactly_one_wheel_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        assert!(the_wheel(dir.path()).is_err());
        fs_err::write(dir.path().join("a.whl"), b"").unwrap();
        assert!(the_wheel(dir.path()).is_ok());
        fs_err::write(dir.path().join("b.whl"), b"").unwrap();
        assert!(the_wheel(dir.path()).is_err());
    }

    #[test]
    fn the_end_of_a_message_is_shown() {
        assert_eq!(tail("a\n\nb\nc\n d \n"), "b | c | d");
        assert_eq!(tail("\n"), "it printed nothing");
    }

    /// What comes of an installer that is this shell script, whose `$7` is the directory to download to.
    fn fetch_by(script: Option<&'static str>) -> (String, usize) {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("plugin").join("p.so");
        let installers: &[Installer] = match script {
            None => &[("no-such-installer", &[]), ("no-such-installer-either", &[])],
            Some("offline") => &[("sh", &["-c", "echo no network >&2; exit 1"]), ("no-such-installer", &[])],
            Some("no pip") => &[("sh", &["-c", "echo No module named pip >&2; exit 1"])],
            Some("silent") => &[("sh", &["-c", "exit 0"])],
            Some(_) => &[("sh", &["-c", "echo x > \"$7/a.whl\""])],
        };
        let plugin = &super::super::table::PINNED[0];
        let error = fetch_with(installers, plugin, &target, &|_| {}).unwrap_err();
        let left = fs_err::read_dir(target.parent().unwrap()).unwrap().count();
        (error.to_string(), left)
    }

    #[cfg(unix)]
    #[test]
    fn failures_say_what_happened_and_leave_nothing_behind() {
        for (script, part) in [
            (None, "neither runs here (no-such-installer: not found, no-such-installer-either: not found)"),
            (Some("offline"), "failed: no network; if this machine is offline"),
            (Some("no pip"), "sh: has no pip"),
            (Some("silent"), "not exactly one wheel"),
            (Some("tampered"), "has SHA-256 73cb3858a687a8494ca3323053016282f3dad39d42cf62ca4e79dda2aac7d9ac"),
        ] {
            let (message, left) = fetch_by(script);
            assert!(message.contains(part), "{message}");
            assert_eq!(left, 0, "{script:?}");
        }
    }
}
