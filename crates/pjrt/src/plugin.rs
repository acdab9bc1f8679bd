//! A loaded plugin.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::api::{Api, args, call, slice, string};
use crate::error::{PjrtError, Result};
use crate::sys;

/// A value of a named attribute or option of the C API.
#[derive(Debug, Clone, PartialEq)]
pub enum NamedValue {
    /// Text.
    String(String),
    /// An integer.
    Int64(i64),
    /// A list of integers.
    Int64List(Vec<i64>),
    /// A 32-bit float.
    Float(f32),
    /// A truth value.
    Bool(bool),
}

impl NamedValue {
    /// Reads the list a plugin points at. Values of unknown kinds are left out.
    ///
    /// # Safety
    /// `raw` must consist of valid values of the C API.
    pub(crate) unsafe fn read_all(raw: &[sys::PJRT_NamedValue]) -> Vec<(String, NamedValue)> {
        let mut out = Vec::with_capacity(raw.len());
        for v in raw {
            // SAFETY: a valid value names the union's live member in `type_` and its size in `value_size`.
            let (name, value) = unsafe {
                let value = match v.type_ {
                    sys::PJRT_NamedValue_kString => {
                        NamedValue::String(string(v.__bindgen_anon_1.string_value, v.value_size))
                    }
                    sys::PJRT_NamedValue_kInt64 => NamedValue::Int64(v.__bindgen_anon_1.int64_value),
                    sys::PJRT_NamedValue_kInt64List => {
                        NamedValue::Int64List(slice(v.__bindgen_anon_1.int64_array_value, v.value_size).to_vec())
                    }
                    sys::PJRT_NamedValue_kFloat => NamedValue::Float(v.__bindgen_anon_1.float_value),
                    sys::PJRT_NamedValue_kBool => NamedValue::Bool(v.__bindgen_anon_1.bool_value),
                    _ => continue,
                };
                (string(v.name, v.name_size), value)
            };
            out.push((name, value));
        }
        out
    }

    /// The C form. It borrows from `name` and `self`.
    pub(crate) fn to_raw(&self, name: &str) -> sys::PJRT_NamedValue {
        let (type_, value, value_size) = match self {
            NamedValue::String(s) => (
                sys::PJRT_NamedValue_kString,
                sys::PJRT_NamedValue__bindgen_ty_1 { string_value: s.as_ptr().cast() },
                s.len(),
            ),
            NamedValue::Int64(i) => {
                (sys::PJRT_NamedValue_kInt64, sys::PJRT_NamedValue__bindgen_ty_1 { int64_value: *i }, 1)
            }
            NamedValue::Int64List(l) => (
                sys::PJRT_NamedValue_kInt64List,
                sys::PJRT_NamedValue__bindgen_ty_1 { int64_array_value: l.as_ptr() },
                l.len(),
            ),
            NamedValue::Float(x) => {
                (sys::PJRT_NamedValue_kFloat, sys::PJRT_NamedValue__bindgen_ty_1 { float_value: *x }, 1)
            }
            NamedValue::Bool(b) => {
                (sys::PJRT_NamedValue_kBool, sys::PJRT_NamedValue__bindgen_ty_1 { bool_value: *b }, 1)
            }
        };
        args!(PJRT_NamedValue {
            name: name.as_ptr().cast(),
            name_size: name.len(),
            type_: type_,
            __bindgen_anon_1: value,
            value_size: value_size,
        })
    }
}

/// A plugin: a shared library that offers the PJRT C API for one platform. Once loaded it stays loaded.
#[derive(Debug)]
pub struct Plugin {
    api: Api,
    path: PathBuf,
    sha256: String,
    attributes: Vec<(String, NamedValue)>,
}

/// Plugins by canonical path: initialising one twice is not allowed.
static LOADED: Mutex<Option<HashMap<PathBuf, Arc<Plugin>>>> = Mutex::new(None);

