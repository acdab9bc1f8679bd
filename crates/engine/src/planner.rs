//! Which mesh a step fits on: bytes a device and bytes over the links, for every way to lay devices out.

use config::{Config, MeshShape};
use gemma4::Arch;
use gemma4::decoder::LayerRemat;
use gemma4::layout::Slot;
use gemma4::memory::{Compiler, Memory, Phase, SlotUse, StepShape, memory};
use gemma4::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER};
use serde::Serialize;

use crate::metrics::summary::MemoryRow;
use crate::targets::Machine;
use crate::train::TrainError;
use crate::train::plan::Plan;
use crate::train::step::PerLayerTable;

/// Bytes of a planned step on one device, as this compiler lays it out.
#[must_use]
pub fn memory_of(plan: &Plan, compiler: Compiler) -> Memory {
    let o = &plan.step;
    let moments: usize = o.update.moment_dtypes().iter().map(|(_, d)| d.size()).sum();
    let shape = StepShape {
        rows: o.rows,
        seq: o.seq,
        accumulation: o.accumulation,
        segments: o.segments,
        dtype: o.loss.dtype,
        remat: &o.loss.remat,
        blocks: o.loss.blocks,
        host_rows: match o.per_layer {
            PerLayerTable::Host(dtype) => Some(dtype),
            // The rows of a batch are a small table on the device.
            PerLayerTable::Device | PerLayerTable::HostTrained => None,
        },
        compiler,
        called: o.loss.called,
    };
    memory(&plan.arch, &plan.layout, &shape, &|s: &Slot| {
        let role = plan.role(s);
        SlotUse { trained: role.trained, dtype: role.dtype, moments: if role.trained { moments } else { 0 } }
    })
}

/// Memory of the process without any array, as measured with the CPU plugin and programs of ten and of 35 layers.
const PROGRAM_BYTES: u64 = 300_000_000;

/// The same, line by line, with what the process takes besides.
#[must_use]
pub fn memory_rows(plan: &Plan) -> Vec<MemoryRow<'static>> {
    let m = memory_of(plan, Compiler::Rows);
    let (phase, parts) = m.busiest();
    let when = match phase {
        Phase::Head => "in the loss, when most is needed",
        Phase::Layers => "in the layers' backward pass, when most is needed",
        Phase::Tables => "in the sum of the tables' gradients, when most is needed",
        Phase::Update => "in the update, when most is needed",
    };
    let row = |label, bytes, note| MemoryRow { label, bytes, note };
    let mut rows = vec![
        row("parameters", m.parameters, ""),
        row("optimizer", m.optimizer, "moments of what is trained"),
        row("batch", m.batch, ""),
    ];
    rows.extend(parts.into_iter().filter(|p| p.1 > 0).map(|(label, bytes)| row(label, bytes, when)));
    rows.push(row("program", PROGRAM_BYTES, "plugin, compiled code, what the compiler keeps"));
    rows
}

/// Bytes that one device sends in a step, by what they are for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Traffic {
    /// Weights gathered where they are used.
    pub gather: f64,
    /// Gradients summed, each device keeping its part.
    pub scatter: f64,
    /// Gradients summed over the data axis.
    pub data: f64,
    /// Activations summed over the tensor axis.
    pub tensor: f64,
    /// Keys and values gathered over the context axis.
    pub context: f64,
}

