//! A client: the devices of one plugin, and the memory and programs on them.

use std::ffi::c_int;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::api::{Api, args, call, slice, string};
use crate::error::{PjrtError, Result};
use crate::key_value::{KeyValueStore, StoreHandle};
use crate::plugin::{NamedValue, Plugin};
use crate::sys;

/// How a client is made.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClientOptions {
    /// Options by name, such as `cpu_device_count`. Most plugins refuse names they do not know.
    pub values: Vec<(String, NamedValue)>,
}

impl ClientOptions {
    /// A CPU client with `n` devices that share the machine's cores.
    #[must_use]
    pub fn cpu(n: usize) -> Self {
        ClientOptions::default().with("cpu_device_count", NamedValue::Int64(i64::try_from(n).unwrap_or(i64::MAX)))
    }

    /// The same options with one more.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: NamedValue) -> Self {
        self.values.push((name.into(), value));
        self
    }
}

/// One addressable device.
#[derive(Debug, Clone)]
pub struct Device {
    pub(crate) raw: DevicePtr,
    /// The runtime's number for it.
    pub id: i64,
    /// What it is: `cpu`, `NVIDIA H100 80GB HBM3`, ...
    pub kind: String,
    /// The runtime's text about it.
    pub description: String,
}

/// A device of any of the processes whose devices form one mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshDevice {
    /// The runtime's number for it, the same in all processes.
    pub id: i64,
    /// Its place among [`Client::devices`], if this process can use it.
    pub local: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DevicePtr(pub(crate) *mut sys::PJRT_Device);
// SAFETY: devices are owned by the client, constant, and usable from any thread.
unsafe impl Send for DevicePtr {}
// SAFETY: as above.
unsafe impl Sync for DevicePtr {}

/// Memory figures of a device. Not every platform has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes in use.
    pub in_use: i64,
    /// The most bytes ever in use.
    pub peak: Option<i64>,
    /// Bytes there are.
    pub limit: Option<i64>,
}

/// What host-to-device transfers did, in numbers of transfers and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TransferStats {
    /// Mapped buffers that use the host's memory in place.
    pub zero_copy: u64,
    /// Bytes of those.
    pub zero_copy_bytes: u64,
    /// Mapped buffers that had to be copied: memory not aligned to 64 bytes, or not a CPU.
    pub mapped_copies: u64,
    /// Bytes of those.
    pub mapped_copy_bytes: u64,
    /// Ordinary copies to a device.
    pub copies: u64,
    /// Bytes of those.
    pub copy_bytes: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) zero_copy: [AtomicU64; 2],
    pub(crate) mapped_copies: [AtomicU64; 2],
    pub(crate) copies: [AtomicU64; 2],
}

impl Counters {
    pub(crate) fn add(counter: &[AtomicU64; 2], bytes: usize) {
        counter[0].fetch_add(1, Ordering::Relaxed);
        counter[1].fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

pub(crate) struct ClientInner {
    pub(crate) plugin: Arc<Plugin>,
    pub(crate) raw: *mut sys::PJRT_Client,
    pub(crate) devices: Vec<Device>,
    pub(crate) all: Vec<MeshDevice>,
    platform_name: String,
    platform_version: String,
    pub(crate) counters: Counters,
    /// Dropped after the client is destroyed, because fields are.
    _store: Option<StoreHandle>,
}

// SAFETY: the C API's clients may be used from any thread at the same time.
unsafe impl Send for ClientInner {}
// SAFETY: as above.
unsafe impl Sync for ClientInner {}

impl ClientInner {
    pub(crate) fn api(&self) -> &Api {
        self.plugin.api()
    }

    pub(crate) fn device(&self, index: usize) -> Result<&Device> {
        self.devices.get(index).ok_or(PjrtError::NoSuchDevice { index, count: self.devices.len() })
    }

    pub(crate) fn index_of(&self, raw: *mut sys::PJRT_Device) -> Option<usize> {
        self.devices.iter().position(|d| d.raw.0 == raw)
    }
}

impl Drop for ClientInner {
    fn drop(&mut self) {
        let _ = (|| -> Result<()> {
            let mut a = args!(PJRT_Client_Destroy_Args { client: self.raw });
            // SAFETY: buffers and executables hold the client alive, so none is left.
            unsafe { call!(self.api(), "destroy the client", PJRT_Client_Destroy, a) }
        })();
    }
}

/// A client. Cloning it is cheap and gives the same client.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<ClientInner>,
}

impl Client {
    /// Makes a client of a plugin.
    ///
    /// # Errors
    /// When the plugin refuses: an unknown option, no device, ...
    pub fn new(plugin: &Arc<Plugin>, options: &ClientOptions) -> Result<Client> {
        Client::make(plugin, options, None)
    }

