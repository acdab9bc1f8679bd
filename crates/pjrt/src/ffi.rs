//! Custom calls: operations of a program that are carried out by Rust code of this process. CPU only.
//!
//! A program names the handler, `api_version = 4` says which calling convention:
//!
//! ```mlir
//! %r = stablehlo.custom_call @dot_rows(%x, %w) {api_version = 4 : i32, backend_config = {rows = 8 : i64}}
//!   : (tensor<4xf32>, tensor<8x4xf32>) -> tensor<8xf32>
//! ```
//!
//! Handlers may use threads of their own. In a partitioned program a custom call is not split: wrap it in
//! `sdy.manual_computation`.

use std::ffi::CString;
use std::fmt;
use std::mem::{offset_of, size_of};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use tensor::{DType, Element};

use crate::api::{slice, string};
use crate::client::Client;
use crate::dtype;
use crate::error::{PjrtError, Result};
use crate::sys;

mod threads;

/// The code of a custom call.
pub trait Handler {
    /// The name programs call it by.
    const NAME: &'static str;

    /// Computes the outputs from the inputs. May run on several threads at once, for different calls.
    ///
    /// # Errors
    /// The message becomes the error of the program. A panic does too.
    fn call(call: &mut Call<'_>) -> Result<(), String>;
}

/// An input of a custom call.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub dims: &'a [i64],
    /// The elements, row-major.
    pub bytes: &'a [u8],
}

/// An output of a custom call, to be filled in.
pub struct Output<'a> {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first.
    pub dims: &'a [i64],
    /// The elements, row-major. What they hold before is of no meaning, unless they take over an input's memory.
    pub bytes: &'a mut [u8],
}

impl fmt::Debug for Input<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Input({}{:?})", self.dtype, self.dims)
    }
}

impl fmt::Debug for Output<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Output({}{:?})", self.dtype, self.dims)
    }
}

fn mismatch(wanted: DType, found: DType) -> String {
    format!("expected an array of {wanted}, found {found}")
}

impl<'a> Input<'a> {
    /// The elements as `T`.
    ///
    /// # Errors
    /// When they are of another type.
    pub fn as_slice<T: Element>(&self) -> Result<&'a [T], String> {
        if T::DTYPE != self.dtype {
            return Err(mismatch(T::DTYPE, self.dtype));
        }
        bytemuck::try_cast_slice(self.bytes).map_err(|e| e.to_string())
    }
}

impl Output<'_> {
    /// The elements as `T`.
    ///
    /// # Errors
    /// When they are of another type.
    pub fn as_mut_slice<T: Element>(&mut self) -> Result<&mut [T], String> {
        if T::DTYPE != self.dtype {
            return Err(mismatch(T::DTYPE, self.dtype));
        }
        bytemuck::try_cast_slice_mut(self.bytes).map_err(|e| e.to_string())
    }
}

/// A value of a call's `backend_config`.
#[derive(Debug, Clone, PartialEq)]
pub enum Attribute {
    /// An integer or truth value of any width.
    Int(i64),
    /// A float of any width.
    Float(f64),
    /// Text.
    String(String),
}

/// One custom call.
pub struct Call<'a> {
    /// The inputs, in order. One whose memory an output takes over has no bytes: its elements are those the output holds.
    pub inputs: Vec<Input<'a>>,
    /// The outputs, in order.
    pub outputs: Vec<Output<'a>>,
    attributes: &'a sys::XLA_FFI_Attrs,
    frame: &'a sys::XLA_FFI_CallFrame,
}

impl fmt::Debug for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Call({:?} -> {:?})", self.inputs, self.outputs)
    }
}

