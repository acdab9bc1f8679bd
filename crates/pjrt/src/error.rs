//! What can go wrong between this crate and a plugin.

use std::fmt;
use std::path::PathBuf;

use tensor::{DType, Shape};

/// The status codes of the PJRT C API (those of `absl::Status`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Code {
    Cancelled,
    Unknown,
    InvalidArgument,
    DeadlineExceeded,
    NotFound,
    AlreadyExists,
    PermissionDenied,
    ResourceExhausted,
    FailedPrecondition,
    Aborted,
    OutOfRange,
    Unimplemented,
    Internal,
    Unavailable,
    DataLoss,
    Unauthenticated,
    /// A number that the C API does not define.
    Other(u32),
}

impl Code {
    pub(crate) fn from_raw(code: u32) -> Self {
        match code {
            1 => Code::Cancelled,
            2 => Code::Unknown,
            3 => Code::InvalidArgument,
            4 => Code::DeadlineExceeded,
            5 => Code::NotFound,
            6 => Code::AlreadyExists,
            7 => Code::PermissionDenied,
            8 => Code::ResourceExhausted,
            9 => Code::FailedPrecondition,
            10 => Code::Aborted,
            11 => Code::OutOfRange,
            12 => Code::Unimplemented,
            13 => Code::Internal,
            14 => Code::Unavailable,
            15 => Code::DataLoss,
            16 => Code::Unauthenticated,
            other => Code::Other(other),
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Code::Other(n) => write!(f, "code {n}"),
            named => write!(f, "{named:?}"),
        }
    }
}

/// An error from a plugin, or a mistake caught before the plugin was called.
#[derive(Debug, thiserror::Error)]
pub enum PjrtError {
    /// The plugin refused a call. `message` is the plugin's own text.
    #[error("{operation}: {message} ({code})")]
    Plugin {
        /// What was attempted: `compile`, `execute`, ...
        operation: &'static str,
        /// The status code.
        code: Code,
        /// The plugin's message.
        message: String,
    },
    /// The file could not be loaded as a shared library.
    #[error("cannot load the plugin {path}")]
    Load {
        /// The plugin's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The file is a shared library, but not a plugin this crate can use.
    #[error("{path} is not a usable PJRT plugin: {reason}")]
    NotAPlugin {
        /// The plugin's file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The plugin is too old to have a function.
    #[error("{operation}: the plugin does not offer it (its PJRT API is {major}.{minor})")]
    Unsupported {
        /// What was attempted.
        operation: &'static str,
        /// Major API version of the plugin.
        major: i32,
        /// Minor API version of the plugin.
        minor: i32,
    },
    /// A plugin's answer breaks the contract of the C API.
    #[error("{operation}: the plugin's answer makes no sense: {reason}")]
    Contract {
        /// What was attempted.
        operation: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A device index that does not exist.
    #[error("there is no device {index}; the client has {count}")]
    NoSuchDevice {
        /// The index asked for.
        index: usize,
        /// Number of addressable devices.
        count: usize,
    },
    /// Bytes do not fill a shape.
    #[error("{shape} of {dtype} needs {needed} bytes, got {got}")]
    Size {
        /// The dtype.
        dtype: DType,
        /// The shape.
        shape: Shape,
        /// Bytes the two need.
        needed: usize,
        /// Bytes given.
        got: usize,
    },
    /// A byte range that leaves the memory it should lie in.
    #[error("bytes {start}..{end} lie outside the mapped memory of {len} bytes")]
    Range {
        /// First byte.
        start: usize,
        /// One after the last byte.
        end: usize,
        /// Size of the memory.
        len: usize,
    },
    /// The shape overflows.
    #[error(transparent)]
    Shape(#[from] tensor::ShapeError),
    /// A host array could not be made.
    #[error(transparent)]
    Host(#[from] tensor::HostError),
    /// An element type this crate has no name for.
    #[error("element type {0} of the PJRT API is not supported")]
    ElementType(u32),
    /// A program was called with the wrong number of arguments.
    #[error("program {program:?} takes {wanted} arguments, got {got} (device {device})")]
    ArgumentCount {
        /// The program's name.
        program: String,
        /// Which argument list.
        device: usize,
        /// Arguments the program takes.
        wanted: usize,
        /// Arguments given.
        got: usize,
    },
    /// A program was called with the wrong number of argument lists.
    #[error("program {program:?} runs on {wanted} devices, got {got} argument lists")]
    DeviceCount {
        /// The program's name.
        program: String,
        /// Devices the program runs on.
        wanted: usize,
        /// Argument lists given.
        got: usize,
    },
    /// An argument of the wrong dtype or shape.
    #[error(
        "argument {index} of program {program:?} must be {wanted_dtype}{wanted_shape}, got {got_dtype}{got_shape} \
         (device {device})"
    )]
    ArgumentType {
        /// The program's name.
        program: String,
        /// Which argument list.
        device: usize,
        /// Which argument.
        index: usize,
        /// The dtype the program takes.
        wanted_dtype: DType,
        /// The shape the program takes.
        wanted_shape: Shape,
        /// The dtype given.
        got_dtype: DType,
        /// The shape given.
        got_shape: Shape,
    },
    /// An argument that lives on another device, or belongs to another client.
    #[error("argument {index} of program {program:?} is on {got}, the program wants it on {wanted}")]
    ArgumentDevice {
        /// The program's name.
        program: String,
        /// Which argument.
        index: usize,
        /// Where it should be.
        wanted: String,
        /// Where it is.
        got: String,
    },
    /// A donated argument given a second time in the same call.
    #[error("argument {index} of program {program:?} is donated, but the same buffer is argument {other} too")]
    DonatedTwice {
        /// The program's name.
        program: String,
        /// The donated argument.
        index: usize,
        /// The other place it appears at.
        other: usize,
    },
    /// A buffer that a program has taken over, or that was deleted.
    #[error("{operation}: the buffer {dtype}{shape} is gone: it was donated to a program or deleted")]
    Deleted {
        /// What was attempted.
        operation: &'static str,
        /// The buffer's dtype.
        dtype: DType,
        /// The buffer's shape.
        shape: Shape,
    },
    /// A compile or client option no C string or protocol can carry.
    #[error("option {name:?}: {reason}")]
    Option {
        /// The option.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

/// The result of an operation of this crate.
pub type Result<T, E = PjrtError> = std::result::Result<T, E>;
