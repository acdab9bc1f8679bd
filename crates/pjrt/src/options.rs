//! Compile options, per executable.
//!
//! XLA's own flags travel as overrides inside the options message: an unknown name or value is an error from the
//! plugin, where the environment variable `XLA_FLAGS` would end the process.

use crate::error::{PjrtError, Result};
use crate::proto::Writer;

/// The value of one of XLA's flags.
#[derive(Debug, Clone, PartialEq)]
pub enum OptionValue {
    /// A truth value.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float.
    Double(f64),
    /// Text, and enumerators by their full name.
    String(String),
}

impl From<bool> for OptionValue {
    fn from(v: bool) -> Self {
        OptionValue::Bool(v)
    }
}

impl From<i64> for OptionValue {
    fn from(v: i64) -> Self {
        OptionValue::Int(v)
    }
}

impl From<&str> for OptionValue {
    fn from(v: &str) -> Self {
        OptionValue::String(v.to_owned())
    }
}

/// How a program is compiled.
///
/// # CPU flags and matrix products
///
/// `cargo run --release -p lapidary-pjrt --example products`, 512 x 1536 x 6144 on two Zen 4 cores with the pinned CPU
/// plugin, in GFLOP/s of two idle cores (within 5 %; `n,k` is the layout of Hugging Face's weights):
///
/// | operands -> result | layout | default flags | oneDNN ([`CompileOptions::bf16`]) |
/// |---|---|---|---|
/// | f32 -> f32 | all | 185-210 | 205-211 |
/// | bf16 -> bf16 | `[m,k] [k,n]` | 389 | 393 |
/// | bf16 -> bf16 | `[m,k] [n,k]` | 408 | 385 |
/// | bf16 -> bf16 | `[k,m] [k,n]` (weight gradients) | **188** | 379 |
/// | bf16 -> f32 | `[m,k] [k,n]`, `[m,k] [n,k]` | 405 | **200** (converted to f32 first) |
/// | bf16 -> f32 | `[k,m] [k,n]` | 195 | 194 |
///
/// One row times a large matrix (1 x 1536 x 65536, `[n,k]`): bf16 -> bf16 9 by default, 22 with oneDNN (of memory's 20
/// GB/s); bf16 -> f32 6-7 either way. From two rows on: bf16 -> bf16 37 either way, bf16 -> f32 35 by default and 10
/// with oneDNN. `xla_allow_excess_precision=false` changes no figure.
///
/// So: forward passes over many tokens run well with default flags; training needs oneDNN for its weight gradients
/// (some of which, inside a whole training step, fall into a loop of 1-3 GFLOP/s by default); and bf16 products should
/// have bf16 results wherever oneDNN is on.
#[derive(Debug, Clone, PartialEq)]
pub struct CompileOptions {
    /// Copies of the program that run on different data. 1 unless the program has explicit cross-replica operations.
    pub num_replicas: usize,
    /// Devices one program is partitioned over.
    pub num_partitions: usize,
    /// Whether XLA partitions the program. Needed as soon as `num_partitions` is above 1.
    pub use_spmd: bool,
    /// Whether `sdy` annotations guide the partitioner (otherwise `mhlo.sharding` attributes do).
    pub use_shardy: bool,
    /// The devices, as indices into the client's list, one for each replica and partition (replica-major).
    /// `None`: the first ones.
    pub devices: Option<Vec<usize>>,
    /// XLA's flags without their dashes, such as `xla_allow_excess_precision`.
    pub overrides: Vec<(String, OptionValue)>,
}

impl Default for CompileOptions {
    /// One device, no flags.
    fn default() -> Self {
        CompileOptions {
            num_replicas: 1,
            num_partitions: 1,
            use_spmd: false,
            use_shardy: true,
            devices: None,
            overrides: Vec::new(),
        }
    }
}

impl CompileOptions {
    /// For proofs in f32: no result depends on what the compiler keeps in higher precision between operations.
    /// Costs nothing in f32.
    #[must_use]
    pub fn verify_f32() -> Self {
        CompileOptions::default().exact_rounding()
    }

    /// For training and decoding in bf16: matrix products go to oneDNN on a CPU. Programs should ask for bf16
    /// results of bf16 products: see [`CompileOptions`] for figures. Other platforms refuse CPU flags; use
    /// [`CompileOptions::default`] there. Programs compiled with it cannot be cached
    /// ([`CompileOptions::is_serializable`]).
    #[must_use]
    pub fn bf16() -> Self {
        CompileOptions::default().with("xla_cpu_use_onednn", true).with("xla_cpu_experimental_onednn_custom_call", true)
    }

    /// The same options, with every operation rounded to its own dtype. By default XLA may keep f32 between bf16
    /// operations; this is for comparing logits.
    #[must_use]
    pub fn exact_rounding(self) -> Self {
        self.with("xla_allow_excess_precision", false)
    }

