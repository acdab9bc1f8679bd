//! The pinned plugins.

/// The hashes of a plugin that was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// SHA-256 of the wheel.
    pub wheel: &'static str,
    /// SHA-256 of the plugin inside.
    pub library: &'static str,
}

/// A plugin in a Python wheel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinnedPlugin {
    /// The platform: `cpu`, `cuda12`, `cuda13`, `rocm7`, `tpu`.
    pub platform: &'static str,
    /// The package.
    pub package: &'static str,
    /// The version.
    pub version: &'static str,
    /// The machine it is for: `x86_64-linux`.
    pub target: &'static str,
    /// The plugin's path inside the wheel.
    pub file: &'static str,
    /// The hashes of wheel and plugin.
    pub pin: Pin,
    /// What this plugin is, and why one would want it or not.
    pub note: &'static str,
}

/// Every plugin this crate knows, the preferred one of each platform first.
pub const PINNED: &[PinnedPlugin] = &[
    PinnedPlugin {
        platform: "cpu",
        package: "lammps-jax-pjrt-cpu",
        version: "0.11.2",
        target: "x86_64-linux",
        file: "lammps_jax_pjrt_cpu/pjrt_c_api_cpu_plugin.so",
        pin: Pin {
            wheel: "1319390d948b39f69f7dade496b7c385149d9ca6097a6b62114da113216d9ad1",
            library: "ad1309ac822b1b24d51b7f9947c7c9fa9ef5d67f390584cbc3d1fa2428fed9c2",
        },
        note: "the XLA of jaxlib 0.11.2: PJRT 0.115, StableHLO 1.20, with YNNPACK and oneDNN",
    },
    PinnedPlugin {
        platform: "cpu",
        package: "fastatomstruct-xla-cpu",
        version: "2026.6.23",
        target: "x86_64-linux",
        file: "fastatomstruct_xla_cpu/libpjrt_cpu.so",
        pin: Pin {
            wheel: "88b1c430b341b4bea40a37420311c9c75db6e22b46d2ff95b6986577bee6afe9",
            library: "0a0fe56ca17be9efc7b942e89e534e5e0ad4a0f1e369b66d27b62184509015b9",
        },
        note: "fallback: an unmodified build of ZML's plugin, PJRT 0.106; bf16 products at half the speed",
    },
    PinnedPlugin {
        platform: "cpu",
        package: "xla-cpu-pjrt",
        version: "0.0.1",
        target: "x86_64-linux",
        file: "xla_plugins/xla_cpu_pjrt/xla_cpu_pjrt.so",
        pin: Pin {
            wheel: "55837b6b7b47daa717f2d9a5a03563ea0ceaa338d06a81a1e2d3f060d960decc",
            library: "88c3f28c5900f48ad4a82cab9e79bba9537809743395e341485f8794268820dc",
        },
        note: "fallback: XLA of November 2025, PJRT 0.81; bf16 products at half the speed",
    },
    PinnedPlugin {
        platform: "cuda13",
        package: "jax-cuda13-pjrt",
        version: "0.12.0.1",
        target: "x86_64-linux",
        file: "jax_plugins/xla_cuda13/xla_cuda_plugin.so",
        pin: Pin {
            wheel: "5899bb6177eda86ea532afb9a26794f2bdd04966f6a01f9028266b16c2b6cf90",
            library: "b6de513893c09af2c77e71afcef46d9706f8c259337cdef4cd5cae2353886f75",
        },
        note: "PJRT 0.116; wants NVIDIA's CUDA 13 libraries on the library path; compiled with for absent devices, not yet run on one by this project",
    },
    PinnedPlugin {
        platform: "cuda12",
        package: "jax-cuda12-pjrt",
        version: "0.12.0.1",
        target: "x86_64-linux",
        file: "jax_plugins/xla_cuda12/xla_cuda_plugin.so",
        pin: Pin {
            wheel: "5ec28e06198d094031c37590b4ea753ae8cde4879ab4b60baf40f0dffb673286",
            library: "921aaa9c635255fb7b7a660d11c8f702c78a70e7f7d005d4f377c2dc5f0fede2",
        },
        note: "wants NVIDIA's CUDA 12 libraries on the library path; not yet run on a device by this project",
    },
    PinnedPlugin {
        platform: "rocm7",
        package: "jax-rocm7-pjrt",
        version: "0.12.0",
        target: "x86_64-linux",
        file: "jax_plugins/xla_rocm7/xla_rocm_plugin.so",
        pin: Pin {
            wheel: "4551d0714523355f2946ca1958c3f584e95661e467a641d36b726f718a1c7934",
            library: "6e7239347f37f1a5a17c2a2d9301411f9f17e30e0707a717f4717556fa402511",
        },
        note: "wants AMD's ROCm 7 libraries on the library path; not yet run on a device by this project",
    },
    PinnedPlugin {
        platform: "tpu",
        package: "libtpu",
        version: "0.0.52",
        target: "x86_64-linux",
        file: "libtpu/libtpu.so",
        pin: Pin {
            wheel: "f76ab1f4d697c346371c50058796f6baa93317b89be8cf8a1012715a2655120d",
            library: "f86de4d04a058e6b5101f73e0824b95f27e2cec996d2b9191d9cffda75c03077",
        },
        note: "PJRT 0.117; compiled with for absent devices, not yet run on one by this project",
    },
];

