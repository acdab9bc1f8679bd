//! The plugin's function table, and what every call through it has in common: the struct size, the error that
//! comes back, the event that says when it is done.

use std::mem::{offset_of, size_of};
use std::ptr;

use crate::error::{Code, PjrtError, Result};
use crate::sys;

/// Makes an argument struct of the C API: the size is filled in, everything not named is zero.
macro_rules! args {
    ($ty:ident { $($field:ident : $value:expr),* $(,)? }) => {
        $crate::sys::$ty {
            struct_size: ::std::mem::size_of::<$crate::sys::$ty>(),
            $($field: $value,)*
            ..Default::default()
        }
    };
}
pub(crate) use args;

/// Calls a function of the table and turns its error into a [`PjrtError`].
///
/// The caller vouches, with a SAFETY comment at the call, for the pointers inside `$args`.
macro_rules! call {
    ($api:expr, $operation:expr, $function:ident, $args:expr) => {
        $api.check(
            $operation,
            $api.lookup($operation, ::std::mem::offset_of!($crate::sys::PJRT_Api, $function), |t| {
                ::std::ptr::addr_of!((*t).$function).read()
            })?(&mut $args),
        )
    };
}
pub(crate) use call;

/// A plugin's function table. It lives as long as the process: plugins are never unloaded.
#[derive(Clone, Copy)]
pub(crate) struct Api {
    table: *const sys::PJRT_Api,
    /// What the plugin says about its own version.
    pub(crate) version: (i32, i32),
}

// SAFETY: the table is constant after `Plugin::load` and the C API may be called from any thread.
unsafe impl Send for Api {}
// SAFETY: as above.
unsafe impl Sync for Api {}

impl Api {
    /// Wraps a table.
    ///
    /// # Safety
    /// `table` must be what a plugin's `GetPjrtApi` returned, from a library that stays loaded.
    pub(crate) unsafe fn new(table: *const sys::PJRT_Api) -> Result<Self, String> {
        if table.is_null() {
            return Err("GetPjrtApi returned null".to_owned());
        }
        // SAFETY: the first field of every version of the table is its size.
        let size = unsafe { ptr::addr_of!((*table).struct_size).read() };
        let needed = offset_of!(sys::PJRT_Api, pjrt_api_version) + size_of::<sys::PJRT_Api_Version>();
        if size < needed {
            return Err(format!("its function table has {size} bytes, too few to hold a version"));
        }
        // SAFETY: the size just read says that the version is there.
        let v = unsafe { ptr::addr_of!((*table).pjrt_api_version).read() };
        Ok(Api { table, version: (v.major_version, v.minor_version) })
    }

    /// A function of the table, or an error if this plugin's table ends before it.
    pub(crate) fn lookup<F>(
        &self,
        operation: &'static str,
        offset: usize,
        get: impl FnOnce(*const sys::PJRT_Api) -> Option<F>,
    ) -> Result<F> {
        // SAFETY: `new` checked that the table is there; its size field is always readable.
        let size = unsafe { ptr::addr_of!((*self.table).struct_size).read() };
        let unsupported = PjrtError::Unsupported { operation, major: self.version.0, minor: self.version.1 };
        if size < offset + size_of::<usize>() {
            return Err(unsupported);
        }
        // `get` reads only the field at `offset` (both come from the same name in `call!`), and that field lies inside
        // the plugin's table, which may be shorter than ours: so no reference to the whole of it is ever made.
        get(self.table).ok_or(unsupported)
    }

    /// The first extension of a kind.
    pub(crate) fn extension(&self, kind: sys::PJRT_Extension_Type) -> Option<*const sys::PJRT_Extension_Base> {
        // SAFETY: `new` checked that the table is long enough to hold this field, which precedes the version.
        let mut at = unsafe { ptr::addr_of!((*self.table).extension_start).read() };
        while !at.is_null() {
            // SAFETY: the plugin's list consists of valid nodes that end with a null pointer.
            let node = unsafe { &*at };
            if node.type_ == kind {
                return Some(at);
            }
            at = node.next;
        }
        None
    }

    /// Turns a returned error into ours, and frees it.
    pub(crate) fn check(&self, operation: &'static str, error: *mut sys::PJRT_Error) -> Result<()> {
        if error.is_null() {
            return Ok(());
        }
        let (code, message) = self.take_error(error);
        Err(PjrtError::Plugin { operation, code, message })
    }

