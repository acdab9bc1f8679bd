//! Which of how many processes this one is, and where process 0 listens: from flags, else the environment.

use std::fmt;

/// What a user says by hand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFlags {
    /// This process, from 0.
    pub process: Option<usize>,
    /// How many there are.
    pub count: Option<usize>,
    /// `host:port` of process 0.
    pub coordinator: Option<String>,
}

/// Who told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Flags.
    Flags,
    /// `LAPIDARY_PROCESS_ID`, `LAPIDARY_NUM_PROCESSES`, `LAPIDARY_COORDINATOR`.
    Environment,
    /// Variables of a Kubernetes JobSet as MaxText reads them: `JOB_INDEX`, `JOB_COMPLETION_INDEX`, `PROCESSES_IN_JOB`,
    /// `JAX_PROCESS_COUNT`, `JAX_COORDINATOR_ADDRESS`.
    JobSet,
    /// MaxText's variables for GPUs: `NODE_RANK`, `NNODES`, `JAX_COORDINATOR_IP`, `JAX_COORDINATOR_PORT`.
    NodeRank,
    /// Open MPI's launcher.
    Mpi,
    /// SLURM's `srun`.
    Slurm,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Flags => "flags",
            Origin::Environment => "LAPIDARY_* variables",
            Origin::JobSet => "JobSet variables",
            Origin::NodeRank => "NODE_RANK variables",
            Origin::Mpi => "Open MPI",
            Origin::Slurm => "SLURM",
        })
    }
}

/// One of several processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// This process, from 0.
    pub process: usize,
    /// How many there are: at least 2.
    pub count: usize,
    /// `host:port` of process 0. `None`: whoever started the processes connects them (MPI).
    pub coordinator: Option<String>,
    /// Who told.
    pub origin: Origin,
}

/// What is said about processes makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostsError {
    /// Part of it is missing.
    #[error("{origin} say that there are several processes, but not {missing}")]
    Missing {
        /// Who speaks.
        origin: Origin,
        /// What is not said.
        missing: &'static str,
    },
    /// A value that cannot be.
    #[error("{name}={value}: {reason}")]
    Value {
        /// The variable or flag.
        name: String,
        /// Its value.
        value: String,
        /// Why it cannot be.
        reason: String,
    },
}

/// Where process 0 listens if only its host is known.
const DEFAULT_PORT: u16 = 4821;

/// No job has more processes.
const MOST: usize = 1 << 16;

type Get<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Identity {
    /// Reads flags, then the environment through `get`. `None`: this process is alone.
    ///
    /// Later kinds of variables are looked at only where the earlier say nothing, because launchers nest: a Kubernetes job may
    /// run `mpirun`, and that is what counts. A count of 1 is alone.
    ///
    /// # Errors
    /// When a number is none, the process is not among those there are, or something is missing.
    pub fn find(flags: &HostFlags, get: Get<'_>) -> Result<Option<Identity>, HostsError> {
        let sources = [from_flags, own, mpi, job_set, node_rank, slurm];
        for source in sources {
            let Some(found) = source(flags, get)? else { continue };
            if found.process >= found.count {
                return Err(HostsError::Value {
                    name: format!("process id ({})", found.origin),
                    value: found.process.to_string(),
                    reason: format!("there are {} processes, counted from 0", found.count),
                });
            }
            return Ok((found.count > 1).then_some(found));
        }
        Ok(None)
    }
}

fn number(name: &str, value: &str) -> Result<usize, HostsError> {
    let wrong = |reason: &str| HostsError::Value { name: name.into(), value: value.into(), reason: reason.into() };
    let n: usize = value.trim().parse().map_err(|_| wrong("must be a whole number"))?;
    if n > MOST { Err(wrong("more processes than any job has")) } else { Ok(n) }
}

fn variable(get: Get<'_>, name: &str) -> Result<Option<usize>, HostsError> {
    get(name).filter(|v| !v.trim().is_empty()).map(|v| number(name, &v)).transpose()
}

/// `host`, `host:port` or `[v6]:port` as an address.
fn address(name: &str, value: &str, port: u16) -> Result<String, HostsError> {
    let value = value.trim();
    let wrong = |reason: &str| HostsError::Value { name: name.into(), value: value.into(), reason: reason.into() };
    if value.is_empty() {
        return Err(wrong("must be host:port"));
    }
    if value.starts_with('[') && value.ends_with(']') {
        return Ok(format!("{value}:{port}"));
    }
    match value.rsplit_once(':') {
        None => Ok(format!("{value}:{port}")),
        // A bare IPv6 address has several.
        Some((host, _)) if host.contains(':') && !host.starts_with('[') => Ok(format!("[{value}]:{port}")),
        Some((host, p)) if !host.is_empty() && p.parse::<u16>().is_ok_and(|p| p > 0) => Ok(value.to_owned()),
        Some(_) => Err(wrong("must be host:port with a port from 1 to 65535")),
    }
}