impl<'a> Call<'a> {
    /// Borrows everything from a call frame.
    ///
    /// # Safety
    /// The frame must be one XLA made for the execute stage, and live for `'a`.
    unsafe fn from_frame(frame: &'a sys::XLA_FFI_CallFrame) -> Result<Self, String> {
        // SAFETY: the frame's lists have the lengths it says.
        let (arguments, results) = unsafe {
            (
                slice(frame.args.args, usize::try_from(frame.args.size).unwrap_or(0)),
                slice(frame.rets.rets, usize::try_from(frame.rets.size).unwrap_or(0)),
            )
        };
        let mut taken: Vec<Range<usize>> = Vec::with_capacity(arguments.len() + results.len());
        let mut inputs = Vec::with_capacity(arguments.len());
        for &argument in arguments {
            // SAFETY: every argument of this convention is a buffer (the only kind there is).
            let (dtype, dims, data, len) = unsafe { describe(&*argument.cast()) }?;
            // SAFETY: the buffer has the bytes its shape says, and nobody writes to it during the call: that no
            // output overlaps it is checked below.
            let bytes = unsafe { slice(data.cast_const(), len) };
            taken.push(data as usize..data as usize + len);
            inputs.push(Input { dtype, dims, bytes });
        }
        let mut outputs = Vec::with_capacity(results.len());
        for &result in results {
            // SAFETY: as above.
            let (dtype, dims, data, len) = unsafe { describe(&*result.cast()) }?;
            let range = data as usize..data as usize + len;
            let overlaps = |t: &Range<usize>| t.start < range.end && range.start < t.end;
            // Memory that is taken over as a whole.
            if let Some(i) = taken[..inputs.len()].iter().position(|t| *t == range && len > 0) {
                inputs[i].bytes = &[];
                taken[i] = 0..0;
            }
            if taken.iter().any(overlaps) {
                return Err("an output shares memory with an input or another output".to_owned());
            }
            taken.push(range);
            let bytes: &mut [u8] = if len == 0 {
                &mut []
            } else {
                // SAFETY: the buffer has the bytes its shape says, it was allocated outside of Rust, and nothing else
                // refers to it during the call, as just checked.
                unsafe { std::slice::from_raw_parts_mut(data, len) }
            };
            outputs.push(Output { dtype, dims, bytes });
        }
        Ok(Call { inputs, outputs, attributes: &frame.attrs, frame })
    }

    /// A value of the call's `backend_config`. `None`: not there, or of a kind this crate does not read.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<Attribute> {
        let a = self.attributes;
        let n = usize::try_from(a.size).unwrap_or(0);
        // SAFETY: the three lists have the length the frame says.
        let (types, names, values) = unsafe { (slice(a.types, n), slice(a.names, n), slice(a.attrs, n)) };
        for ((&kind, &at), &value) in types.iter().zip(names).zip(values) {
            if at.is_null() || value.is_null() {
                continue;
            }
            // SAFETY: a name is a span of readable bytes.
            if unsafe { slice((*at).ptr.cast::<u8>(), (*at).len) } != name.as_bytes() {
                continue;
            }
            return match kind {
                sys::XLA_FFI_AttrType_STRING => {
                    // SAFETY: the kind says what the value points at.
                    let span = unsafe { &*value.cast::<sys::XLA_FFI_ByteSpan>() };
                    // SAFETY: as above.
                    Some(Attribute::String(unsafe { string(span.ptr, span.len) }))
                }
                // SAFETY: the kind says what the value points at.
                sys::XLA_FFI_AttrType_SCALAR => unsafe { scalar(&*value.cast()) },
                _ => None,
            };
        }
        None
    }
}

/// The parts of a buffer: dtype, extents, memory, size in bytes.
///
/// # Safety
/// The buffer's extents must be readable for as long as the buffer is borrowed.
unsafe fn describe(buffer: &sys::XLA_FFI_Buffer) -> Result<(DType, &[i64], *mut u8, usize), String> {
    let dtype = dtype::from_primitive(i64::from(buffer.dtype))
        .ok_or_else(|| format!("element type {} is not supported", buffer.dtype))?;
    // SAFETY: the caller's promise.
    let dims = unsafe { slice(buffer.dims, usize::try_from(buffer.rank).unwrap_or(0)) };
    let len = dims
        .iter()
        .try_fold(dtype.size(), |n, &d| n.checked_mul(usize::try_from(d).ok()?))
        .ok_or_else(|| format!("extents {dims:?} overflow"))?;
    if buffer.data.is_null() && len != 0 {
        return Err("a buffer without memory".to_owned());
    }
    Ok((dtype, dims, buffer.data.cast(), len))
}

/// # Safety
/// The scalar must point at a value of the type it says.
unsafe fn scalar(s: &sys::XLA_FFI_Scalar) -> Option<Attribute> {
    if s.value.is_null() {
        return None;
    }
    let v = s.value;
    // SAFETY: the caller's promise; unaligned reads, because the value's alignment is nowhere promised.
    Some(unsafe {
        match dtype::from_primitive(i64::from(s.dtype))? {
            DType::Bool | DType::U8 => Attribute::Int(i64::from(v.cast::<u8>().read_unaligned())),
            DType::I8 => Attribute::Int(i64::from(v.cast::<i8>().read_unaligned())),
            DType::I16 => Attribute::Int(i64::from(v.cast::<i16>().read_unaligned())),
            DType::U16 => Attribute::Int(i64::from(v.cast::<u16>().read_unaligned())),
            DType::I32 => Attribute::Int(i64::from(v.cast::<i32>().read_unaligned())),
            DType::U32 => Attribute::Int(i64::from(v.cast::<u32>().read_unaligned())),
            DType::I64 => Attribute::Int(v.cast::<i64>().read_unaligned()),
            DType::U64 => Attribute::Int(i64::try_from(v.cast::<u64>().read_unaligned()).ok()?),
            DType::F32 => Attribute::Float(f64::from(v.cast::<f32>().read_unaligned())),
            DType::F64 => Attribute::Float(v.cast::<f64>().read_unaligned()),
            DType::F16 => Attribute::Float(f64::from(v.cast::<half::f16>().read_unaligned())),
            DType::BF16 => Attribute::Float(f64::from(v.cast::<half::bf16>().read_unaligned())),
        }
    })
}