    /// The same options with one more flag.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, value: impl Into<OptionValue>) -> Self {
        self.overrides.push((name.into(), value.into()));
        self
    }

    /// Whether the compiled program can be stored. One with calls into oneDNN cannot: the plugin throws a C++ exception
    /// through the C API, which ends the process.
    #[must_use]
    pub fn is_serializable(&self) -> bool {
        let on = |name: &str| self.overrides.iter().any(|(n, v)| n == name && *v == OptionValue::Bool(true));
        !on("xla_cpu_experimental_onednn_custom_call")
    }

    /// The same options for a program partitioned over `n` devices by its `sdy` annotations.
    #[must_use]
    pub fn partitioned(mut self, n: usize) -> Self {
        self.num_partitions = n;
        self.use_spmd = n > 1;
        self.use_shardy = true;
        self
    }

    /// The same options for one program on another device.
    #[must_use]
    pub fn on_devices(mut self, devices: impl Into<Vec<usize>>) -> Self {
        self.devices = Some(devices.into());
        self
    }

    /// How many devices the program takes.
    ///
    /// # Errors
    /// When the counts are zero, overflow, or need a flag that is not set, or the device list does not fit them.
    pub fn device_count(&self) -> Result<usize> {
        let wrong = |name: &str, reason: String| PjrtError::Option { name: name.to_owned(), reason };
        if self.num_replicas == 0 || self.num_partitions == 0 {
            return Err(wrong("num_replicas, num_partitions", "both must be at least 1".to_owned()));
        }
        if self.num_partitions > 1 && !self.use_spmd {
            return Err(wrong("use_spmd", "must be true when num_partitions is above 1".to_owned()));
        }
        let count = self
            .num_replicas
            .checked_mul(self.num_partitions)
            .filter(|&n| n <= 1 << 20)
            .ok_or_else(|| wrong("num_replicas, num_partitions", "their product is absurdly large".to_owned()))?;
        if let Some(devices) = &self.devices
            && devices.len() != count
        {
            return Err(wrong(
                "devices",
                format!(
                    "{} listed, {} replicas times {} partitions",
                    devices.len(),
                    self.num_replicas,
                    self.num_partitions
                ),
            ));
        }
        Ok(count)
    }

    /// The serialised `xla.CompileOptionsProto`. `device_ids` are the runtime's numbers of [`Self::devices`].
    ///
    /// Only fields whose numbers have not changed between API 0.81 and 0.117 are written. `debug_options` is never
    /// sent: all its unset fields would become zero.
    pub(crate) fn encode(&self, device_ids: &[i64]) -> Result<Vec<u8>> {
        self.device_count()?;
        let mut seen = std::collections::BTreeSet::new();
        for (name, value) in &self.overrides {
            let reason = if name.is_empty() || name.starts_with('-') {
                "flag names have no leading dashes and are not empty"
            } else if !seen.insert(name) {
                "given twice"
            } else if matches!(value, OptionValue::Double(v) if !v.is_finite()) {
                "not a finite number"
            } else {
                continue;
            };
            return Err(PjrtError::Option { name: name.clone(), reason: reason.to_owned() });
        }
        let (replicas, partitions) = (self.num_replicas as i64, self.num_partitions as i64);
        let mut w = Writer::default();
        w.message(3, |build| {
            build.varint(1, -1); // device_ordinal: unset
            build.varint(4, replicas);
            build.varint(5, partitions);
            build.varint(6, i64::from(self.use_spmd));
            if self.devices.is_some() {
                build.message(9, |assignment| {
                    assignment.varint(1, replicas);
                    assignment.varint(2, partitions);
                    for partition in 0..self.num_partitions {
                        let ids = (0..self.num_replicas).map(|r| device_ids[r * self.num_partitions + partition]);
                        assignment.message(3, |computation| computation.packed(1, ids));
                    }
                });
            }
            build.varint(19, i64::from(self.use_shardy));
        });
        for (name, value) in &self.overrides {
            w.message(7, |entry| {
                entry.bytes(1, name.as_bytes());
                entry.message(2, |v| match value {
                    OptionValue::String(s) => v.bytes(1, s.as_bytes()),
                    OptionValue::Bool(b) => v.varint(2, i64::from(*b)),
                    OptionValue::Int(i) => v.varint(3, *i),
                    OptionValue::Double(x) => v.double(4, *x),
                });
            });
        }
        Ok(w.into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_laid_out_as_xla_reads_it() {
        let bytes = CompileOptions::default().with("a", true).encode(&[]).unwrap();
        let build: &[u8] = &[
            0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, // device_ordinal = -1
            0x20, 1, 0x28, 1, 0x30, 0, 0x98, 0x01, 1,
        ];
        let mut wanted = vec![0x1a, build.len() as u8];
        wanted.extend_from_slice(build);
        wanted.extend_from_slice(&[0x3a, 7, 0x0a, 1, b'a', 0x12, 2, 0x10, 1]);
        assert_eq!(bytes, wanted);
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        let d = CompileOptions::default;
        assert!(CompileOptions { num_partitions: 0, ..d() }.encode(&[]).is_err());
        assert!(CompileOptions { num_partitions: 2, ..d() }.encode(&[]).is_err());
        assert!(
            CompileOptions { num_replicas: usize::MAX, num_partitions: 2, use_spmd: true, ..d() }.encode(&[]).is_err()
        );
        assert!(d().on_devices([0, 1]).encode(&[0, 1]).is_err());
        assert!(d().with("x", true).with("x", false).encode(&[]).is_err());
        assert!(d().with("--x", true).encode(&[]).is_err());
        assert!(d().with("x", OptionValue::Double(f64::NAN)).encode(&[]).is_err());
        assert_eq!(d().partitioned(4).device_count().unwrap(), 4);
        assert!(d().is_serializable() && !CompileOptions::bf16().is_serializable());
    }
}
