//! Compilation for devices that are not there: a topology instead of a client.

use std::fmt;
use std::sync::Arc;

use crate::api::{args, call, slice, string};
use crate::client::describe_device;
use crate::compiled::{self, Handle, MemoryFigures};
use crate::error::{PjrtError, Result};
use crate::options::CompileOptions;
use crate::plugin::{NamedValue, Plugin};
use crate::sys;

/// A device of a [`Topology`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopologyDevice {
    /// The runtime's number for it.
    pub id: i64,
    /// The process (host) that would drive it.
    pub process: i64,
    /// What it is: `TPU v5 lite`, `NVIDIA H100 80GB HBM3`, ...
    pub kind: String,
    /// The runtime's text about it.
    pub description: String,
}

/// Devices of a plugin's platform and how they are connected, as a description: none of them needs to exist.
pub struct Topology {
    plugin: Arc<Plugin>,
    raw: *mut sys::PJRT_TopologyDescription,
    platform_name: String,
    devices: Vec<TopologyDevice>,
}

// SAFETY: a topology is constant once made, and the C API reads it from any thread.
unsafe impl Send for Topology {}
// SAFETY: as above.
unsafe impl Sync for Topology {}

impl Topology {
    /// Describes devices by the plugin's own name for them and its options: for libtpu a name such as `v5e:4x4`; for CUDA
    /// no name, and the options `target_config` and `topology`.
    ///
    /// # Errors
    /// When the plugin does not know the name or an option, or cannot describe devices that are not there.
    pub fn new(plugin: &Arc<Plugin>, name: &str, options: &[(String, NamedValue)]) -> Result<Topology> {
        let operation = "describe absent devices";
        let api = plugin.api();
        let raw_options: Vec<_> = options.iter().map(|(name, value)| value.to_raw(name)).collect();
        let mut a = args!(PJRT_TopologyDescription_Create_Args {
            topology_name: name.as_ptr().cast(),
            topology_name_size: name.len(),
            create_options: raw_options.as_ptr(),
            num_options: raw_options.len(),
        });
        // SAFETY: name and options outlive the call.
        unsafe { call!(api, operation, PJRT_TopologyDescription_Create, a) }?;
        if a.topology.is_null() {
            return Err(PjrtError::Contract { operation, reason: "no topology".to_owned() });
        }
        // From here on `Drop` frees it, whatever fails below.
        let mut this =
            Topology { plugin: Arc::clone(plugin), raw: a.topology, platform_name: String::new(), devices: Vec::new() };
        let mut a = args!(PJRT_TopologyDescription_PlatformName_Args { topology: this.raw.cast_const() });
        // SAFETY: the topology is live, and so is the string it hands out.
        this.platform_name = unsafe {
            call!(api, operation, PJRT_TopologyDescription_PlatformName, a)?;
            string(a.platform_name, a.platform_name_size)
        };
        let mut a = args!(PJRT_TopologyDescription_GetDeviceDescriptions_Args { topology: this.raw.cast_const() });
        // SAFETY: the topology is live, and so are the descriptions it hands out.
        let descriptions = unsafe {
            call!(api, operation, PJRT_TopologyDescription_GetDeviceDescriptions, a)?;
            slice(a.descriptions, a.num_descriptions)
        };
        for &d in descriptions {
            if d.is_null() {
                return Err(PjrtError::Contract { operation, reason: "no description".to_owned() });
            }
            let d = describe_device(api, d)?;
            this.devices.push(TopologyDevice {
                id: d.id,
                process: d.process,
                kind: d.kind,
                description: d.description,
            });
        }
        Ok(this)
    }

    /// `cuda`, `tpu`, ...
    #[must_use]
    pub fn platform_name(&self) -> &str {
        &self.platform_name
    }

    /// The devices.
    #[must_use]
    pub fn devices(&self) -> &[TopologyDevice] {
        &self.devices
    }