impl Traffic {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.gather + self.scatter + self.data + self.tensor + self.context
    }

    /// Of a planned step, each collective done around a ring.
    #[must_use]
    pub fn of(plan: &Plan) -> Self {
        let Some(p) = plan.layout.partition() else { return Traffic::default() };
        let mut t = Traffic::default();
        let narrow = plan.step.loss.dtype.size() as f64;
        let accumulation = plan.step.accumulation as f64;
        let recomputes = plan.step.loss.remat != LayerRemat::Everything;
        let size = |name: &str| p.mesh().size(name).unwrap_or(1);
        let others = |n: usize| 1.0 - 1.0 / n as f64;
        let data = size("data");
        for slot in plan.slots() {
            let Some(stored) = &slot.sharding else { continue };
            let elements =
                |s: &graph::Sharding| s.shard_shape(p.mesh(), &slot.shape).map_or(0.0, |s| s.elements() as f64);
            let (part, whole) = (elements(stored), elements(&p.gathered(stored)));
            let trained = plan.role(slot).trained;
            // Rows of the per-layer table are sent, not the table.
            let looked_up = slot.spec().name == EMBED_TOKENS_PER_LAYER;
            if whole > part && !looked_up {
                let group = others((whole / part).round() as usize);
                // A layer is used forward and backward (computing it again uses what the backward pass gathers), the head's
                // table once; its gradient is summed in f32.
                let (times, gradient) = if slot.spec().name == EMBED_TOKENS { (1.0, 4.0) } else { (2.0, narrow) };
                t.gather += times * whole * narrow * group * accumulation;
                if trained {
                    t.scatter += whole * gradient * group * accumulation;
                }
            }
            if trained && data > 1 {
                t.data += 2.0 * part * 4.0 * others(data);
            }
        }
        let tokens = (plan.step.rows * plan.step.seq) as f64 / (p.batch_parts() * size("context")) as f64;
        let (tensor, context) = (size("tensor") * size("tensor_sequence"), size("context"));
        let passes = if recomputes { 3.0 } else { 2.0 };
        let stream = tokens * plan.arch.hidden_size() as f64 * narrow * accumulation;
        for layer in plan.arch.layers() {
            t.tensor += passes * 2.0 * 2.0 * stream * others(tensor);
            if layer.owns_kv() && context > 1 {
                let kv = tokens * (2 * layer.kv_heads * layer.head_dim) as f64 * narrow * accumulation;
                t.context += (passes + 1.0) * kv * (context - 1) as f64;
            }
        }
        t
    }
}

/// A mesh and what a step takes on it.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Axes with several devices.
    pub mesh: Vec<(&'static str, usize)>,
    /// What a step takes, or why it cannot be laid out so.
    pub figures: Result<Figures, String>,
}

/// What a step takes on a mesh.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// Bytes on a device.
    pub memory: Memory,
    /// Bytes sent by a device.
    pub traffic: Traffic,
    /// Seconds of products at the published peak, what is computed again included.
    pub compute: Option<f64>,
    /// Seconds of collectives at the published rates of the links.
    pub collectives: Option<f64>,
}

impl Figures {
    /// The time that a step takes at least.
    #[must_use]
    pub fn seconds(&self) -> Option<f64> {
        Some(self.compute?.max(self.collectives?))
    }

    /// Of a planned step on a machine.
    #[must_use]
    pub fn of(plan: &Plan, machine: Option<&Machine>) -> Self {
        let traffic = Traffic::of(plan);
        let again = if plan.step.loss.remat == LayerRemat::Everything { 1.0 } else { 4.0 / 3.0 };
        let rate = machine.and_then(|m| m.target.flops_per_second(plan.step.loss.dtype.name()));
        let collectives = machine.filter(|m| m.target.link > 0.0).map(|m| {
            let island = m.devices_per_island();
            let across = if m.devices() > island { 1.0 / island as f64 } else { 0.0 };
            let sent = traffic.total();
            (sent * (1.0 - across) / m.target.link).max(sent * across / m.target.network)
        });
        let compiler = machine.map_or(Compiler::Rows, |m| m.target.compiler());
        let memory = memory_of(plan, compiler);
        Figures { memory, traffic, compute: rate.map(|r| plan.flops.total * again / r), collectives }
    }
}

