//! Compiled programs: making them, asking about them, running them.

use std::fmt;
use std::ptr;
use std::sync::Arc;

use crate::api::{args, call, slice};
use crate::buffer::Buffer;
use crate::client::{Client, ClientInner};
use crate::compiled::{self, Handle, MemoryFigures};
use crate::dtype;
use crate::error::{PjrtError, Result};
use crate::options::CompileOptions;
use crate::plugin::NamedValue;
use crate::signature::{ArrayType, ProgramSignature};
use crate::sys;

/// How a program is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExecuteOptions<'a> {
    /// Donated arguments (indices) that must survive this run: the runtime copies them instead of taking them over.
    pub keep: &'a [usize],
    /// Whether to wait until every device has finished, so that a failure of the program is returned here and not by
    /// the results.
    pub wait: bool,
}

/// A compiled program, loaded on its devices. Usable from many threads at once.
pub struct Executable {
    client: Arc<ClientInner>,
    loaded: *mut sys::PJRT_LoadedExecutable,
    executable: *mut sys::PJRT_Executable,
    name: String,
    signature: ProgramSignature,
    devices: Vec<usize>,
}

// SAFETY: the C API's executables may be used from any thread at the same time.
unsafe impl Send for Executable {}
// SAFETY: as above.
unsafe impl Sync for Executable {}

impl Client {
    /// Compiles a StableHLO program given as text.
    ///
    /// # Errors
    /// When the options make no sense, or the plugin refuses options or program: its message says where.
    pub fn compile(&self, program: &str, options: &CompileOptions) -> Result<Executable> {
        let operation = "compile";
        let options = self.encode_options(options)?;
        let program = compiled::program(program)?;
        let mut a = args!(PJRT_Client_Compile_Args {
            client: self.inner.raw,
            program: &raw const program.raw,
            compile_options: options.as_ptr().cast(),
            compile_options_size: options.len(),
        });
        // SAFETY: program and options outlive the call.
        unsafe { call!(self.inner.api(), operation, PJRT_Client_Compile, a) }?;
        Executable::from_loaded(Arc::clone(&self.inner), a.executable, None)
    }

    /// Loads a program that [`Executable::serialize`] wrote, with the same plugin on the same kind of machine.
    /// `signature` saves reading it out of the program.
    ///
    /// # Errors
    /// When the plugin refuses the bytes. Plugins are not hardened against foreign bytes: give them only what a
    /// checksum vouches for.
    pub(crate) fn deserialize(&self, bytes: &[u8], signature: Option<ProgramSignature>) -> Result<Executable> {
        let mut a = args!(PJRT_Executable_DeserializeAndLoad_Args {
            client: self.inner.raw,
            serialized_executable: bytes.as_ptr().cast(),
            serialized_executable_size: bytes.len(),
        });
        // SAFETY: the bytes outlive the call.
        unsafe { call!(self.inner.api(), "load a stored program", PJRT_Executable_DeserializeAndLoad, a) }?;
        Executable::from_loaded(Arc::clone(&self.inner), a.loaded_executable, signature)
    }

    /// The options as the plugin reads them, checked against the devices there are.
    pub(crate) fn encode_options(&self, options: &CompileOptions) -> Result<Vec<u8>> {
        let count = options.device_count()?;
        let ids: Vec<i64> = match &options.devices {
            Some(chosen) => chosen.iter().map(|&i| Ok(self.inner.device(i)?.id)).collect::<Result<_>>()?,
            None => self.program_devices(count).iter().map(|d| d.id).collect(),
        };
        if ids.len() < count {
            return Err(PjrtError::NoSuchDevice { index: ids.len(), count: ids.len() });
        }
        let mut sorted = ids.clone();
        sorted.sort_unstable();
        if sorted.windows(2).any(|w| w[0] == w[1]) {
            return Err(PjrtError::Option {
                name: "devices".to_owned(),
                reason: "a device is listed twice".to_owned(),
            });
        }
        options.encode(&ids)
    }
}

