//! Peak floating-point rates: a table of published figures, and a measurement on the machine at hand.
//!
//! Model FLOPs utilisation is work done over time, divided by one of these. Published figures are for dense products,
//! without structured sparsity, per chip or board; vendors' datasheets often print the sparse figure, which is twice
//! as high.

use std::time::{Duration, Instant};

use graph::Graph;
use serde::Serialize;
use tensor::{DType, HostArray};

use crate::runtime::compile_options;
use crate::{Result, Runtime};

/// A device with published peak rates.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Device {
    /// Short name, as given on a command line.
    pub name: &'static str,
    /// The vendor's name.
    pub title: &'static str,
    /// What the runtime calls the device, where one device is one chip.
    pub kinds: &'static [&'static str],
    /// Dense peak rates.
    pub rates: &'static [Rate],
    /// Where the figures are published.
    pub source: &'static str,
}

/// A peak rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rate {
    /// Operand type: `bfloat16`, `tf32` (f32 operands rounded to 10 bits of mantissa), `float32`, `float8`.
    pub dtype: &'static str,
    /// TFLOP/s.
    pub tflops: f64,
}

const fn rate(dtype: &'static str, tflops: f64) -> Rate {
    Rate { dtype, tflops }
}

const BF16: &str = "bfloat16";
const TF32: &str = "tf32";
const F32: &str = "float32";
const F8: &str = "float8";

/// Every dtype of the table.
pub const DTYPES: &[&str] = &[BF16, TF32, F32, F8];

const TPU_DOCS: &str = "Google Cloud TPU documentation, system architecture, peak compute per chip";
const HOPPER: &str = "NVIDIA H100 datasheet, half of its figures with sparsity";

/// Every device of the table.
pub const DEVICES: &[Device] = &[
    Device {
        name: "tpu-v4",
        title: "Google TPU v4",
        kinds: &["TPU v4"],
        rates: &[rate(BF16, 275.0)],
        source: TPU_DOCS,
    },
    Device {
        name: "tpu-v5e",
        title: "Google TPU v5e",
        kinds: &["TPU v5 lite", "TPU v5e"],
        rates: &[rate(BF16, 197.0)],
        source: TPU_DOCS,
    },
    Device {
        name: "tpu-v5p",
        title: "Google TPU v5p",
        kinds: &["TPU v5", "TPU v5p"],
        rates: &[rate(BF16, 459.0)],
        source: TPU_DOCS,
    },
    Device {
        name: "tpu-v6e",
        title: "Google TPU v6e (Trillium)",
        kinds: &["TPU v6 lite", "TPU v6e"],
        rates: &[rate(BF16, 918.0)],
        source: TPU_DOCS,
    },
    Device {
        name: "tpu-v7",
        title: "Google TPU7x (Ironwood)",
        // A chip shows up as two devices, so that its figure is no device's.
        kinds: &[],
        rates: &[rate(BF16, 2307.0), rate(F8, 4614.0)],
        source: TPU_DOCS,
    },
    Device {
        name: "a100",
        title: "NVIDIA A100 (SXM and PCIe)",
        kinds: &["NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"],
        rates: &[rate(BF16, 312.0), rate(TF32, 156.0), rate(F32, 19.5)],
        source: "NVIDIA A100 datasheet",
    },
    Device {
        name: "h100-sxm",
        title: "NVIDIA H100 SXM",
        kinds: &["NVIDIA H100 80GB HBM3"],
        rates: &[rate(BF16, 989.5), rate(TF32, 494.5), rate(F32, 67.0), rate(F8, 1979.0)],
        source: HOPPER,
    },
    Device {
        name: "h100-pcie",
        title: "NVIDIA H100 PCIe",
        kinds: &["NVIDIA H100 PCIe"],
        rates: &[rate(BF16, 756.5), rate(TF32, 378.0), rate(F32, 51.0), rate(F8, 1513.0)],
        source: HOPPER,
    },
    Device {
        name: "h200",
        title: "NVIDIA H200 SXM",
        kinds: &["NVIDIA H200"],
        rates: &[rate(BF16, 989.5), rate(TF32, 494.5), rate(F32, 67.0), rate(F8, 1979.0)],
        source: "NVIDIA H200 datasheet, half of its figures with sparsity",
    },
    Device {
        name: "b200",
        title: "NVIDIA B200 SXM",
        kinds: &["NVIDIA B200"],
        rates: &[rate(BF16, 2250.0), rate(F8, 4500.0)],
        source: "NVIDIA DGX B200 datasheet, an eighth of the system, half of its figures with sparsity",
    },
    Device {
        name: "l4",
        title: "NVIDIA L4",
        kinds: &["NVIDIA L4"],
        rates: &[rate(BF16, 121.0), rate(TF32, 60.0), rate(F32, 30.3), rate(F8, 242.5)],
        source: "NVIDIA L4 datasheet, half of its figures with sparsity",
    },
    Device {
        name: "l40s",
        title: "NVIDIA L40S",
        kinds: &["NVIDIA L40S"],
        rates: &[rate(BF16, 362.0), rate(TF32, 183.0), rate(F32, 91.6), rate(F8, 733.0)],
        source: "NVIDIA L40S datasheet, its figures without sparsity",
    },
    Device {
        name: "mi250x",
        title: "AMD Instinct MI250X",
        // A board shows up as two devices.
        kinds: &[],
        rates: &[rate(BF16, 383.0)],
        source: "AMD Instinct MI250X datasheet, both dies",
    },
    Device {
        name: "mi300x",
        title: "AMD Instinct MI300X",
        kinds: &["AMD Instinct MI300X"],
        rates: &[rate(BF16, 1307.4), rate(TF32, 653.7), rate(F32, 163.4), rate(F8, 2614.9)],
        source: "AMD Instinct MI300X datasheet, its figures without sparsity",
    },
];