/// Every mesh of `devices` over the axes data, fsdp, context and tensor.
///
/// # Errors
/// When the configuration cannot be followed on any mesh.
pub fn candidates(
    config: &Config,
    arch: &Arch,
    devices: usize,
    machine: Option<&Machine>,
) -> Result<Vec<Candidate>, TrainError> {
    // Whether a mesh leaves weights whole is a question of what fits here, not of principle.
    let mut config = config.clone();
    config.mesh.sharding_tolerance = 1.0;
    let mut out = Vec::new();
    let divisors = |n: usize| (1..=n).filter(move |d| n.is_multiple_of(*d));
    for data in divisors(devices) {
        for fsdp in divisors(devices / data) {
            for context in divisors(devices / data / fsdp) {
                let tensor = devices / data / fsdp / context;
                let shape = MeshShape { ici: [data, fsdp, 1, context, tensor, 1], dcn: [1; 6] };
                let mesh = shape.sizes().into_iter().filter(|s| s.1 > 1).collect();
                let figures = match Plan::on(&config, arch.clone(), &shape) {
                    Ok(plan) => Ok(Figures::of(&plan, machine)),
                    Err(e) => Err(e.to_string()),
                };
                out.push(Candidate { mesh, figures });
            }
        }
    }
    Ok(out)
}

/// Puts the best first: what fits `limit` bytes before what does not; then by time where it is known, in steps of a twentieth,
/// because the figures are no better than that; then fewer axes, fewer bytes sent, less memory.
pub fn rank(candidates: &mut [Candidate], limit: Option<u64>) {
    let key = |c: &Candidate| match &c.figures {
        Err(_) => (2, 0, 0, 0, 0),
        Ok(f) => {
            let sent = f.traffic.total() as u64;
            let total = f.memory.total();
            let fits = limit.is_none_or(|l| total <= l);
            let time = f.seconds().map_or(0, |s| (s.max(1e-12).ln() * 20.0).round() as i64);
            // What does not fit is ordered by how far off it is.
            if fits { (0, time, c.mesh.len(), sent, total) } else { (1, 0, 0, 0, total) }
        }
    };
    candidates.sort_by_key(key);
}

#[cfg(test)]
mod tests {
    use config::Sources;

    use super::*;

    fn config(words: &[&str]) -> (Config, Arch) {
        let config = Sources::from_args(words.iter().copied()).resolve().unwrap();
        let arch = Arch::from_config(&config).unwrap();
        (config, arch)
    }

    const E2B: &[&str] = &[
        "model_name=gemma4-e2b",
        "max_target_length=8192",
        "per_device_batch_size=1",
        "dtype=bfloat16",
        "scan_layers=true",
        "remat_policy=full",
    ];

    #[test]
    fn attention_that_is_called_has_no_scores() {
        let (config, arch) = config(E2B);
        let mut plan = Plan::new(&config, arch).unwrap();
        let layer = |plan: &Plan| memory_of(plan, Compiler::Rows).layer;
        let printed = layer(&plan);
        plan.step.loss.called = true;
        // With scores a sliding layer needs most: two f32 arrays of 8192 queries of 8 heads by the keys of two windows. Without, a
        // full one, whose heads are wider by 256.
        assert_eq!(printed - layer(&plan), 2 * 4 * 8192 * 8 * 2 * 512 - 4 * 2 * 8192 * 8 * 256);
    }

    #[test]
    fn sixteen_small_devices_want_their_weights_cut() {
        let (config, arch) = config(E2B);
        let machine: Machine = "v5e:4x4".parse().unwrap();
        let mut all = candidates(&config, &arch, 16, Some(&machine)).unwrap();
        rank(&mut all, Some(machine.target.memory));
        let best = all[0].figures.as_ref().unwrap();
        assert!(best.memory.total() < machine.target.memory);
        // Whole weights on every device take 55 GB and more.
        let whole = all.iter().find(|c| c.mesh == [("data", 16)]).unwrap().figures.as_ref().unwrap();
        assert!(whole.memory.arguments() > 50_000_000_000 && whole.traffic.gather == 0.0);
        let cut = all.iter().find(|c| c.mesh == [("fsdp", 16)]).unwrap().figures.as_ref().unwrap();
        assert!(cut.memory.arguments() * 15 < whole.memory.arguments());
        assert!(cut.traffic.scatter > 0.0 && cut.traffic.data == 0.0);
    }