    /// Makes a client of one of several processes, whose devices form one mesh. Each process calls this at the same time;
    /// they find each other through `store`. GPU plugins want the options `node_id` and `num_nodes` with it.
    ///
    /// # Errors
    /// As [`Client::new`], and when a process does not come.
    pub fn with_store(plugin: &Arc<Plugin>, options: &ClientOptions, store: Arc<dyn KeyValueStore>) -> Result<Client> {
        Client::make(plugin, options, Some(StoreHandle::new(store)))
    }

    fn make(plugin: &Arc<Plugin>, options: &ClientOptions, store: Option<StoreHandle>) -> Result<Client> {
        let api = plugin.api();
        let raw_options: Vec<_> = options.values.iter().map(|(name, value)| value.to_raw(name)).collect();
        let mut a =
            args!(PJRT_Client_Create_Args { create_options: raw_options.as_ptr(), num_options: raw_options.len() });
        if let Some(store) = &store {
            store.attach(&mut a);
        }
        // SAFETY: names and values live in `options` until the call returns; the store, if there is one, outlives the client.
        unsafe { call!(api, "create a client", PJRT_Client_Create, a) }?;
        // From here on the client is destroyed by `Drop`, whatever fails below.
        let mut inner = ClientInner {
            plugin: Arc::clone(plugin),
            raw: a.client,
            devices: Vec::new(),
            all: Vec::new(),
            platform_name: String::new(),
            platform_version: String::new(),
            counters: Counters::default(),
            _store: store,
        };
        let mut a = args!(PJRT_Client_PlatformName_Args { client: inner.raw });
        // SAFETY: the client is live, and so are the strings it hands out.
        inner.platform_name = unsafe {
            call!(api, "read the platform's name", PJRT_Client_PlatformName, a)?;
            string(a.platform_name, a.platform_name_size)
        };
        let mut a = args!(PJRT_Client_PlatformVersion_Args { client: inner.raw });
        // SAFETY: as above.
        inner.platform_version = unsafe {
            call!(api, "read the platform's version", PJRT_Client_PlatformVersion, a)?;
            string(a.platform_version, a.platform_version_size)
        };
        let mut a = args!(PJRT_Client_AddressableDevices_Args { client: inner.raw });
        // SAFETY: the client is live, and its devices live as long as it.
        let raw_devices = unsafe {
            call!(api, "list the devices", PJRT_Client_AddressableDevices, a)?;
            slice(a.addressable_devices, a.num_addressable_devices)
        };
        for &raw in raw_devices {
            inner.devices.push(describe(api, raw)?);
        }
        let mut a = args!(PJRT_Client_Devices_Args { client: inner.raw });
        // SAFETY: as above.
        let raw_devices = unsafe {
            call!(api, "list all devices", PJRT_Client_Devices, a)?;
            slice(a.devices, a.num_devices)
        };
        for &raw in raw_devices {
            inner.all.push(MeshDevice { id: describe(api, raw)?.id, local: inner.index_of(raw) });
        }
        inner.all.sort_unstable_by_key(|d| d.id);
        Ok(Client { inner: Arc::new(inner) })
    }

    /// The plugin it belongs to.
    #[must_use]
    pub fn plugin(&self) -> &Arc<Plugin> {
        &self.inner.plugin
    }

    /// `cpu`, `cuda`, `tpu`, ...
    #[must_use]
    pub fn platform_name(&self) -> &str {
        &self.inner.platform_name
    }

    /// The platform's text about its version.
    #[must_use]
    pub fn platform_version(&self) -> &str {
        &self.inner.platform_version
    }

    /// The devices this process can use. Everywhere in this crate a device is an index into this list.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        &self.inner.devices
    }

    /// The devices of all processes, ascending by the runtime's number. Where there is one process they are those of
    /// [`Client::devices`].
    #[must_use]
    pub fn mesh_devices(&self) -> &[MeshDevice] {
        &self.inner.all
    }

