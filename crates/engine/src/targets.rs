//! Machines one does not have: a table of devices, how many there are of them and how they are connected.
//!
//! Figures are published ones of the vendors, per device as the runtime counts devices; see [`Target::source`]. Links are what a
//! device can send, in one direction, to its neighbours in the same slice or host and to other hosts.

use std::fmt::Write as _;

use gemma4::memory::Compiler;
use pjrt::NamedValue;

use crate::peak;

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// Name on a command line: `v5e`, `h100`, ...
    pub name: &'static str,
    /// The plugin's platform.
    pub platform: &'static str,
    /// Its entry in [`peak::DEVICES`].
    pub peak: Option<&'static str>,
    /// Bytes of memory that programs can use.
    pub memory: u64,
    /// Bytes a second of that memory.
    pub bandwidth: f64,
    /// Bytes a second to the other devices of the slice or host, one direction.
    pub link: f64,
    /// Bytes a second to other hosts, one direction.
    pub network: f64,
    /// Where the figures are published.
    pub source: &'static str,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Cpu,
    /// The word before the number of chips in `TPU_ACCELERATOR_TYPE`, and how many that number counts a chip for.
    Tpu {
        accelerator: &'static str,
        cores: usize,
        /// See [`Compiler::Tiles`].
        fills: Option<u64>,
    },
    Gpu(Gpu),
}

/// What XLA's code generator asks about a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Gpu {
    title: &'static str,
    compute: (u32, u32),
    multiprocessors: u32,
    f32_units: u32,
    threads: u32,
    /// Bytes of shared memory of a multiprocessor, and the most of it for one block.
    shared: (u32, u32),
    l2: u64,
    clock_ghz: f64,
}

const GIB: u64 = 1 << 30;
const TPU: &str = "Google Cloud TPU documentation, system architecture of the generation";