    #[test]
    fn traffic_and_memory_follow_a_compiled_program() {
        // `lapidary compile --topology h100:8` of the same configuration (docs/guide/plan.md): bytes sent by gathering and
        // scattering, bytes at the peak.
        let (config, arch) = config(E2B);
        let shape = MeshShape { ici: [1, 8, 1, 1, 1, 1], dcn: [1; 6] };
        let plan = Plan::on(&config, arch, &shape).unwrap();
        let (traffic, memory) = (Traffic::of(&plan), memory_of(&plan, Compiler::Rows));
        for (planned, compiled) in [
            (traffic.gather, 7_273_742_336.0),
            (traffic.scatter, 4_693_721_088.0),
            (memory.arguments() as f64, 6_945_987_666.0),
            (memory.total() as f64, 13_719_385_558.0),
        ] {
            assert!((planned / compiled - 1.0).abs() < 0.02, "{planned} {compiled}");
        }
    }

    /// `lapidary compile --topology ...` of the same configurations (docs/guide/plan.md): GB of arguments and temporaries.
    #[test]
    fn memory_follows_programs_for_tpus() {
        for (topology, model, batch, ici, compiled, early) in [
            ("v5e:4x4", "gemma4-e2b", 1, [1, 16], 12.336, Some(true)),
            ("v5e:4x4", "gemma4-e2b", 2, [1, 16], 14.378, Some(true)),
            ("v5e:4x4", "gemma4-e4b", 1, [1, 16], 15.056, Some(false)),
            ("v5e:4x4", "gemma4-e2b", 1, [2, 8], 15.079, Some(false)),
            ("v6e:4x4", "gemma4-e2b", 1, [1, 16], 9.281, None),
            ("v6e:4x4", "gemma4-e2b", 2, [1, 16], 14.236, None),
            ("v6e:4x4", "gemma4-e2b", 1, [4, 4], 26.335, None),
        ] {
            let words = [
                format!("model_name={model}"),
                format!("per_device_batch_size={batch}"),
                "max_target_length=8192".to_owned(),
                "scan_layers=true".to_owned(),
                "dtype=bfloat16".to_owned(),
                "remat_policy=full".to_owned(),
            ];
            let (config, arch) = config(&words.each_ref().map(String::as_str));
            let machine: Machine = topology.parse().unwrap();
            let shape = MeshShape { ici: [ici[0], ici[1], 1, 1, 1, 1], dcn: [1; 6] };
            let plan = Plan::on(&config, arch, &shape).unwrap();
            let m = memory_of(&plan, machine.target.compiler());
            let total = m.total() as f64 / 1e9;
            assert!((total / compiled - 1.0).abs() < 0.1, "{topology} {words:?} {ici:?}: {total} {compiled}");
            // All the copies early where there is room, as many as fit where there is not, none on other generations.
            assert_eq!(m.early == m.relaid_moments, early == Some(true), "{topology} {words:?} {ici:?}");
            assert!(early.is_some() || m.early == 0);
            let rows = memory_of(&plan, Compiler::Rows);
            assert_eq!((rows.relaid, rows.early, rows.summed), (0, 0, 0));
            assert_eq!(rows.arguments(), m.arguments());
        }
    }

    #[test]
    fn arguments_are_exact_and_policies_order() {
        let (c, arch) = config(E2B);
        let plan = Plan::new(&c, arch).unwrap();
        let m = memory_of(&plan, Compiler::Rows);
        assert_eq!(m.parameters, plan.counts.trainable * 4 + (plan.counts.total - plan.counts.trainable) * 2);
        assert_eq!(m.optimizer, plan.counts.trainable * 8);
        let kept = |policy: &str| {
            let policy = format!("remat_policy={policy}");
            // Said once: the last entry of the list is the policy.
            let words = [&E2B[..E2B.len() - 1], &[&policy]].concat();
            let (c, arch) = config(&words);
            memory_of(&Plan::new(&c, arch).unwrap(), Compiler::Rows).kept
        };
        assert!(kept("full") < kept("save_qkv_proj") && kept("save_qkv_proj") < kept("minimal"));
    }
}
