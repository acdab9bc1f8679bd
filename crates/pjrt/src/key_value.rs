//! The store through which the processes of one job connect their devices, as callbacks of the C API.

use std::ffi::{c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::api::slice;
use crate::sys;

/// Why a store has no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyValueError {
    /// Nobody has written the key.
    NotFound(String),
    /// Nobody wrote the key in time.
    Timeout(String),
    /// Anything else.
    Failed(String),
}

/// A store that all processes of a job share. Plugins call it from their own threads while a client is made.
pub trait KeyValueStore: Send + Sync {
    /// Waits for a value.
    ///
    /// # Errors
    /// [`KeyValueError::Timeout`] when nobody writes it in time.
    fn get(&self, key: &[u8], timeout: Duration) -> Result<Vec<u8>, KeyValueError>;

    /// The value if it is there.
    ///
    /// # Errors
    /// [`KeyValueError::NotFound`] when it is not.
    fn try_get(&self, key: &[u8]) -> Result<Vec<u8>, KeyValueError>;

    /// Writes a value.
    ///
    /// # Errors
    /// When it cannot be written.
    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), KeyValueError>;
}

/// A store as the argument of callbacks. It must outlive every client that was given it.
pub(crate) struct StoreHandle(*mut Arc<dyn KeyValueStore>);

// SAFETY: the pointer is to a store that may be used from any thread, and only `Drop` frees it.
unsafe impl Send for StoreHandle {}
// SAFETY: as above.
unsafe impl Sync for StoreHandle {}

impl StoreHandle {
    pub(crate) fn new(store: Arc<dyn KeyValueStore>) -> Self {
        StoreHandle(Box::into_raw(Box::new(store)))
    }

    /// Puts the callbacks into the arguments of a client.
    pub(crate) fn attach(&self, args: &mut sys::PJRT_Client_Create_Args) {
        let user: *mut c_void = self.0.cast();
        args.kv_get_callback = Some(get);
        args.kv_get_user_arg = user;
        args.kv_try_get_callback = Some(try_get);
        args.kv_try_get_user_arg = user;
        args.kv_put_callback = Some(put);
        args.kv_put_user_arg = user;
    }
}

