//! What a compiled program tells about itself, whether it is loaded on devices or was compiled for absent ones.

use std::marker::PhantomData;

use crate::api::{Api, args, call, slice, string};
use crate::error::{PjrtError, Result};
use crate::plugin::NamedValue;
use crate::sys;

/// Bytes a compiled program needs on each device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryFigures {
    /// Machine code.
    pub generated_code: i64,
    /// Arguments.
    pub arguments: i64,
    /// Results.
    pub outputs: i64,
    /// Part of the results that lies in donated arguments.
    pub aliased: i64,
    /// Scratch memory while it runs.
    pub temporary: i64,
    /// The most it needs at once, where the plugin tells.
    pub peak: i64,
}

/// A compiled program's handle, which its owner keeps alive.
pub(crate) struct Handle {
    api: Api,
    raw: *mut sys::PJRT_Executable,
}

impl Handle {
    pub(crate) fn new(api: Api, raw: *mut sys::PJRT_Executable) -> Self {
        Handle { api, raw }
    }

    pub(crate) fn name(&self) -> Result<String> {
        let mut a = args!(PJRT_Executable_Name_Args { executable: self.raw });
        // SAFETY: the program is live, and so is the string it hands out.
        unsafe {
            call!(self.api, "look at a compiled program", PJRT_Executable_Name, a)?;
            Ok(string(a.executable_name, a.executable_name_size))
        }
    }

    pub(crate) fn optimized_program(&self) -> Result<Vec<u8>> {
        let operation = "read an optimised program";
        let mut program = args!(PJRT_Program {});
        let mut a = args!(PJRT_Executable_OptimizedProgram_Args { executable: self.raw, program: &raw mut program });
        // SAFETY: with a null code pointer the call only reports the size it needs.
        unsafe { call!(self.api, operation, PJRT_Executable_OptimizedProgram, a) }?;
        let mut code = vec![0u8; program.code_size];
        program.code = code.as_mut_ptr().cast();
        a.program = &raw mut program;
        // SAFETY: the memory is as large as the plugin said.
        unsafe { call!(self.api, operation, PJRT_Executable_OptimizedProgram, a) }?;
        // SAFETY: the format is a string of static lifetime.
        let format = unsafe { string(program.format, program.format_size) };
        if format != "hlo_with_config" {
            return Err(PjrtError::Contract { operation, reason: format!("its format is {format:?}") });
        }
        code.truncate(program.code_size);
        Ok(code)
    }

    pub(crate) fn memory(&self) -> Result<MemoryFigures> {
        let mut a = args!(PJRT_Executable_GetCompiledMemoryStats_Args { executable: self.raw });
        // SAFETY: the program is live.
        unsafe { call!(self.api, "read a program's memory figures", PJRT_Executable_GetCompiledMemoryStats, a) }?;
        Ok(MemoryFigures {
            generated_code: a.generated_code_size_in_bytes,
            arguments: a.argument_size_in_bytes,
            outputs: a.output_size_in_bytes,
            aliased: a.alias_size_in_bytes,
            temporary: a.temp_size_in_bytes,
            peak: a.peak_memory_in_bytes,
        })
    }

    pub(crate) fn cost_analysis(&self) -> Result<Vec<(String, NamedValue)>> {
        let mut a = args!(PJRT_Executable_GetCostAnalysis_Args { executable: self.raw });
        // SAFETY: the program is live, and so is the list it hands out.
        unsafe {
            call!(self.api, "read a program's cost", PJRT_Executable_GetCostAnalysis, a)?;
            Ok(NamedValue::read_all(slice(a.properties, a.num_properties)))
        }
    }

    pub(crate) fn fingerprint(&self) -> Result<String> {
        let mut a = args!(PJRT_Executable_Fingerprint_Args { executable: self.raw });
        // SAFETY: the program is live, and so is the string it hands out.
        unsafe {
            call!(self.api, "read a program's fingerprint", PJRT_Executable_Fingerprint, a)?;
            Ok(string(a.executable_fingerprint, a.executable_fingerprint_size))
        }
    }

    pub(crate) fn serialize(&self) -> Result<Vec<u8>> {
        let mut a = args!(PJRT_Executable_Serialize_Args { executable: self.raw.cast_const() });
        // SAFETY: the program is live; the bytes live until the deleter runs.
        unsafe {
            call!(self.api, "store a program", PJRT_Executable_Serialize, a)?;
            let bytes = slice(a.serialized_bytes.cast::<u8>(), a.serialized_bytes_size).to_vec();
            if let Some(delete) = a.serialized_executable_deleter {
                delete(a.serialized_executable);
            }
            Ok(bytes)
        }
    }
}

/// A program's text as the C API takes it.
pub(crate) struct RawProgram<'a> {
    pub(crate) raw: sys::PJRT_Program,
    text: PhantomData<&'a str>,
}

/// Wraps StableHLO text.
pub(crate) fn program(text: &str) -> Result<RawProgram<'_>> {
    // Seen to crash plugins. Donation is written on the arguments instead.
    if text.contains("mhlo.input_output_alias") {
        let reason = "plugins crash on this attribute; mark arguments with tf.aliasing_output instead".to_owned();
        return Err(PjrtError::Option { name: "mhlo.input_output_alias".to_owned(), reason });
    }
    let format = "mlir";
    let raw = args!(PJRT_Program {
        // The plugin does not write to the program; the C declaration is shared with functions that do.
        code: text.as_ptr().cast_mut().cast(),
        code_size: text.len(),
        format: format.as_ptr().cast(),
        format_size: format.len(),
    });
    Ok(RawProgram { raw, text: PhantomData })
}