fn triple(
    origin: Origin,
    process: Option<usize>,
    count: Option<usize>,
    coordinator: Option<String>,
) -> Result<Option<Identity>, HostsError> {
    let missing = |missing| HostsError::Missing { origin, missing };
    match (process, count) {
        (None, None) if coordinator.is_none() => Ok(None),
        (_, Some(0)) => Err(HostsError::Value {
            name: "number of processes".into(),
            value: "0".into(),
            reason: "at least 1".into(),
        }),
        (None, Some(1)) => Ok(Some(Identity { process: 0, count: 1, coordinator, origin })),
        (None, _) => Err(missing("which one this is")),
        (_, None) => Err(missing("how many")),
        (Some(process), Some(count)) => {
            if coordinator.is_none() && count > 1 && origin != Origin::Mpi {
                return Err(missing("where process 0 is (host:port)"));
            }
            Ok(Some(Identity { process, count, coordinator, origin }))
        }
    }
}

fn from_flags(flags: &HostFlags, _: Get<'_>) -> Result<Option<Identity>, HostsError> {
    let at = flags.coordinator.as_deref().map(|c| address("--coordinator", c, DEFAULT_PORT)).transpose()?;
    triple(Origin::Flags, flags.process, flags.count, at)
}

fn own(_: &HostFlags, get: Get<'_>) -> Result<Option<Identity>, HostsError> {
    const COORDINATOR: &str = "LAPIDARY_COORDINATOR";
    let at = get(COORDINATOR).map(|c| address(COORDINATOR, &c, DEFAULT_PORT)).transpose()?;
    let process = variable(get, "LAPIDARY_PROCESS_ID")?;
    triple(Origin::Environment, process, variable(get, "LAPIDARY_NUM_PROCESSES")?, at)
}

fn mpi(_: &HostFlags, get: Get<'_>) -> Result<Option<Identity>, HostsError> {
    let count = variable(get, "OMPI_COMM_WORLD_SIZE")?;
    triple(Origin::Mpi, variable(get, "OMPI_COMM_WORLD_RANK")?, count, None)
}

fn job_set(_: &HostFlags, get: Get<'_>) -> Result<Option<Identity>, HostsError> {
    let Some(count) = variable(get, "JAX_PROCESS_COUNT")? else { return Ok(None) };
    let Some(index) = variable(get, "JOB_COMPLETION_INDEX")? else { return Ok(None) };
    let job = variable(get, "JOB_INDEX")?.unwrap_or(0);
    let each = variable(get, "PROCESSES_IN_JOB")?.unwrap_or(count);
    const ADDRESS: &str = "JAX_COORDINATOR_ADDRESS";
    let at = get(ADDRESS).map(|c| address(ADDRESS, &c, DEFAULT_PORT)).transpose()?;
    triple(Origin::JobSet, Some(job.saturating_mul(each).saturating_add(index)), Some(count), at)
}

fn node_rank(_: &HostFlags, get: Get<'_>) -> Result<Option<Identity>, HostsError> {
    let (Some(rank), Some(count)) = (variable(get, "NODE_RANK")?, variable(get, "NNODES")?) else { return Ok(None) };
    let port = match get("JAX_COORDINATOR_PORT") {
        Some(p) => p.trim().parse().map_err(|_| HostsError::Value {
            name: "JAX_COORDINATOR_PORT".into(),
            value: p.clone(),
            reason: "must be a port".into(),
        })?,
        None => DEFAULT_PORT,
    };
    const IP: &str = "JAX_COORDINATOR_IP";
    let at = get(IP).map(|c| address(IP, &c, port)).transpose()?;
    triple(Origin::NodeRank, Some(rank), Some(count), at)
}

fn slurm(_: &HostFlags, get: Get<'_>) -> Result<Option<Identity>, HostsError> {
    // Only what `srun` started: a shell in an allocation is one process.
    let Some(process) = variable(get, "SLURM_PROCID")? else { return Ok(None) };
    let Some(count) = variable(get, "SLURM_STEP_NUM_TASKS")? else { return Ok(None) };
    let list = get("SLURM_STEP_NODELIST").or_else(|| get("SLURM_JOB_NODELIST"));
    let Some(host) = list.as_deref().and_then(first_host) else {
        return Err(HostsError::Missing { origin: Origin::Slurm, missing: "the nodes of the step" });
    };
    // Jobs on one machine must not meet: the port follows from the job.
    let job = get("SLURM_JOB_ID").and_then(|j| j.trim().parse::<u64>().ok()).unwrap_or(0);
    let port = 61_440 + job % 4096;
    triple(Origin::Slurm, Some(process), Some(count), Some(format!("{host}:{port}")))
}