    /// The devices of a program of `count`, as far as there are so many: one of more devices than this process has runs on those
    /// of all processes, any other on this one's first.
    pub(crate) fn program_devices(&self, count: usize) -> Vec<MeshDevice> {
        let own = self.devices();
        if count <= own.len() {
            return own[..count].iter().enumerate().map(|(i, d)| MeshDevice { id: d.id, local: Some(i) }).collect();
        }
        self.inner.all.iter().take(count).copied().collect()
    }

    /// Which of its devices a program of `count` devices has here, by position in [`Client::devices`]; `None` for those of other
    /// processes.
    #[must_use]
    pub fn places(&self, count: usize) -> Vec<Option<usize>> {
        self.program_devices(count).iter().map(|d| d.local).collect()
    }

    /// Memory figures of a device, where the platform has them (CPU plugins do not).
    ///
    /// # Errors
    /// When there is no such device.
    pub fn device_memory(&self, device: usize) -> Result<Option<DeviceMemory>> {
        let raw = self.inner.device(device)?.raw.0;
        let mut a = args!(PJRT_Device_MemoryStats_Args { device: raw });
        // SAFETY: the device belongs to this live client.
        let asked = unsafe { call!(self.inner.api(), "read memory figures", PJRT_Device_MemoryStats, a) };
        Ok(asked.is_ok().then(|| DeviceMemory {
            in_use: a.bytes_in_use,
            peak: a.peak_bytes_in_use_is_set.then_some(a.peak_bytes_in_use),
            limit: a.bytes_limit_is_set.then_some(a.bytes_limit),
        }))
    }

    /// Transfers so far.
    #[must_use]
    pub fn transfer_stats(&self) -> TransferStats {
        let get = |c: &[AtomicU64; 2]| (c[0].load(Ordering::Relaxed), c[1].load(Ordering::Relaxed));
        let c = &self.inner.counters;
        let ((zero_copy, zero_copy_bytes), (mapped_copies, mapped_copy_bytes), (copies, copy_bytes)) =
            (get(&c.zero_copy), get(&c.mapped_copies), get(&c.copies));
        TransferStats { zero_copy, zero_copy_bytes, mapped_copies, mapped_copy_bytes, copies, copy_bytes }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({}, {} devices)", self.platform_name(), self.devices().len())
    }
}

fn describe(api: &Api, raw: *mut sys::PJRT_Device) -> Result<Device> {
    let operation = "describe a device";
    let mut a = args!(PJRT_Device_GetDescription_Args { device: raw });
    // SAFETY: the device is live, and so is its description.
    unsafe { call!(api, operation, PJRT_Device_GetDescription, a) }?;
    let description = a.device_description;
    if description.is_null() {
        return Err(PjrtError::Contract { operation, reason: "no description".to_owned() });
    }
    let d = describe_device(api, description)?;
    Ok(Device { raw: DevicePtr(raw), id: d.id, kind: d.kind, description: d.description })
}

/// What a device description says.
pub(crate) struct Described {
    pub(crate) id: i64,
    pub(crate) process: i64,
    pub(crate) kind: String,
    pub(crate) description: String,
}

/// Reads a live description of a device.
pub(crate) fn describe_device(api: &Api, description: *mut sys::PJRT_DeviceDescription) -> Result<Described> {
    let operation = "describe a device";
    let mut a = args!(PJRT_DeviceDescription_Id_Args { device_description: description });
    // SAFETY: the caller passes a live description.
    unsafe { call!(api, operation, PJRT_DeviceDescription_Id, a) }?;
    let id: c_int = a.id;
    let mut a = args!(PJRT_DeviceDescription_Kind_Args { device_description: description });
    // SAFETY: as above.
    let kind = unsafe {
        call!(api, operation, PJRT_DeviceDescription_Kind, a)?;
        string(a.device_kind, a.device_kind_size)
    };
    let mut a = args!(PJRT_DeviceDescription_ToString_Args { device_description: description });
    // SAFETY: as above.
    let text = unsafe {
        call!(api, operation, PJRT_DeviceDescription_ToString, a)?;
        string(a.to_string, a.to_string_size)
    };
    let mut a = args!(PJRT_DeviceDescription_ProcessIndex_Args { device_description: description });
    // SAFETY: as above.
    unsafe { call!(api, operation, PJRT_DeviceDescription_ProcessIndex, a) }?;
    Ok(Described { id: i64::from(id), process: i64::from(a.process_index), kind, description: text })
}