/// The device of a short name, or of the name the runtime gives it; case does not matter.
#[must_use]
pub fn find(name: &str) -> Option<&'static Device> {
    DEVICES.iter().find(|d| {
        d.name.eq_ignore_ascii_case(name)
            || d.title.eq_ignore_ascii_case(name)
            || d.kinds.iter().any(|k| k.eq_ignore_ascii_case(name))
    })
}

impl Device {
    /// The peak rate for operands of a dtype, in FLOP/s.
    #[must_use]
    pub fn flops_per_second(&self, dtype: &str) -> Option<f64> {
        self.rates.iter().find(|r| r.dtype == dtype).map(|r| r.tflops * 1e12)
    }
}

/// A matrix product, timed on the first device of a [`Runtime`].
#[derive(Debug, Clone, Serialize)]
pub struct Measurement {
    /// Operand and result dtype.
    pub dtype: &'static str,
    /// `[m, k]` times the transpose of `[n, k]`.
    pub m: usize,
    /// See `m`.
    pub n: usize,
    /// See `m`.
    pub k: usize,
    /// Timed runs.
    pub repetitions: usize,
    /// Of one run: the median.
    pub median_seconds: f64,
    /// Of one run: the fastest.
    pub best_seconds: f64,
}

/// The first product of an MLP of E2B, over a thousand tokens: long enough for the threads to spread, short enough to
/// be repeated.
const PRODUCT: [usize; 3] = [1024, 6144, 1536];
/// A run or two goes into waking threads and touching memory.
const WARM_UP: usize = 2;
const REPETITIONS: usize = 15;