    /// Compiles a StableHLO program, given as text, for these devices. It cannot be run here.
    ///
    /// # Errors
    /// When the options make no sense or ask for more devices than there are, or the plugin refuses options or program.
    pub fn compile(&self, program: &str, options: &CompileOptions) -> Result<AheadOfTime> {
        let operation = "compile ahead of time";
        let count = options.device_count()?;
        let chosen: Vec<usize> = options.devices.clone().unwrap_or_else(|| (0..count).collect());
        let ids = chosen
            .iter()
            .map(|&index| {
                let absent = PjrtError::NoSuchDevice { index, count: self.devices.len() };
                self.devices.get(index).map(|d| d.id).ok_or(absent)
            })
            .collect::<Result<Vec<_>>>()?;
        let options = options.encode(&ids)?;
        let program = compiled::program(program)?;
        let mut a = args!(PJRT_Compile_Args {
            topology: self.raw.cast_const(),
            program: &raw const program.raw,
            compile_options: options.as_ptr().cast(),
            compile_options_size: options.len(),
        });
        // SAFETY: topology, program and options outlive the call; no client is given.
        unsafe { call!(self.plugin.api(), operation, PJRT_Compile, a) }?;
        if a.executable.is_null() {
            return Err(PjrtError::Contract { operation, reason: "no program".to_owned() });
        }
        Ok(AheadOfTime { plugin: Arc::clone(&self.plugin), raw: a.executable })
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        let _ = (|| -> Result<()> {
            let mut a = args!(PJRT_TopologyDescription_Destroy_Args { topology: self.raw });
            // SAFETY: the topology is ours and not used again.
            unsafe { call!(self.plugin.api(), "free a topology", PJRT_TopologyDescription_Destroy, a) }
        })();
    }
}

impl fmt::Debug for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Topology({}, {} devices)", self.platform_name, self.devices.len())
    }
}

/// A program compiled for absent devices.
pub struct AheadOfTime {
    plugin: Arc<Plugin>,
    raw: *mut sys::PJRT_Executable,
}

// SAFETY: the C API's executables may be used from any thread at the same time.
unsafe impl Send for AheadOfTime {}
// SAFETY: as above.
unsafe impl Sync for AheadOfTime {}

impl AheadOfTime {
    fn handle(&self) -> Handle {
        Handle::new(*self.plugin.api(), self.raw)
    }

    /// The name of the program's module.
    ///
    /// # Errors
    /// When the plugin does not say.
    pub fn name(&self) -> Result<String> {
        self.handle().name()
    }

    /// Bytes it needs on each device.
    ///
    /// # Errors
    /// When the plugin does not say.
    pub fn memory(&self) -> Result<MemoryFigures> {
        self.handle().memory()
    }

    /// The program after optimisation, as a serialised `xla.HloModuleProtoWithConfig`: see [`crate::HloStats`].
    ///
    /// # Errors
    /// When the plugin does not offer it.
    pub fn optimized_program(&self) -> Result<Vec<u8>> {
        self.handle().optimized_program()
    }

    /// XLA's own cost estimate, where the plugin has one. It counts the body of a loop once.
    ///
    /// # Errors
    /// When the plugin does not offer it.
    pub fn cost_analysis(&self) -> Result<Vec<(String, NamedValue)>> {
        self.handle().cost_analysis()
    }

    /// The compiled program as bytes, which the same plugin loads where the devices are.
    ///
    /// # Errors
    /// When the plugin does not offer it.
    pub fn serialize(&self) -> Result<Vec<u8>> {
        self.handle().serialize()
    }
}

impl Drop for AheadOfTime {
    fn drop(&mut self) {
        let _ = (|| -> Result<()> {
            let mut a = args!(PJRT_Executable_Destroy_Args { executable: self.raw });
            // SAFETY: the handle is ours and not used again.
            unsafe { call!(self.plugin.api(), "free a program", PJRT_Executable_Destroy, a) }
        })();
    }
}

impl fmt::Debug for AheadOfTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AheadOfTime({:?})", self.name().unwrap_or_default())
    }
}
