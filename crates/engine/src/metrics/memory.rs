//! Memory of this process and of the machine, as Linux tells it.

use fs_err as fs;

/// Memory of this process, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Resident now: the process's own pages, and pages of mapped files that happen to be in memory.
    pub resident: u64,
    /// The most that was resident at any time.
    pub peak: u64,
    /// Resident pages that no file backs: what the machine cannot take back.
    pub anonymous: u64,
}

/// Memory of the machine, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineMemory {
    /// All there is.
    pub total: u64,
    /// What programs can still get without swapping.
    pub available: u64,
}

/// Memory of this process, where the system tells it.
#[must_use]
pub fn process() -> Option<ProcessMemory> {
    parse_status(&fs::read_to_string("/proc/self/status").ok()?)
}

/// Memory of the machine, where the system tells it. Limits of a container are not taken into account.
#[must_use]
pub fn machine() -> Option<MachineMemory> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_status(text: &str) -> Option<ProcessMemory> {
    Some(ProcessMemory {
        resident: field(text, "VmRSS")?,
        peak: field(text, "VmHWM")?,
        anonymous: field(text, "RssAnon")?,
    })
}

fn parse_meminfo(text: &str) -> Option<MachineMemory> {
    Some(MachineMemory { total: field(text, "MemTotal")?, available: field(text, "MemAvailable")? })
}

/// A line `Name:   123 kB`, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parsing() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\nRssAnon:\t     512 kB\n";
        assert_eq!(
            parse_status(status),
            Some(ProcessMemory { resident: 1 << 20, peak: 2 << 20, anonymous: 512 << 10 })
        );
        assert_eq!(parse_status("VmRSS: 12\nVmHWM: 1 kB\nRssAnon: 1 kB"), None);
        assert_eq!(parse_meminfo("MemTotal: 99999999999999999999 kB\nMemAvailable: 1 kB"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process() {
        let m = process().unwrap();
        assert!(m.resident > 0 && m.resident <= m.peak && m.anonymous <= m.resident, "{m:?}");
        let machine = machine().unwrap();
        assert!(machine.available <= machine.total && m.resident < machine.total);
    }
}