/// The first host of SLURM's compact list: `node[07-09,12],other` is `node07`.
fn first_host(list: &str) -> Option<String> {
    let list = list.trim();
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (prefix, rest) = list.split_at(end);
    let host = match rest.strip_prefix('[') {
        None => prefix.to_owned(),
        Some(inside) => {
            let (numbers, after) = inside.split_once(']')?;
            let first = numbers.split([',', '-']).next()?;
            let suffix = after.split([',', '[']).next()?;
            format!("{prefix}{first}{suffix}")
        }
    };
    let sound = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    (!host.is_empty() && host.chars().all(sound)).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(set: &[(&str, &str)]) -> Result<Option<Identity>, HostsError> {
        find_with(&HostFlags::default(), set)
    }

    fn find_with(flags: &HostFlags, set: &[(&str, &str)]) -> Result<Option<Identity>, HostsError> {
        Identity::find(flags, &|name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    }

    fn some(process: usize, count: usize, coordinator: Option<&str>, origin: Origin) -> Option<Identity> {
        Some(Identity { process, count, coordinator: coordinator.map(str::to_owned), origin })
    }

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(find(&[]).unwrap(), None);
        let own = [("LAPIDARY_PROCESS_ID", "1"), ("LAPIDARY_NUM_PROCESSES", "2"), ("LAPIDARY_COORDINATOR", "a:7")];
        assert_eq!(find(&own).unwrap(), some(1, 2, Some("a:7"), Origin::Environment));
        let mpi = [("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4")];
        assert_eq!(find(&mpi).unwrap(), some(3, 4, None, Origin::Mpi));
        let jobs = [
            ("JAX_PROCESS_COUNT", "8"),
            ("JOB_COMPLETION_INDEX", "1"),
            ("JOB_INDEX", "1"),
            ("PROCESSES_IN_JOB", "4"),
            ("JAX_COORDINATOR_ADDRESS", "job-0-0.job"),
        ];
        assert_eq!(find(&jobs).unwrap(), some(5, 8, Some("job-0-0.job:4821"), Origin::JobSet));
        let ranks =
            [("NODE_RANK", "0"), ("NNODES", "2"), ("JAX_COORDINATOR_IP", "::1"), ("JAX_COORDINATOR_PORT", "99")];
        assert_eq!(find(&ranks).unwrap(), some(0, 2, Some("[::1]:99"), Origin::NodeRank));
        let slurm = [
            ("SLURM_PROCID", "2"),
            ("SLURM_STEP_NUM_TASKS", "4"),
            ("SLURM_STEP_NODELIST", "node[07-09,12],x"),
            ("SLURM_JOB_ID", "8193"),
        ];
        assert_eq!(find(&slurm).unwrap(), some(2, 4, Some("node07:61441"), Origin::Slurm));
    }

    #[test]
    fn flags_come_first_and_one_process_is_alone() {
        let flags = HostFlags { process: Some(0), count: Some(2), coordinator: Some("h".into()) };
        let mpi = [("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4")];
        assert_eq!(find_with(&flags, &mpi).unwrap(), some(0, 2, Some("h:4821"), Origin::Flags));
        assert_eq!(find(&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")]).unwrap(), None);
        // A shell in an allocation.
        assert_eq!(find(&[("SLURM_PROCID", "0"), ("SLURM_JOB_NODELIST", "a")]).unwrap(), None);
    }

    #[test]
    fn what_makes_no_sense_is_said() {
        for (set, part) in [
            (&[("LAPIDARY_PROCESS_ID", "0")][..], "not how many"),
            (&[("LAPIDARY_NUM_PROCESSES", "2")], "not which one this is"),
            (&[("LAPIDARY_PROCESS_ID", "0"), ("LAPIDARY_NUM_PROCESSES", "2")], "where process 0 is"),
            (&[("LAPIDARY_NUM_PROCESSES", "0")], "at least 1"),
            (
                &[("LAPIDARY_PROCESS_ID", "x"), ("LAPIDARY_NUM_PROCESSES", "2")],
                "LAPIDARY_PROCESS_ID=x: must be a whole",
            ),
            (&[("OMPI_COMM_WORLD_RANK", "4"), ("OMPI_COMM_WORLD_SIZE", "4")], "there are 4 processes, counted from 0"),
            (&[("LAPIDARY_COORDINATOR", "a:0")], "port from 1"),
            (&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "2")], "nodes of the step"),
            (&[("NODE_RANK", "0"), ("NNODES", "99999999")], "more processes"),
        ] {
            let message = find(set).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn compact_lists_of_nodes() {
        for (list, host) in [
            ("a", Some("a")),
            ("a,b", Some("a")),
            ("gpu[3,5]", Some("gpu3")),
            ("r[1-2]-ib,x", Some("r1-ib")),
            ("[", None),
            ("", None),
            ("a b", None),
        ] {
            assert_eq!(first_host(list).as_deref(), host, "{list}");
        }
    }
}