/// Every kind of device.
pub const TARGETS: &[Target] = &[
    Target {
        name: "cpu",
        platform: "cpu",
        peak: None,
        memory: 0,
        bandwidth: 0.0,
        link: 0.0,
        network: 0.0,
        source: "virtual devices of this machine",
        kind: Kind::Cpu,
    },
    Target {
        name: "v5e",
        platform: "tpu",
        peak: Some("tpu-v5e"),
        memory: 16 * GIB,
        bandwidth: 819e9,
        link: 200e9,
        network: 3.1e9,
        source: TPU,
        // Of 16 GiB, 15.75 are for programs. Gathers are not asynchronous on this generation unless flags ask for it; of 8 programs
        // compiled for it, 7 had copies made early, of 6 for v6e and v5p one (docs/guide/plan.md).
        kind: Kind::Tpu { accelerator: "v5litepod", cores: 1, fills: Some(63 * GIB / 4) },
    },
    Target {
        name: "v6e",
        platform: "tpu",
        peak: Some("tpu-v6e"),
        memory: 32 * GIB,
        bandwidth: 1640e9,
        link: 400e9,
        network: 12.5e9,
        source: TPU,
        kind: Kind::Tpu { accelerator: "v6e", cores: 1, fills: None },
    },
    Target {
        name: "v5p",
        platform: "tpu",
        peak: Some("tpu-v5p"),
        memory: 95 * GIB,
        bandwidth: 2765e9,
        link: 600e9,
        network: 6.25e9,
        source: TPU,
        kind: Kind::Tpu { accelerator: "v5p", cores: 2, fills: None },
    },
    Target {
        name: "h100",
        platform: "cuda13",
        peak: Some("h100-sxm"),
        memory: 80 * GIB,
        bandwidth: 3350e9,
        link: 450e9,
        network: 50e9,
        source: "NVIDIA H100 datasheet (SXM) and architecture white paper; one 400 Gbit/s adapter a device",
        kind: Kind::Gpu(Gpu {
            title: "NVIDIA H100 80GB HBM3",
            compute: (9, 0),
            multiprocessors: 132,
            f32_units: 128,
            threads: 2048,
            shared: (228 << 10, 227 << 10),
            l2: 50 << 20,
            clock_ghz: 1.98,
        }),
    },
    Target {
        name: "a100",
        platform: "cuda13",
        peak: Some("a100"),
        memory: 80 * GIB,
        bandwidth: 2039e9,
        link: 300e9,
        network: 25e9,
        source: "NVIDIA A100 datasheet (80 GB SXM) and architecture white paper; one 200 Gbit/s adapter a device",
        kind: Kind::Gpu(Gpu {
            title: "NVIDIA A100-SXM4-80GB",
            compute: (8, 0),
            multiprocessors: 108,
            f32_units: 64,
            threads: 2048,
            shared: (164 << 10, 163 << 10),
            l2: 40 << 20,
            clock_ghz: 1.41,
        }),
    },
    Target {
        name: "l4",
        platform: "cuda13",
        peak: Some("l4"),
        memory: 24 * GIB,
        bandwidth: 300e9,
        link: 32e9,
        network: 12.5e9,
        source: "NVIDIA L4 datasheet and Ada architecture white paper; PCIe 4.0 x16, one 100 Gbit/s adapter a device",
        kind: Kind::Gpu(Gpu {
            title: "NVIDIA L4",
            compute: (8, 9),
            multiprocessors: 58,
            f32_units: 128,
            threads: 1536,
            shared: (100 << 10, 99 << 10),
            l2: 48 << 20,
            clock_ghz: 2.04,
        }),
    },
    Target {
        name: "b200",
        platform: "cuda13",
        peak: Some("b200"),
        memory: 180 * GIB,
        bandwidth: 8000e9,
        link: 900e9,
        network: 50e9,
        source: "NVIDIA DGX B200 datasheet, an eighth of the system; CUDA's table of compute capability 10.0",
        kind: Kind::Gpu(Gpu {
            title: "NVIDIA B200",
            compute: (10, 0),
            multiprocessors: 148,
            f32_units: 128,
            threads: 2048,
            shared: (228 << 10, 227 << 10),
            l2: 126 << 20,
            clock_ghz: 1.965,
        }),
    },
];

impl Target {
    /// The peak rate of products in a dtype, in FLOP/s.
    #[must_use]
    pub fn flops_per_second(&self, dtype: &str) -> Option<f64> {
        peak::find(self.peak?)?.flops_per_second(dtype)
    }

    /// How its compiler treats arrays.
    #[must_use]
    pub fn compiler(&self) -> Compiler {
        match self.kind {
            Kind::Tpu { fills, .. } => Compiler::Tiles { fills },
            Kind::Cpu | Kind::Gpu(_) => Compiler::Rows,
        }
    }
}

/// A number of devices of one kind and how they are connected.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// The kind.
    pub target: &'static Target,
    /// Chips along every side of a TPU slice; hosts and devices of each for others.
    shape: Vec<usize>,
}

/// A topology that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("topology {text:?}: {reason}")]
pub struct TopologyError {
    /// As given.
    pub text: String,
    /// What is wrong.
    pub reason: String,
}

/// No machine has more devices.
const MOST_DEVICES: usize = 1 << 16;

impl std::str::FromStr for Machine {
    type Err = TopologyError;