/// What XLA calls. One instance of it exists for each handler.
unsafe extern "C" fn trampoline<H: Handler>(frame: *mut sys::XLA_FFI_CallFrame) -> *mut sys::XLA_FFI_Error {
    // SAFETY: XLA passes a live frame that is ours during the call.
    let frame = unsafe { &*frame };
    // The first call of all only asks which version of the interface the handler was written for.
    let mut extension = frame.extension_start;
    while !extension.is_null() {
        // SAFETY: the list consists of live nodes and ends with a null pointer.
        let node = unsafe { &*extension };
        if node.type_ == sys::XLA_FFI_Extension_Metadata {
            // SAFETY: a node of this type is the head of a metadata extension; XLA wants its fields written.
            unsafe {
                let metadata = (*extension.cast::<sys::XLA_FFI_Metadata_Extension>()).metadata;
                // Nothing newer than 0.1 is used, and plugins refuse handlers newer than themselves.
                (*metadata).api_version.major_version = 0;
                (*metadata).api_version.minor_version = 1;
                (*metadata).traits = 0;
            }
            return ptr::null_mut();
        }
        extension = node.next;
    }
    if frame.stage != sys::XLA_FFI_ExecutionStage_EXECUTE {
        return ptr::null_mut();
    }
    // Unwinding into C++ would end the process.
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the stage says that the frame is one for execution.
        let mut call = unsafe { Call::from_frame(frame) }?;
        H::call(&mut call)
    }));
    let message = match outcome {
        Ok(Ok(())) => return ptr::null_mut(),
        Ok(Err(message)) => message,
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
            format!("panicked: {}", text.unwrap_or("(no message)"))
        }
    };
    let message = CString::new(format!("custom call {:?}: {message}", H::NAME).replace('\0', " ")).unwrap_or_default();
    let mut a = sys::XLA_FFI_Error_Create_Args {
        struct_size: size_of::<sys::XLA_FFI_Error_Create_Args>(),
        message: message.as_ptr(),
        errc: sys::XLA_FFI_Error_Code_INTERNAL,
        ..Default::default()
    };
    // SAFETY: the function has been part of the table since its first version; it copies the message.
    unsafe {
        match ptr::addr_of!((*frame.api).XLA_FFI_Error_Create).read() {
            Some(create) => create(&mut a),
            None => ptr::null_mut(),
        }
    }
}

impl Client {
    /// Makes a handler known to the plugin, for every client of it. To be done before a program that calls it is
    /// compiled, or loaded from a cache.
    ///
    /// # Errors
    /// When the platform is not the CPU, the plugin cannot do it, or another handler has the name.
    pub fn register_handler<H: Handler + 'static>(&self) -> Result<()> {
        let operation = "register a custom call";
        let api = self.inner.api();
        let unsupported = || PjrtError::Unsupported { operation, major: api.version.0, minor: api.version.1 };
        if self.platform_name() != "cpu" {
            return Err(unsupported());
        }
        let extension = api.extension(sys::PJRT_Extension_Type_FFI).ok_or_else(unsupported)?;
        let needed = offset_of!(sys::PJRT_FFI_Extension, register_handler) + size_of::<usize>();
        // SAFETY: the extension is live and starts with its size; the field is read only if it is there.
        let register = unsafe {
            if (*extension).struct_size < needed {
                return Err(unsupported());
            }
            ptr::addr_of!((*extension.cast::<sys::PJRT_FFI_Extension>()).register_handler).read()
        };
        let register = register.ok_or_else(unsupported)?;
        let platform = "Host";
        let mut a = sys::PJRT_FFI_Register_Handler_Args {
            struct_size: size_of::<sys::PJRT_FFI_Register_Handler_Args>(),
            target_name: H::NAME.as_ptr().cast(),
            target_name_size: H::NAME.len(),
            handler: trampoline::<H> as *mut std::ffi::c_void,
            platform_name: platform.as_ptr().cast(),
            platform_name_size: platform.len(),
            ..Default::default()
        };
        // SAFETY: the names outlive the call; the handler is a function, which lives for ever.
        api.check(operation, unsafe { register(&mut a) })
    }
}