    fn take_error(&self, error: *mut sys::PJRT_Error) -> (Code, String) {
        let get = |offset| {
            // The three error functions are the first of every table ever released.
            // SAFETY: reading the size field of a valid table.
            let size = unsafe { ptr::addr_of!((*self.table).struct_size).read() };
            size >= offset + size_of::<usize>()
        };
        let mut message = String::from("(no message)");
        let mut code = Code::Unknown;
        if get(offset_of!(sys::PJRT_Api, PJRT_Error_Message)) {
            let mut a = args!(PJRT_Error_Message_Args { error: error });
            // SAFETY: `error` came from this plugin and is freed only below.
            if let Some(f) = unsafe { (*self.table).PJRT_Error_Message } {
                // SAFETY: as above.
                unsafe { f(&mut a) };
                // SAFETY: the message is valid until the error is destroyed.
                message = unsafe { string(a.message, a.message_size) };
            }
        }
        if get(offset_of!(sys::PJRT_Api, PJRT_Error_GetCode)) {
            let mut a = args!(PJRT_Error_GetCode_Args { error: error });
            // SAFETY: as above.
            if let Some(f) = unsafe { (*self.table).PJRT_Error_GetCode } {
                // SAFETY: as above. An error about an error is dropped: there is nothing to do with it.
                if unsafe { f(&mut a) }.is_null() {
                    code = Code::from_raw(a.code);
                }
            }
        }
        if get(offset_of!(sys::PJRT_Api, PJRT_Error_Destroy)) {
            let mut a = args!(PJRT_Error_Destroy_Args { error: error });
            // SAFETY: the error is ours to free, and is not used again.
            if let Some(f) = unsafe { (*self.table).PJRT_Error_Destroy } {
                // SAFETY: as above.
                unsafe { f(&mut a) };
            }
        }
        (code, message)
    }

    /// Waits for an event and frees it. A null event is one that has happened.
    pub(crate) fn wait(&self, operation: &'static str, event: *mut sys::PJRT_Event) -> Result<()> {
        if event.is_null() {
            return Ok(());
        }
        let mut a = args!(PJRT_Event_Await_Args { event: event });
        // SAFETY: the event is live; it is freed right after.
        let waited = unsafe { call!(self, operation, PJRT_Event_Await, a) };
        self.free_event(event);
        waited
    }

    /// Frees an event without waiting for it.
    pub(crate) fn free_event(&self, event: *mut sys::PJRT_Event) {
        if event.is_null() {
            return;
        }
        let _ = (|| -> Result<()> {
            let mut a = args!(PJRT_Event_Destroy_Args { event: event });
            // SAFETY: the caller gives the event up.
            unsafe { call!(self, "free an event", PJRT_Event_Destroy, a) }
        })();
    }

    /// Drops `value` when the event happens (at once if it is null or cannot be watched after waiting for it).
    /// The event is freed.
    pub(crate) fn drop_when_done<T: Send + 'static>(&self, event: *mut sys::PJRT_Event, value: T) -> Result<()> {
        /// What the callback owns.
        struct Held<T> {
            _value: T,
            api: Api,
        }
        unsafe extern "C" fn done<T: Send + 'static>(error: *mut sys::PJRT_Error, arg: *mut std::ffi::c_void) {
            // SAFETY: `arg` is the box made below, handed over exactly once.
            let held = unsafe { Box::from_raw(arg.cast::<Held<T>>()) };
            if !error.is_null() {
                let _ = held.api.take_error(error);
            }
        }
        if event.is_null() {
            return Ok(());
        }
        let held = Box::into_raw(Box::new(Held { _value: value, api: *self }));
        let mut a = args!(PJRT_Event_OnReady_Args { event: event, callback: Some(done::<T>), user_arg: held.cast() });
        let on_ready = self.lookup("watch an event", offset_of!(sys::PJRT_Api, PJRT_Event_OnReady), |t| {
            // SAFETY: `lookup` calls this only if the table reaches that far.
            unsafe { ptr::addr_of!((*t).PJRT_Event_OnReady).read() }
        });
        let result = match on_ready {
            // SAFETY: the event is live, the callback matches the box's type.
            Ok(f) => self.check("watch an event", unsafe { f(&mut a) }),
            Err(e) => Err(e),
        };
        match result {
            Ok(()) => self.free_event(event),
            Err(_) => {
                // No callback will come: wait here, then drop.
                let waited = self.wait("wait for a transfer", event);
                // SAFETY: the callback was not registered, so the box is still ours.
                drop(unsafe { Box::from_raw(held) });
                waited?;
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Api({}.{})", self.version.0, self.version.1)
    }
}

/// Copies a string the plugin points at.
///
/// # Safety
/// `data` must be null or point at `len` readable bytes.
pub(crate) unsafe fn string(data: *const std::ffi::c_char, len: usize) -> String {
    // SAFETY: the caller's promise.
    String::from_utf8_lossy(unsafe { slice(data.cast::<u8>(), len) }).into_owned()
}

/// A slice the plugin points at; empty if the pointer is null.
///
/// # Safety
/// `data` must be null or point at `len` readable, initialised values that outlive `'a`.
pub(crate) unsafe fn slice<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if data.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data, len) }
}
