//! Typed configuration: YAML layers, key=value overrides, provenance and validation.