impl Plugin {
    /// Loads a plugin, or returns the one already loaded from this file.
    ///
    /// # Errors
    /// When the file is missing, is no shared library, has no `GetPjrtApi`, speaks another major version of the API,
    /// or refuses to initialise.
    pub fn load(path: impl AsRef<Path>) -> Result<Arc<Plugin>> {
        let path = path.as_ref();
        let load_error =
            |source: Box<dyn std::error::Error + Send + Sync>| PjrtError::Load { path: path.to_owned(), source };
        let canonical = fs_err::canonicalize(path).map_err(|e| load_error(e.into()))?;
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.get_or_insert_default();
        if let Some(plugin) = loaded.get(&canonical) {
            return Ok(Arc::clone(plugin));
        }
        let memory = crate::plugins::cache_dir().ok().map(|c| c.join("plugins"));
        let sha256 = crate::plugins::hash::sha256_of_file_remembered(&canonical, memory.as_deref())
            .map_err(|e| load_error(e.into()))?;

        // SAFETY: loading runs the library's initialisers. That a plugin is trusted code is the caller's choice: the
        // table of pinned hashes exists for this.
        let library = unsafe { libloading::Library::new(&canonical) }.map_err(|e| load_error(e.into()))?;
        // Plugins start threads and register exit handlers, so unloading one is never sound.
        let library = Box::leak(Box::new(library));
        let not_a_plugin = |reason: String| PjrtError::NotAPlugin { path: path.to_owned(), reason };
        // SAFETY: this is the symbol's type in every version of the API.
        let get_api = unsafe { library.get::<unsafe extern "C" fn() -> *const sys::PJRT_Api>(b"GetPjrtApi\0") }
            .map_err(|_| not_a_plugin("it has no symbol GetPjrtApi".to_owned()))?;
        // SAFETY: the function takes nothing and returns a table of static lifetime.
        let api = unsafe { Api::new(get_api()) }.map_err(&not_a_plugin)?;
        if api.version.0 != i32::try_from(sys::PJRT_API_MAJOR).unwrap_or(0) {
            return Err(not_a_plugin(format!(
                "it speaks PJRT {}.{}, this program speaks {}.x",
                api.version.0,
                api.version.1,
                sys::PJRT_API_MAJOR
            )));
        }
        let mut a = args!(PJRT_Plugin_Initialize_Args {});
        // SAFETY: called once per library (the registry above), before anything else.
        unsafe { call!(api, "initialise the plugin", PJRT_Plugin_Initialize, a) }?;
        let mut a = args!(PJRT_Plugin_Attributes_Args {});
        // SAFETY: the arguments hold only outputs.
        let attributes = match unsafe { call!(api, "read the plugin's attributes", PJRT_Plugin_Attributes, a) } {
            // SAFETY: the plugin's list lives as long as the plugin.
            Ok(()) => unsafe { NamedValue::read_all(slice(a.attributes, a.num_attributes)) },
            Err(_) => Vec::new(),
        };
        let plugin = Arc::new(Plugin { api, path: canonical.clone(), sha256, attributes });
        loaded.insert(canonical, Arc::clone(&plugin));
        Ok(plugin)
    }

    pub(crate) fn api(&self) -> &Api {
        &self.api
    }

    /// The file it was loaded from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lower-case hexadecimal SHA-256 of the file.
    #[must_use]
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Major and minor version of the API it speaks.
    #[must_use]
    pub fn api_version(&self) -> (i32, i32) {
        self.api.version
    }

    /// What it says about itself: `xla_version`, `stablehlo_current_version`, ...
    #[must_use]
    pub fn attributes(&self) -> &[(String, NamedValue)] {
        &self.attributes
    }

    /// The StableHLO version it understands, such as `1.20.0`.
    #[must_use]
    pub fn stablehlo_version(&self) -> Option<String> {
        self.attributes.iter().find_map(|(name, value)| match value {
            NamedValue::Int64List(v) if name == "stablehlo_current_version" => {
                Some(v.iter().map(i64::to_string).collect::<Vec<_>>().join("."))
            }
            _ => None,
        })
    }
}