    /// Reads `v5e:4x4` (chips along the sides of a slice), `h100:8` (devices of one host), `h100:2x8` (hosts x devices), `l4`.
    fn from_str(text: &str) -> Result<Self, TopologyError> {
        let fail = |reason: String| TopologyError { text: text.to_owned(), reason };
        let (name, shape) = text.split_once(':').unwrap_or((text, "1"));
        let Some(target) = TARGETS.iter().find(|t| t.name.eq_ignore_ascii_case(name)) else {
            let known: Vec<_> = TARGETS.iter().map(|t| t.name).collect();
            return Err(fail(format!("unknown device; known are {}", known.join(", "))));
        };
        let sides: Option<Vec<usize>> = shape.split('x').map(|s| s.parse().ok().filter(|&n| n > 0)).collect();
        let Some(sides) = sides else {
            return Err(fail("sizes are whole numbers joined by x, such as 4x4".to_owned()));
        };
        let count = sides.iter().try_fold(1usize, |n, s| n.checked_mul(*s)).filter(|&n| n <= MOST_DEVICES);
        if count.is_none() {
            return Err(fail(format!("more than {MOST_DEVICES} devices")));
        }
        let shape = match (target.kind, &sides[..]) {
            (Kind::Tpu { cores, .. }, _) if sides.len() != if cores == 2 { 3 } else { 2 } => {
                let example = if cores == 2 { "2x2x2" } else { "4x4" };
                return Err(fail(format!("a slice of {} has sides such as {example}", target.name)));
            }
            (Kind::Tpu { .. }, _) => sides,
            (Kind::Cpu | Kind::Gpu(_), [n]) => vec![1, *n],
            (Kind::Gpu(_), [_, _]) => sides,
            _ => return Err(fail("give the devices of a host, or for GPUs hosts x devices".to_owned())),
        };
        Ok(Machine { target, shape })
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:", self.target.name)?;
        let skip = usize::from(!matches!(self.target.kind, Kind::Tpu { .. }) && self.shape[0] == 1);
        for (i, n) in self.shape[skip..].iter().enumerate() {
            write!(f, "{}{n}", if i > 0 { "x" } else { "" })?;
        }
        Ok(())
    }
}

impl Machine {
    /// Number of devices.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.shape.iter().product()
    }

    /// Devices that the fast links join: a slice, or those of a host.
    #[must_use]
    pub fn devices_per_island(&self) -> usize {
        match self.target.kind {
            Kind::Tpu { .. } => self.devices(),
            _ => self.shape[1],
        }
    }

    /// Environment variables that the plugin reads when it is loaded and that it needs for absent devices.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let Kind::Tpu { accelerator, cores, .. } = self.target.kind else { return Vec::new() };
        let text = |s: &str| s.to_owned();
        vec![
            // Otherwise the plugin asks a metadata server of Google Cloud, for minutes.
            ("TPU_SKIP_MDS_QUERY", text("1")),
            ("TPU_ACCELERATOR_TYPE", format!("{accelerator}-{}", self.devices() * cores)),
            ("TPU_WORKER_HOSTNAMES", text("localhost")),
            ("TPU_WORKER_ID", text("0")),
        ]
    }

    /// Name and options by which the plugin describes these devices. `None`: real ones are made instead.
    #[must_use]
    pub fn description(&self) -> Option<(String, Vec<(String, NamedValue)>)> {
        match self.target.kind {
            Kind::Cpu => None,
            Kind::Tpu { .. } => Some((self.to_string(), Vec::new())),
            Kind::Gpu(gpu) => {
                // Slices x hosts x devices.
                let topology = format!("1x{}x{}", self.shape[0], self.shape[1]);
                let options = [("target_config", gpu.text(self.target)), ("topology", topology)];
                Some((String::new(), options.into_iter().map(|(k, v)| (k.to_owned(), NamedValue::String(v))).collect()))
            }
        }
    }
}

