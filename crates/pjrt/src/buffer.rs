//! Arrays in a device's memory, and their way in and out.

use std::fmt;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use tensor::{DType, HostArray, Shape};

use crate::api::{args, call};
use crate::client::{Client, ClientInner, Counters};
use crate::dtype;
use crate::error::{PjrtError, Result};
use crate::sys;

/// The alignment, in bytes, that the CPU runtime asks of memory it uses in place.
pub const ZERO_COPY_ALIGNMENT: usize = 64;

/// Memory that buffers can borrow from: a mapped file, an [`AlignedBytes`](tensor::AlignedBytes), ...
///
/// `as_ref` must return the same memory every time, and nothing may write to it while a buffer uses it.
pub type Owner = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Where the bytes of a mapped buffer ended up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// The buffer *is* the host's memory: its device pointer equals the host pointer.
    ZeroCopy,
    /// The runtime made a copy.
    Copied,
}

/// An array in a device's memory. Freed when dropped; programs already started keep what they need.
///
/// Results of a program are usable at once, even while it still runs: reading one waits for it, and returns the
/// program's error if it failed.
pub struct Buffer {
    pub(crate) client: Arc<ClientInner>,
    pub(crate) raw: *mut sys::PJRT_Buffer,
    dtype: DType,
    shape: Shape,
    device: usize,
}

