//! OpenXLA through the PJRT C API: plugins, clients, buffers, executables.