impl Gpu {
    /// XLA's `GpuTargetConfigProto` as text. Limits that all of NVIDIA's devices of these generations share are written here.
    fn text(&self, target: &Target) -> String {
        let (major, minor) = self.compute;
        let mut info = String::new();
        let numbers: [(&str, u64); 13] = [
            ("threads_per_block_limit", 1024),
            ("threads_per_warp", 32),
            ("shared_memory_per_block", 48 << 10),
            ("shared_memory_per_core", u64::from(self.shared.0)),
            ("shared_memory_per_block_optin", u64::from(self.shared.1)),
            ("threads_per_core_limit", u64::from(self.threads)),
            ("core_count", u64::from(self.multiprocessors)),
            ("fpus_per_core", u64::from(self.f32_units)),
            ("block_dim_limit_x", (1 << 31) - 1),
            ("block_dim_limit_y", (1 << 16) - 1),
            ("block_dim_limit_z", (1 << 16) - 1),
            ("registers_per_core_limit", 1 << 16),
            ("registers_per_block_limit", 1 << 16),
        ];
        for (name, value) in numbers {
            let _ = write!(info, "{name}: {value} ");
        }
        let _ = write!(
            info,
            "memory_bandwidth: {} l2_cache_size: {} clock_rate_ghz: {} device_memory_size: {} device_address_bits: 64 \
             cuda_compute_capability {{ major: {major} minor: {minor} }} device_vendor: \"NVIDIA Corporation\" \
             platform_version: \"Compute Capability {major}.{minor}\" name: \"{}\" driver_version: \"13.0.0\" \
             runtime_version: \"13.0.0\" compile_time_toolkit_version: \"13.0.0\" dnn_version: \"9.10.0\"",
            target.bandwidth, self.l2, self.clock_ghz, target.memory, self.title
        );
        format!(
            "gpu_device_info {{ {info} }} platform_name: \"CUDA\" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} \
             device_description_str: \"{}\"",
            self.title
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topologies_read_back() {
        for (text, devices, island) in
            [("v5e:4x4", 16, 16), ("v5p:2x2x2", 8, 8), ("h100:8", 8, 8), ("h100:2x8", 16, 8), ("cpu:4", 4, 4)]
        {
            let machine: Machine = text.parse().unwrap();
            assert_eq!(machine.to_string(), text);
            assert_eq!((machine.devices(), machine.devices_per_island()), (devices, island), "{text}");
        }
        assert_eq!("L4".parse::<Machine>().unwrap().to_string(), "l4:1");
        for (text, part) in [
            ("abacus:4", "known are cpu, v5e"),
            ("v5e:4", "such as 4x4"),
            ("v5p:4x4", "such as 2x2x2"),
            ("h100:0", "whole numbers"),
            ("h100:1x2x3", "hosts x devices"),
            ("cpu:2x2", "devices of a host"),
            ("h100:99999x99999", "more than"),
        ] {
            let message = text.parse::<Machine>().unwrap_err().to_string();
            assert!(message.contains(part) && message.contains(text), "{message}");
        }
    }

    #[test]
    fn the_table_is_sound() {
        for (i, t) in TARGETS.iter().enumerate() {
            assert!(TARGETS[i + 1..].iter().all(|u| u.name != t.name));
            if t.kind != Kind::Cpu {
                assert!(t.flops_per_second("bfloat16").is_some(), "{}", t.name);
                assert!(t.memory > 0 && t.bandwidth > t.link && t.link > t.network, "{}", t.name);
            }
        }
    }

    #[test]
    fn what_plugins_are_told() {
        let gpu: Machine = "h100:2x8".parse().unwrap();
        let (name, options) = gpu.description().unwrap();
        assert!(name.is_empty() && gpu.environment().is_empty());
        let text = |key: &str| {
            options.iter().find_map(|(k, v)| match v {
                NamedValue::String(s) if k == key => Some(s.as_str()),
                _ => None,
            })
        };
        assert_eq!(text("topology"), Some("1x2x8"));
        let config = text("target_config").unwrap();
        for part in
            ["core_count: 132 ", "memory_bandwidth: 3350000000000 ", "major: 9 minor: 0", "clock_rate_ghz: 1.98 "]
        {
            assert!(config.contains(part), "{config}");
        }
        assert_eq!(config.matches('{').count(), config.matches('}').count());
        let tpu: Machine = "v5p:2x2x2".parse().unwrap();
        assert_eq!(tpu.description(), Some(("v5p:2x2x2".to_owned(), Vec::new())));
        assert!(tpu.environment().contains(&("TPU_ACCELERATOR_TYPE", "v5p-16".to_owned())));
    }
}