// SAFETY: the C API's buffers may be used from any thread at the same time.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Takes over a buffer of the runtime.
    pub(crate) fn from_parts(
        client: Arc<ClientInner>,
        raw: *mut sys::PJRT_Buffer,
        dtype: DType,
        shape: Shape,
        device: usize,
    ) -> Self {
        Buffer { client, raw, dtype, shape, device }
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The device it lives on, as an index into [`Client::devices`].
    #[must_use]
    pub fn device(&self) -> usize {
        self.device
    }

    /// Size of the elements in bytes.
    #[must_use]
    pub fn size_in_bytes(&self) -> usize {
        self.shape.checked_bytes(self.dtype).unwrap_or(usize::MAX)
    }

    /// Whether its memory is gone: donated to a program, or deleted.
    #[must_use]
    pub fn is_deleted(&self) -> bool {
        let ask = || -> Result<bool> {
            let mut a = args!(PJRT_Buffer_IsDeleted_Args { buffer: self.raw });
            // SAFETY: the buffer handle is live even if its memory is gone.
            unsafe { call!(self.client.api(), "look at a buffer", PJRT_Buffer_IsDeleted, a) }?;
            Ok(a.is_deleted)
        };
        // A plugin that cannot say so says so again when the buffer is used.
        ask().unwrap_or(false)
    }

    /// Frees its memory now, whoever else holds the handle.
    ///
    /// # Errors
    /// When the plugin refuses.
    pub fn delete(&self) -> Result<()> {
        let mut a = args!(PJRT_Buffer_Delete_Args { buffer: self.raw });
        // SAFETY: the buffer handle is live; deleting twice is allowed.
        unsafe { call!(self.client.api(), "delete a buffer", PJRT_Buffer_Delete, a) }
    }

    fn check_live(&self, operation: &'static str) -> Result<()> {
        if self.is_deleted() {
            return Err(PjrtError::Deleted { operation, dtype: self.dtype, shape: self.shape.clone() });
        }
        Ok(())
    }

    /// Waits until its contents are there.
    ///
    /// # Errors
    /// When the buffer is gone, or the program or transfer that makes it failed.
    pub fn wait(&self) -> Result<()> {
        let operation = "wait for a buffer";
        self.check_live(operation)?;
        let mut a = args!(PJRT_Buffer_ReadyEvent_Args { buffer: self.raw });
        // SAFETY: the buffer is live.
        unsafe { call!(self.client.api(), operation, PJRT_Buffer_ReadyEvent, a) }?;
        self.client.api().wait(operation, a.event)
    }

    /// Copies its contents to the host, row-major. Waits for them first.
    ///
    /// # Errors
    /// When the buffer is gone, or the program or transfer that makes it failed.
    pub fn to_host(&self) -> Result<HostArray> {
        let mut out = HostArray::zeros(self.dtype, self.shape.clone())?;
        self.copy_to(out.bytes_mut())?;
        Ok(out)
    }

    /// Copies its contents, row-major, into memory of exactly its size. Waits for them first.
    ///
    /// # Errors
    /// When the size is not exact, the buffer is gone, or the program or transfer that makes it failed.
    pub fn copy_to(&self, destination: &mut [u8]) -> Result<()> {
        let operation = "copy a buffer to the host";
        self.check_live(operation)?;
        let needed = self.shape.checked_bytes(self.dtype)?;
        if destination.len() != needed {
            return Err(PjrtError::Size {
                dtype: self.dtype,
                shape: self.shape.clone(),
                needed,
                got: destination.len(),
            });
        }
        if needed == 0 {
            return self.wait();
        }
        // Row-major must be asked for: without a layout the runtime hands out the device's own.
        let minor_to_major: Vec<i64> = (0..self.shape.rank() as i64).rev().collect();
        let tiled = args!(PJRT_Buffer_MemoryLayout_Tiled {
            minor_to_major: minor_to_major.as_ptr(),
            minor_to_major_size: minor_to_major.len(),
        });
        let mut layout = args!(PJRT_Buffer_MemoryLayout {
            __bindgen_anon_1: sys::PJRT_Buffer_MemoryLayout__bindgen_ty_1 { tiled },
            type_: sys::PJRT_Buffer_MemoryLayout_Type_Tiled,
        });
        let api = self.client.api();
        let mut a = args!(PJRT_Buffer_ToHostBuffer_Args { src: self.raw, host_layout: &raw mut layout });
        // SAFETY: with a null destination the call only reports the size it needs.
        unsafe { call!(api, operation, PJRT_Buffer_ToHostBuffer, a) }?;
        if !a.event.is_null() {
            api.wait(operation, a.event)?;
        }
        if a.dst_size != needed {
            return Err(PjrtError::Contract {
                operation,
                reason: format!("it wants to write {} bytes for {}{}", a.dst_size, self.dtype, self.shape),
            });
        }
        let mut a = args!(PJRT_Buffer_ToHostBuffer_Args {
            src: self.raw,
            host_layout: &raw mut layout,
            dst: destination.as_mut_ptr().cast(),
            dst_size: destination.len(),
        });
        // SAFETY: the destination is exactly as large as the plugin said, borrowed mutably until the event below has
        // happened; the layout lives as long.
        unsafe { call!(api, operation, PJRT_Buffer_ToHostBuffer, a) }?;
        api.wait(operation, a.event)
    }

    /// Copies bytes from `start` on as they lie on the device, which on a CPU is row-major. Waits for them first.
    ///
    /// # Errors
    /// When the range leaves the buffer, it is gone, its program failed, or the plugin cannot do this.
    pub fn copy_part_to(&self, start: usize, destination: &mut [u8]) -> Result<()> {
        let operation = "copy a part of a buffer to the host";
        self.check_live(operation)?;
        let (len, size) = (destination.len(), self.size_in_bytes());
        if start.checked_add(len).is_none_or(|end| end > size) {
            return Err(PjrtError::Range { start, end: start.saturating_add(len), len: size });
        }
        if len == 0 {
            return self.wait();
        }
        let raw = |n: usize| i64::try_from(n).map_err(|_| PjrtError::Range { start, end: start + len, len: size });
        let mut a = args!(PJRT_Buffer_CopyRawToHost_Args {
            buffer: self.raw,
            dst: destination.as_mut_ptr().cast(),
            offset: raw(start)?,
            transfer_size: raw(len)?,
        });
        let api = self.client.api();
        // SAFETY: the range is within the buffer, the destination as long, and borrowed mutably until the event below has
        // happened.
        unsafe { call!(api, operation, PJRT_Buffer_CopyRawToHost, a) }?;
        api.wait(operation, a.event)
    }

    /// The address of its memory, where the platform tells (CPU does: there it is ordinary memory).
    #[must_use]
    pub fn address(&self) -> Option<usize> {
        if self.is_deleted() {
            return None;
        }
        let ask = || -> Result<usize> {
            let mut a = args!(PJRT_Buffer_UnsafePointer_Args { buffer: self.raw });
            // SAFETY: the buffer is live; the number is not dereferenced.
            unsafe { call!(self.client.api(), "read a buffer's address", PJRT_Buffer_UnsafePointer, a) }?;
            Ok(a.buffer_pointer)
        };
        ask().ok()
    }

    /// Copies it to another device of the same client.
    ///
    /// # Errors
    /// When there is no such device, the buffer is gone, or the plugin refuses.
    pub fn copy_to_device(&self, device: usize) -> Result<Buffer> {
        let operation = "copy a buffer to a device";
        self.check_live(operation)?;
        let target = self.client.device(device)?.raw.0;
        let mut a = args!(PJRT_Buffer_CopyToDevice_Args { buffer: self.raw, dst_device: target });
        // SAFETY: buffer and device belong to the same live client.
        unsafe { call!(self.client.api(), operation, PJRT_Buffer_CopyToDevice, a) }?;
        Ok(Buffer::from_parts(Arc::clone(&self.client), a.dst_buffer, self.dtype, self.shape.clone(), device))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let _ = (|| -> Result<()> {
            let mut a = args!(PJRT_Buffer_Destroy_Args { buffer: self.raw });
            // SAFETY: the handle is ours and not used again.
            unsafe { call!(self.client.api(), "free a buffer", PJRT_Buffer_Destroy, a) }
        })();
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({}{} on device {})", self.dtype, self.shape, self.device)
    }
}

impl Client {
    /// Copies bytes (row-major, little-endian) to a device. The bytes are free again when this returns.
    ///
    /// # Errors
    /// When the bytes do not fill the shape exactly, there is no such device, or the plugin refuses.
    pub fn buffer_from_bytes(&self, bytes: &[u8], dtype: DType, shape: &Shape, device: usize) -> Result<Buffer> {
        check_size(bytes.len(), dtype, shape)?;
        // SAFETY: with these semantics the runtime has copied the bytes when the call returns.
        let (buffer, done) = unsafe {
            self.host_buffer(bytes, dtype, shape, device, sys::PJRT_HostBufferSemantics_kImmutableOnlyDuringCall)
        }?;
        self.inner.api().wait("copy to a device", done)?;
        Counters::add(&self.inner.counters.copies, bytes.len());
        Ok(buffer)
    }