impl Executable {
    /// Takes over a loaded executable.
    fn from_loaded(
        client: Arc<ClientInner>,
        loaded: *mut sys::PJRT_LoadedExecutable,
        signature: Option<ProgramSignature>,
    ) -> Result<Executable> {
        let operation = "look at a compiled program";
        if loaded.is_null() {
            return Err(PjrtError::Contract { operation, reason: "no program".to_owned() });
        }
        // From here on `Drop` frees what is not null, whatever fails below.
        let empty = ProgramSignature { inputs: Vec::new(), outputs: Vec::new(), donated: Vec::new() };
        let mut this = Executable {
            client,
            loaded,
            executable: ptr::null_mut(),
            name: String::new(),
            signature: empty,
            devices: Vec::new(),
        };
        let mut a = args!(PJRT_LoadedExecutable_GetExecutable_Args { loaded_executable: loaded });
        // SAFETY: the program is live.
        unsafe { call!(this.client.api(), operation, PJRT_LoadedExecutable_GetExecutable, a) }?;
        this.executable = a.executable;
        this.name = this.handle().name()?;
        let mut a = args!(PJRT_LoadedExecutable_AddressableDevices_Args { executable: loaded });
        // SAFETY: the program is live, and so is its list of devices.
        let devices = unsafe {
            call!(this.client.api(), operation, PJRT_LoadedExecutable_AddressableDevices, a)?;
            slice(a.addressable_devices, a.num_addressable_devices)
        };
        for &device in devices {
            let index = this.client.index_of(device).ok_or(PjrtError::Contract {
                operation,
                reason: "it runs on a device the client does not have".to_owned(),
            })?;
            this.devices.push(index);
        }
        this.signature = match signature {
            Some(s) => s,
            None => {
                let hlo = this.optimized_program()?;
                ProgramSignature::from_hlo_with_config(&hlo)
                    .map_err(|reason| PjrtError::Contract { operation, reason })?
            }
        };
        this.check_outputs()?;
        Ok(this)
    }

    /// Compares the results of the signature with what the plugin itself says: the two come by different ways, and
    /// results are trusted to be what the signature says.
    fn check_outputs(&self) -> Result<()> {
        let operation = "look at a compiled program";
        let mut types = args!(PJRT_Executable_OutputElementTypes_Args { executable: self.executable });
        let mut dims = args!(PJRT_Executable_OutputDimensions_Args { executable: self.executable });
        // SAFETY: the program is live, and so are the lists it hands out.
        let (types, sizes, mut dims) = unsafe {
            call!(self.client.api(), operation, PJRT_Executable_OutputElementTypes, types)?;
            call!(self.client.api(), operation, PJRT_Executable_OutputDimensions, dims)?;
            let sizes = slice(dims.dim_sizes, dims.num_outputs);
            let total = sizes.iter().sum();
            (slice(types.output_types, types.num_output_types), sizes, slice(dims.dims, total))
        };
        let mut outputs = Vec::with_capacity(types.len());
        for (&raw, &rank) in types.iter().zip(sizes) {
            let (head, rest) = dims.split_at(rank);
            dims = rest;
            outputs.push(ArrayType { dtype: dtype::from_raw(raw)?, shape: dtype::dims_from_raw(operation, head)? });
        }
        if types.len() != sizes.len() || outputs != self.signature.outputs {
            return Err(PjrtError::Contract {
                operation,
                reason: format!("it reports results {outputs:?}, its program says {:?}", self.signature.outputs),
            });
        }
        Ok(())
    }

    /// The name of the program's module.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it takes and gives back on each device.
    #[must_use]
    pub fn signature(&self) -> &ProgramSignature {
        &self.signature
    }

    /// The devices it runs on, as indices into [`Client::devices`], in the order of argument lists.
    #[must_use]
    pub fn devices(&self) -> &[usize] {
        &self.devices
    }

    /// The client it belongs to.
    #[must_use]
    pub fn client(&self) -> Client {
        Client { inner: Arc::clone(&self.client) }
    }

    fn handle(&self) -> Handle {
        Handle::new(*self.client.api(), self.executable)
    }