impl Measurement {
    /// Operations of one run: a multiply-add counts as two.
    #[must_use]
    pub fn flops(&self) -> f64 {
        2.0 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// The rate of the median run, in FLOP/s.
    #[must_use]
    pub fn flops_per_second(&self) -> f64 {
        self.flops() / self.median_seconds
    }

    /// The rate of the fastest run, in FLOP/s.
    #[must_use]
    pub fn best_flops_per_second(&self) -> f64 {
        self.flops() / self.best_seconds
    }
}

/// Times a matrix product of the size of an MLP's, compiled as the model is, several times over.
///
/// # Errors
/// When `dtype` is not a float, or the device refuses the program.
pub fn measure(runtime: &Runtime, dtype: DType) -> Result<Measurement> {
    measure_product(runtime, dtype, PRODUCT, REPETITIONS)
}

fn measure_product(runtime: &Runtime, dtype: DType, [m, n, k]: [usize; 3], repetitions: usize) -> Result<Measurement> {
    let g = Graph::new("peak");
    let (x, w) = (g.input("x", dtype, [m, k])?, g.input("w", dtype, [n, k])?);
    g.output("y", g.matmul_nt(x, w, dtype)?)?;
    let compiled = runtime.compile(&g.finish()?, &compile_options(dtype))?;
    let client = runtime.client();
    // Small values of both signs: no denormals, no overflow, nothing to skip.
    let fill = |rows: usize, columns: usize| {
        let values: Vec<f64> = (0..rows * columns).map(|i| (i * 37 % 101) as f64 / 64.0 - 0.75).collect();
        HostArray::from_f64(dtype, [rows, columns], &values)
    };
    let x = client.buffer_from_owned(fill(m, k)?, 0)?.0;
    let w = client.buffer_from_owned(fill(n, k)?, 0)?.0;
    let mut times = Vec::with_capacity(repetitions);
    for run in 0..WARM_UP + repetitions.max(1) {
        let start = Instant::now();
        for y in compiled.executable.execute(&[&x, &w])? {
            y.wait()?;
        }
        if run >= WARM_UP {
            times.push(start.elapsed());
        }
    }
    times.sort();
    // A clock that stands still must not make the rate infinite.
    let seconds = |d: Duration| d.as_secs_f64().max(1e-9);
    Ok(Measurement {
        dtype: dtype.name(),
        m,
        n,
        k,
        repetitions: times.len(),
        median_seconds: seconds(times[times.len() / 2]),
        best_seconds: seconds(times[0]),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_is_sound() {
        let mut names = BTreeSet::new();
        for d in DEVICES {
            let own: BTreeSet<String> =
                d.kinds.iter().chain([&d.name, &d.title]).map(|name| name.to_ascii_lowercase()).collect();
            for name in own {
                assert_eq!(find(&name.to_ascii_uppercase()).unwrap().name, d.name);
                assert!(names.insert(name.clone()), "{name} twice");
            }
            assert!(!d.rates.is_empty() && !d.source.is_empty());
            // From narrow to wide operands, nothing gets faster.
            let of = |dtype| d.flops_per_second(dtype);
            for (fast, slow) in [(F8, BF16), (BF16, TF32), (TF32, F32)] {
                if let (Some(fast), Some(slow)) = (of(fast), of(slow)) {
                    assert!(fast >= slow, "{}", d.name);
                }
            }
            assert!(d.rates.iter().all(|r| DTYPES.contains(&r.dtype)));
        }
    }

    #[test]
    fn known_figures() {
        assert_eq!(find("tpu v5 lite").unwrap().flops_per_second("bfloat16"), Some(197e12));
        assert_eq!(find("NVIDIA H100 80GB HBM3").unwrap().flops_per_second("bfloat16"), Some(989.5e12));
        assert_eq!(find("tpu-v4").unwrap().flops_per_second("float32"), None);
        assert!(find("abacus").is_none());
    }

    #[test]
    fn a_small_product_is_measured() {
        let runtime = Runtime::start(&crate::RuntimeOptions { no_cache: true, ..Default::default() }).unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let m = measure_product(&runtime, dtype, [64, 32, 48], 5).unwrap();
            assert_eq!((m.repetitions, m.flops()), (5, 196_608.0));
            assert!(m.best_seconds > 0.0 && m.best_seconds <= m.median_seconds);
            assert!(m.flops_per_second() <= m.best_flops_per_second());
        }
    }
}