    /// Copies a host array to a device.
    ///
    /// # Errors
    /// When there is no such device, or the plugin refuses.
    pub fn buffer_from_host(&self, array: &HostArray, device: usize) -> Result<Buffer> {
        self.buffer_from_bytes(array.bytes(), array.dtype(), array.shape(), device)
    }

    /// Hands a host array over to a device; on a CPU, without a copy.
    ///
    /// # Errors
    /// When there is no such device, or the plugin refuses.
    pub fn buffer_from_owned(&self, array: HostArray, device: usize) -> Result<(Buffer, Placement)> {
        struct Owned(HostArray);
        impl AsRef<[u8]> for Owned {
            fn as_ref(&self) -> &[u8] {
                self.0.bytes()
            }
        }
        let (dtype, shape) = (array.dtype(), array.shape().clone());
        let len = array.bytes().len();
        self.buffer_from_mapped(Arc::new(Owned(array)), 0..len, dtype, &shape, device)
    }

    /// A buffer of bytes that `owner` keeps in memory, such as a mapped file. A CPU uses them in place if they start
    /// at a multiple of [`ZERO_COPY_ALIGNMENT`]; whether it really did is asked of the runtime, reported, and counted
    /// in [`Client::transfer_stats`].
    ///
    /// The runtime never writes to the memory. `owner` is released when the runtime needs it no longer: after the
    /// buffer and all programs that read it are gone, or after the copy.
    ///
    /// # Errors
    /// When the range leaves the memory or does not fill the shape exactly, there is no such device, or the plugin
    /// refuses.
    pub fn buffer_from_mapped(
        &self,
        owner: Owner,
        range: Range<usize>,
        dtype: DType,
        shape: &Shape,
        device: usize,
    ) -> Result<(Buffer, Placement)> {
        let memory: &[u8] = (*owner).as_ref();
        let bytes = memory.get(range.clone()).ok_or(PjrtError::Range {
            start: range.start,
            end: range.end,
            len: memory.len(),
        })?;
        check_size(bytes.len(), dtype, shape)?;
        let address = bytes.as_ptr() as usize;
        let aligned = address.is_multiple_of(ZERO_COPY_ALIGNMENT) && !bytes.is_empty();
        let semantics = if aligned {
            sys::PJRT_HostBufferSemantics_kImmutableZeroCopy
        } else {
            sys::PJRT_HostBufferSemantics_kImmutableUntilTransferCompletes
        };
        // SAFETY: `owner` keeps the bytes alive and unchanged, and `drop_when_done` keeps `owner` until the runtime
        // says that it has finished with them.
        let (buffer, done) = unsafe { self.host_buffer(bytes, dtype, shape, device, semantics) }?;
        let size = bytes.len();
        self.inner.api().drop_when_done(done, owner)?;
        if aligned && buffer.address() == Some(address) {
            Counters::add(&self.inner.counters.zero_copy, size);
            return Ok((buffer, Placement::ZeroCopy));
        }
        Counters::add(&self.inner.counters.mapped_copies, size);
        Ok((buffer, Placement::Copied))
    }

    /// Starts a transfer. The event says when the runtime has finished with the bytes.
    ///
    /// # Safety
    /// The bytes must stay alive and unchanged for as long as `semantics` says.
    unsafe fn host_buffer(
        &self,
        bytes: &[u8],
        dtype: DType,
        shape: &Shape,
        device: usize,
        semantics: sys::PJRT_HostBufferSemantics,
    ) -> Result<(Buffer, *mut sys::PJRT_Event)> {
        let target = self.inner.device(device)?.raw.0;
        let dims = dtype::dims_to_raw(shape)?;
        let mut a = args!(PJRT_Client_BufferFromHostBuffer_Args {
            client: self.inner.raw,
            data: bytes.as_ptr().cast(),
            type_: dtype::to_raw(dtype),
            dims: dims.as_ptr(),
            num_dims: dims.len(),
            host_buffer_semantics: semantics,
            device: target,
            memory: ptr::null_mut(),
        });
        // SAFETY: the size was checked against dtype and shape by the callers; the caller vouches for the lifetime.
        unsafe { call!(self.inner.api(), "copy to a device", PJRT_Client_BufferFromHostBuffer, a) }?;
        if a.buffer.is_null() {
            return Err(PjrtError::Contract { operation: "copy to a device", reason: "no buffer".to_owned() });
        }
        let buffer = Buffer::from_parts(Arc::clone(&self.inner), a.buffer, dtype, shape.clone(), device);
        Ok((buffer, a.done_with_host_buffer))
    }
}

fn check_size(got: usize, dtype: DType, shape: &Shape) -> Result<()> {
    let needed = shape.checked_bytes(dtype)?;
    if needed == got { Ok(()) } else { Err(PjrtError::Size { dtype, shape: shape.clone(), needed, got }) }
}