    /// The program after optimisation, as a serialised `xla.HloModuleProtoWithConfig`.
    ///
    /// # Errors
    /// When the plugin does not offer it.
    pub fn optimized_program(&self) -> Result<Vec<u8>> {
        self.handle().optimized_program()
    }

    /// Bytes it needs on each device.
    ///
    /// # Errors
    /// When the plugin does not say.
    pub fn memory(&self) -> Result<MemoryFigures> {
        self.handle().memory()
    }

    /// XLA's own cost estimate (`flops`, `bytes accessed`, ...), where the plugin has one; most CPU plugins do not.
    ///
    /// # Errors
    /// When the plugin does not offer it.
    pub fn cost_analysis(&self) -> Result<Vec<(String, NamedValue)>> {
        self.handle().cost_analysis()
    }

    /// The plugin's fingerprint of the compiled program.
    ///
    /// # Errors
    /// When the plugin does not offer it.
    pub fn fingerprint(&self) -> Result<String> {
        self.handle().fingerprint()
    }

    /// The compiled program as bytes, for the cache.
    ///
    /// # Errors
    /// When the plugin does not offer it.
    pub fn serialize(&self) -> Result<Vec<u8>> {
        self.handle().serialize()
    }

    /// Runs a program of one device. Returns at once; the results can be read or passed on while it still runs.
    ///
    /// # Errors
    /// When the arguments do not fit the program (nothing has run then), or the plugin refuses.
    pub fn execute(&self, arguments: &[&Buffer]) -> Result<Vec<Buffer>> {
        let mut results = self.run(&[arguments], &ExecuteOptions::default())?;
        Ok(results.pop().unwrap_or_default())
    }