/// A file of a wheel with tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ToolFile {
    /// Its path inside the wheel.
    pub member: &'static str,
    /// Its path inside the directory of tools.
    pub to: &'static str,
    /// Its SHA-256.
    pub sha256: &'static str,
}

/// A wheel with tools that a platform's compiler calls: the plugin alone cannot compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinnedTool {
    /// The platform.
    pub platform: &'static str,
    /// The package.
    pub package: &'static str,
    /// The version.
    pub version: &'static str,
    /// The machine it is for.
    pub target: &'static str,
    /// SHA-256 of the wheel.
    pub wheel: &'static str,
    /// What is taken from it.
    pub files: &'static [ToolFile],
}

/// Every wheel with tools.
pub const TOOLS: &[PinnedTool] = &[
    PinnedTool {
        platform: "cuda13",
        package: "nvidia-cuda-nvcc",
        version: "13.2.78",
        target: "x86_64-linux",
        wheel: "c3bd144dd9b6b25e062589acb7bbd43d93d3120c72fad71da808f9817aba1239",
        files: &[
            ToolFile {
                member: "nvidia/cu13/bin/ptxas",
                to: "bin/ptxas",
                sha256: "a0212ca1a74ca4877e8d063baa1dd0b075fcd255fb6ab9e8a6bf98a276a2d6e8",
            },
            ToolFile {
                member: "nvidia/cu13/bin/nvlink",
                to: "bin/nvlink",
                sha256: "c536c0347d087ebd502e67e23b5af61022bddc2dd75cb1a455e8b240c52e38f0",
            },
            ToolFile {
                member: "nvidia/cu13/bin/fatbinary",
                to: "bin/fatbinary",
                sha256: "1c88c856090c4f622c8b54c87a835f5d702d37ddc02959af2717f696945aac0d",
            },
        ],
    },
    PinnedTool {
        platform: "cuda13",
        package: "nvidia-nvvm",
        version: "13.2.78",
        target: "x86_64-linux",
        wheel: "f5aa433631109bbdec81802c5b5f319bf10bc891fe2f212e4e445845211d6f77",
        files: &[ToolFile {
            member: "nvidia/cu13/nvvm/libdevice/libdevice.10.bc",
            to: "nvvm/libdevice/libdevice.10.bc",
            sha256: "0c6b4d4e4c033e2faffcc6f671c68fec5e813020845a5a08f1dbdd35c19629d6",
        }],
    },
];

/// The machine this program was built for, as the table calls it.
pub(super) fn this_machine() -> String {
    format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)
}

/// A platform by its own name, or by that of its newest release.
fn canonical(platform: &str) -> &str {
    match platform {
        "cuda" => "cuda13",
        "rocm" => "rocm7",
        other => other,
    }
}

/// The plugins of a platform for the machine this program was built for, the preferred one first. `cuda` and `rocm` are
/// their newest releases.
pub fn candidates(platform: &str) -> impl Iterator<Item = &'static PinnedPlugin> {
    let (platform, target) = (canonical(platform), this_machine());
    PINNED.iter().filter(move |p| p.platform == platform && p.target == target)
}

/// The tools of a platform for the machine this program was built for.
pub fn tools(platform: &str) -> impl Iterator<Item = &'static PinnedTool> {
    let (platform, target) = (canonical(platform), this_machine());
    TOOLS.iter().filter(move |t| t.platform == platform && t.target == target)
}

/// The plugin whose library has this hash.
#[must_use]
pub fn by_sha256(library: &str) -> Option<&'static PinnedPlugin> {
    PINNED.iter().find(|p| p.pin.library == library)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sound() {
        for (i, p) in PINNED.iter().enumerate() {
            for hash in [p.pin.wheel, p.pin.library] {
                assert_eq!(hash.len(), 64, "{}", p.package);
                assert!(hash.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)), "{}", p.package);
            }
            assert!(!p.file.starts_with('/') && !p.file.contains(".."), "{}", p.package);
            for q in &PINNED[i + 1..] {
                assert_ne!(p.pin.library, q.pin.library);
            }
            assert_eq!(by_sha256(p.pin.library), Some(p));
        }
        assert!(by_sha256("").is_none());
        for tool in TOOLS {
            assert!(PINNED.iter().any(|p| p.platform == tool.platform), "{}", tool.package);
            for hash in tool.files.iter().map(|f| f.sha256).chain([tool.wheel]) {
                assert!(hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()), "{}", tool.package);
            }
            assert!(tool.files.iter().all(|f| !f.to.starts_with('/') && !f.to.contains("..")), "{}", tool.package);
        }
    }

    #[test]
    fn short_names_are_the_newest_release() {
        assert!(candidates("cuda").eq(candidates("cuda13")) && candidates("rocm").eq(candidates("rocm7")));
        assert!(tools("cuda").eq(tools("cuda13")) && tools("tpu").next().is_none());
    }
}