impl Drop for StoreHandle {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` in `new`; clients that could call back are gone.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// # Safety
/// `user` must be what `attach` gave.
unsafe fn store<'a>(user: *mut c_void) -> &'a dyn KeyValueStore {
    // SAFETY: the caller's promise; the store outlives the client that calls.
    unsafe { &**user.cast::<Arc<dyn KeyValueStore>>() }
}

/// The plugin's error object for a failure.
///
/// # Safety
/// `make` must be null or point at the function that the plugin passed.
unsafe fn failure(make: *mut sys::PJRT_CallbackError, error: &KeyValueError) -> *mut sys::PJRT_Error {
    let (code, message) = match error {
        KeyValueError::Timeout(m) => (4, m),
        KeyValueError::NotFound(m) => (5, m),
        KeyValueError::Failed(m) => (13, m),
    };
    // SAFETY: the caller's promise; the message outlives the call, which copies it.
    match unsafe { make.as_ref() } {
        // SAFETY: as above.
        Some(Some(make)) => unsafe { make(code, message.as_ptr().cast(), message.len()) },
        _ => std::ptr::null_mut(),
    }
}

/// Nothing may unwind into the plugin.
fn guarded<T>(work: impl FnOnce() -> Result<T, KeyValueError>) -> Result<T, KeyValueError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(KeyValueError::Failed("the store panicked".to_owned())))
}

/// A value in memory that [`free`] gives back: the plugin's deleter knows the pointer alone.
fn allocate(value: &[u8]) -> Result<*mut c_char, KeyValueError> {
    // SAFETY: at least one byte is asked for.
    let memory = unsafe { libc::malloc(value.len().max(1)) }.cast::<u8>();
    if memory.is_null() {
        return Err(KeyValueError::Failed("out of memory".to_owned()));
    }
    // SAFETY: the memory is new and large enough.
    unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), memory, value.len()) };
    Ok(memory.cast())
}

unsafe extern "C" fn free(value: *mut c_char) {
    // SAFETY: the pointer is one of `allocate`, given back once.
    unsafe { libc::free(value.cast()) };
}

/// Hands out what the store found, in the plugin's own fields.
fn give(
    found: Result<Vec<u8>, KeyValueError>,
    value: &mut *mut c_char,
    size: &mut usize,
    deleter: &mut Option<unsafe extern "C" fn(*mut c_char)>,
) -> Result<(), KeyValueError> {
    let found = found?;
    *value = allocate(&found)?;
    *size = found.len();
    *deleter = Some(free);
    Ok(())
}

unsafe extern "C" fn get(args: *mut sys::PJRT_KeyValueGetCallback_Args) -> *mut sys::PJRT_Error {
    // SAFETY: the plugin passes valid arguments with our own user argument.
    let (args, store) = unsafe { (&mut *args, store((*args).user_arg)) };
    // SAFETY: the key is valid for the call.
    let key = unsafe { slice(args.key.cast::<u8>(), args.key_size) };
    let timeout = Duration::from_millis(u64::try_from(args.timeout_in_ms).unwrap_or(0));
    let found = guarded(|| store.get(key, timeout));
    match give(found, &mut args.value, &mut args.value_size, &mut args.value_deleter_callback) {
        Ok(()) => std::ptr::null_mut(),
        // SAFETY: the function is the plugin's.
        Err(e) => unsafe { failure(args.callback_error, &e) },
    }
}

unsafe extern "C" fn try_get(args: *mut sys::PJRT_KeyValueTryGetCallback_Args) -> *mut sys::PJRT_Error {
    // SAFETY: as in `get`.
    let (args, store) = unsafe { (&mut *args, store((*args).user_arg)) };
    // SAFETY: the key is valid for the call.
    let key = unsafe { slice(args.key.cast::<u8>(), args.key_size) };
    let found = guarded(|| store.try_get(key));
    match give(found, &mut args.value, &mut args.value_size, &mut args.value_deleter_callback) {
        Ok(()) => std::ptr::null_mut(),
        // SAFETY: the function is the plugin's.
        Err(e) => unsafe { failure(args.callback_error, &e) },
    }
}

unsafe extern "C" fn put(args: *mut sys::PJRT_KeyValuePutCallback_Args) -> *mut sys::PJRT_Error {
    // SAFETY: as in `get`; key and value are valid for the call.
    let (args, store) = unsafe { (&*args, store((*args).user_arg)) };
    // SAFETY: as above.
    let (key, value) =
        unsafe { (slice(args.key.cast::<u8>(), args.key_size), slice(args.value.cast::<u8>(), args.value_size)) };
    match guarded(|| store.put(key, value)) {
        Ok(()) => std::ptr::null_mut(),
        // SAFETY: the function is the plugin's.
        Err(e) => unsafe { failure(args.callback_error, &e) },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;

    use super::*;
    use crate::api::args;

    #[derive(Default)]
    struct Memory(Mutex<HashMap<Vec<u8>, Vec<u8>>>);

    impl KeyValueStore for Memory {
        fn get(&self, key: &[u8], _: Duration) -> Result<Vec<u8>, KeyValueError> {
            assert_ne!(key, b"panic");
            self.try_get(key).map_err(|_| KeyValueError::Timeout("nobody".to_owned()))
        }

        fn try_get(&self, key: &[u8]) -> Result<Vec<u8>, KeyValueError> {
            self.0.lock().unwrap().get(key).cloned().ok_or_else(|| KeyValueError::NotFound("none".to_owned()))
        }

        fn put(&self, key: &[u8], value: &[u8]) -> Result<(), KeyValueError> {
            self.0.lock().unwrap().insert(key.to_vec(), value.to_vec());
            Ok(())
        }
    }

    /// Stands for the plugin's: the code as a pointer, which is never followed.
    unsafe extern "C" fn make(code: sys::PJRT_Error_Code, message: *const c_char, size: usize) -> *mut sys::PJRT_Error {
        assert!(!message.is_null() && size > 0);
        std::ptr::without_provenance_mut(code as usize)
    }

    #[test]
    fn a_plugin_reads_what_a_plugin_wrote() {
        let handle = StoreHandle::new(Arc::new(Memory::default()));
        let mut client = args!(PJRT_Client_Create_Args {});
        handle.attach(&mut client);
        let mut error: sys::PJRT_CallbackError = Some(make);
        let (key, value) = (b"key\0with zero", b"\xff\x00value");
        let mut a = args!(PJRT_KeyValuePutCallback_Args {
            key: key.as_ptr().cast(),
            key_size: key.len(),
            value: value.as_ptr().cast(),
            value_size: value.len(),
            callback_error: &raw mut error,
            user_arg: client.kv_put_user_arg,
        });
        // SAFETY: the arguments are as a plugin makes them.
        assert!(unsafe { client.kv_put_callback.unwrap()(&raw mut a) }.is_null());
        let get = |key: &[u8], error: &mut sys::PJRT_CallbackError| {
            let mut a = args!(PJRT_KeyValueGetCallback_Args {
                key: key.as_ptr().cast(),
                key_size: key.len(),
                timeout_in_ms: 1,
                callback_error: error,
                user_arg: client.kv_get_user_arg,
            });
            // SAFETY: as above; the value is read before it is given back.
            unsafe {
                let failed = client.kv_get_callback.unwrap()(&raw mut a);
                if !failed.is_null() {
                    return Err(failed.addr());
                }
                let value = slice(a.value.cast::<u8>(), a.value_size).to_vec();
                a.value_deleter_callback.unwrap()(a.value);
                Ok(value)
            }
        };
        assert_eq!(get(key, &mut error), Ok(value.to_vec()));
        assert_eq!(get(b"other", &mut error), Err(4));
        assert_eq!(get(b"panic", &mut error), Err(13));
        let mut a = args!(PJRT_KeyValueTryGetCallback_Args {
            key: b"x".as_ptr().cast(),
            key_size: 1,
            callback_error: &raw mut error,
            user_arg: client.kv_try_get_user_arg,
        });
        // SAFETY: as above.
        assert_eq!(unsafe { client.kv_try_get_callback.unwrap()(&raw mut a) }.addr(), 5);
    }
}