    /// Runs a program on all its devices: one list of arguments for each, in the order of [`Self::devices`], and one
    /// list of results for each.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn execute_sharded<'b, L: AsRef<[&'b Buffer]>>(&self, arguments: &[L]) -> Result<Vec<Vec<Buffer>>> {
        self.run(arguments, &ExecuteOptions::default())
    }

    /// Runs a program on all its devices, with options.
    ///
    /// # Errors
    /// As [`Self::execute`]; with `wait`, also when the program fails.
    pub fn run<'b, L: AsRef<[&'b Buffer]>>(
        &self,
        arguments: &[L],
        options: &ExecuteOptions<'_>,
    ) -> Result<Vec<Vec<Buffer>>> {
        let operation = "execute";
        self.check_arguments(arguments, options.keep)?;
        let count = self.devices.len();
        let raw_arguments: Vec<Vec<*mut sys::PJRT_Buffer>> =
            arguments.iter().map(|l| l.as_ref().iter().map(|b| b.raw).collect()).collect();
        let lists: Vec<_> = raw_arguments.iter().map(|l| l.as_ptr()).collect();
        let outputs = self.signature.outputs.len();
        let mut raw_results = vec![vec![ptr::null_mut::<sys::PJRT_Buffer>(); outputs]; count];
        let result_lists: Vec<_> = raw_results.iter_mut().map(|l| l.as_mut_ptr()).collect();
        let mut events = vec![ptr::null_mut::<sys::PJRT_Event>(); if options.wait { count } else { 0 }];
        let keep: Vec<i64> = options.keep.iter().map(|&i| i as i64).collect();
        let mut raw_options = args!(PJRT_ExecuteOptions {
            non_donatable_input_indices: keep.as_ptr(),
            num_non_donatable_input_indices: keep.len(),
        });
        let mut a = args!(PJRT_LoadedExecutable_Execute_Args {
            executable: self.loaded,
            options: &raw mut raw_options,
            argument_lists: lists.as_ptr(),
            num_devices: count,
            num_args: self.signature.inputs.len(),
            output_lists: result_lists.as_ptr(),
            device_complete_events: if options.wait { events.as_mut_ptr() } else { ptr::null_mut() },
        });
        // SAFETY: the arguments were checked to be live, of this client, and to fit the program in number, type and
        // device; the result lists have as many places as the program has results; everything outlives the call.
        unsafe { call!(self.client.api(), operation, PJRT_LoadedExecutable_Execute, a) }?;

        let mut results = Vec::with_capacity(count);
        for (list, &device) in raw_results.iter().zip(&self.devices) {
            let mut buffers = Vec::with_capacity(outputs);
            for (&raw, output) in list.iter().zip(&self.signature.outputs) {
                if raw.is_null() {
                    return Err(PjrtError::Contract { operation, reason: "a result is missing".to_owned() });
                }
                let client = Arc::clone(&self.client);
                buffers.push(Buffer::from_parts(client, raw, output.dtype, output.shape.clone(), device));
            }
            results.push(buffers);
        }
        // Every event is waited for and freed, even after one of them failed.
        let mut failed = Ok(());
        for event in events {
            failed = failed.and(self.client.api().wait(operation, event));
        }
        failed.map(|()| results)
    }

    /// Finds everything that is wrong with a call before the plugin sees it.
    fn check_arguments<'b, L: AsRef<[&'b Buffer]>>(&self, arguments: &[L], keep: &[usize]) -> Result<()> {
        let program = || self.name.clone();
        if arguments.len() != self.devices.len() {
            return Err(PjrtError::DeviceCount {
                program: program(),
                wanted: self.devices.len(),
                got: arguments.len(),
            });
        }
        let inputs = &self.signature.inputs;
        if let Some(&index) = keep.iter().find(|&&i| i >= inputs.len()) {
            return Err(PjrtError::Option {
                name: "keep".to_owned(),
                reason: format!("there is no argument {index}; program {:?} takes {}", self.name, inputs.len()),
            });
        }
        for (list, (arguments, &device)) in arguments.iter().zip(&self.devices).enumerate() {
            let arguments = arguments.as_ref();
            if arguments.len() != inputs.len() {
                return Err(PjrtError::ArgumentCount {
                    program: program(),
                    device: list,
                    wanted: inputs.len(),
                    got: arguments.len(),
                });
            }
            for (index, (buffer, input)) in arguments.iter().zip(inputs).enumerate() {
                if !Arc::ptr_eq(&buffer.client, &self.client) || buffer.device() != device {
                    let same = Arc::ptr_eq(&buffer.client, &self.client);
                    return Err(PjrtError::ArgumentDevice {
                        program: program(),
                        index,
                        wanted: format!("device {device}"),
                        got: if same { format!("device {}", buffer.device()) } else { "another client".to_owned() },
                    });
                }
                if buffer.dtype() != input.dtype || *buffer.shape() != input.shape {
                    return Err(PjrtError::ArgumentType {
                        program: program(),
                        device: list,
                        index,
                        wanted_dtype: input.dtype,
                        wanted_shape: input.shape.clone(),
                        got_dtype: buffer.dtype(),
                        got_shape: buffer.shape().clone(),
                    });
                }
                if buffer.is_deleted() {
                    return Err(PjrtError::Deleted {
                        operation: "execute",
                        dtype: buffer.dtype(),
                        shape: buffer.shape().clone(),
                    });
                }
            }
            for &index in self.signature.donated.iter().filter(|i| !keep.contains(i)) {
                let twin = arguments.iter().enumerate().position(|(j, b)| j != index && b.raw == arguments[index].raw);
                if let Some(other) = twin {
                    return Err(PjrtError::DonatedTwice { program: program(), index, other });
                }
            }
        }
        Ok(())
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        let _ = (|| -> Result<()> {
            if !self.executable.is_null() {
                let mut a = args!(PJRT_Executable_Destroy_Args { executable: self.executable });
                // SAFETY: the handle is ours and not used again.
                unsafe { call!(self.client.api(), "free a program", PJRT_Executable_Destroy, a) }?;
            }
            let mut a = args!(PJRT_LoadedExecutable_Destroy_Args { executable: self.loaded });
            // SAFETY: as above.
            unsafe { call!(self.client.api(), "free a program", PJRT_LoadedExecutable_Destroy, a) }
        })();
    }
}

impl fmt::Debug for Executable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Executable({:?} on devices {:?})", self.name, self.devices)
    }
}
