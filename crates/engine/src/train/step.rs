//! The programs of training: one step (loss, gradients, optimizer), gradients alone, evaluation.

use std::collections::HashMap;

use gemma4::Arch;
use gemma4::layout::{Layout, Slot};
use gemma4::loss::{BatchValues, HeadGradient, LossOptions, LossSums, loss_sums};
use gemma4::params::{EMBED_TOKENS, EMBED_TOKENS_PER_LAYER};
use gemma4::partition::names as axis;
use graph::{Graph, GraphError, InputOptions, OutputOptions, Program, Sharding, Value};
use tensor::{DType, Shape};

use super::optimizer::{Moments, Update, Updated, apply, sum_of_squares};

mod split;

pub use split::{summed_gradient_program, update_program};

type Result<T> = std::result::Result<T, GraphError>;

/// Where rows of the per-layer table come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PerLayerTable {
    /// The table is a parameter on the device.
    Device,
    /// The host looks rows up and hands them in, in this dtype.
    Host(DType),
    /// The host hands in the rows that a batch needs, each once, with their moments, and takes them back updated. The layout
    /// has as many rows as a batch has tokens ([`Layout::with_table_rows`]); those beyond the different ones are not looked up.
    HostTrained,
}

/// What a training program is built for.
#[derive(Debug, Clone)]
pub struct StepOptions {
    /// Sequences of a micro-batch.
    pub rows: usize,
    /// Tokens of each.
    pub seq: usize,
    /// Micro-batches of a step.
    pub accumulation: usize,
    /// Whether rows may hold several documents.
    pub segments: bool,
    /// How the loss is computed; [`LossOptions::gradient`] is set by the builders.
    pub loss: LossOptions,
    /// Where rows of the per-layer table come from.
    pub per_layer: PerLayerTable,
    /// Dtype of trained weights.
    pub weight_dtype: DType,
    /// How weights are updated.
    pub update: Update,
}

impl StepOptions {
    /// Whether a slot holds those rows of a table on the host that a batch needs.
    #[must_use]
    pub fn is_hosted(&self, slot: &Slot) -> bool {
        self.per_layer == PerLayerTable::HostTrained && slot.spec().name == EMBED_TOKENS_PER_LAYER
    }
}

/// A slot and what is done with it.
#[derive(Debug, Clone)]
pub struct Role {
    /// Whether it is trained; otherwise it has no gradient and no moments.
    pub trained: bool,
    /// Whether weight decay applies.
    pub decayed: bool,
    /// Dtype in which the program takes it.
    pub dtype: DType,
}

/// Names of inputs and outputs that are not parameters.
pub mod names {
    /// Batch fields, `[accumulation, rows, seq]` i32.
    pub const INPUTS: &str = "inputs";
    /// Positions.
    pub const POSITIONS: &str = "inputs_position";
    /// Documents.
    pub const SEGMENTS: &str = "inputs_segmentation";
    /// Next tokens.
    pub const TARGETS: &str = "targets";
    /// Documents of the targets, 0 where there is none.
    pub const TARGET_SEGMENTS: &str = "targets_segmentation";
    /// Rows of the per-layer table, `[accumulation, rows, seq, l * p]`.
    pub const PER_LAYER_ROWS: &str = "per_layer_rows";
    /// Which of the rows handed in is each token's, `[accumulation, rows, seq]` i32.
    pub const PER_LAYER_INDEX: &str = "per_layer_index";
    /// Learning rate and bias corrections, see [`super::Scalars`].
    pub const SCALARS: &str = "scalars";
    /// Sums of the step, see [`super::StepSums`].
    pub const SUMS: &str = "sums";
    /// Before a slot's name: the first moment.
    pub const MU: &str = "mu:";
    /// Before a slot's name: the second moment.
    pub const NU: &str = "nu:";
    /// Before a slot's name: the gradient.
    pub const GRAD: &str = "grad:";
}

/// What changes with every step, computed on the host in `f64`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scalars {
    /// Learning rate.
    pub learning_rate: f32,
    /// `1 / (1 - b1^t)`.
    pub correction1: f32,
    /// `1 / (1 - b2^t)`.
    pub correction2: f32,
}

impl Scalars {
    /// As the program takes them.
    #[must_use]
    pub fn values(&self) -> [f32; 3] {
        [self.learning_rate, self.correction1, self.correction2]
    }
}

/// What a step or an evaluation batch gives, in the order of the array.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepSums {
    /// Sum of token losses.
    pub total: f32,
    /// Sum of z terms.
    pub z: f32,
    /// Targets.
    pub weight: f32,
    /// Sum of squares of the mean gradient.
    pub grad_square: f32,
    /// Sum of squares of the parameters after the step.
    pub param_square: f32,
}

impl StepSums {
    /// Reads the array.
    #[must_use]
    pub fn from_values(v: &[f32]) -> Option<Self> {
        let &[total, z, weight, grad_square, param_square] = v else { return None };
        Some(StepSums { total, z, weight, grad_square, param_square })
    }
}

/// The slots that a program takes as parameters: all, but for a per-layer table that stays on the host.
pub fn device_slots(layout: &Layout, per_layer: PerLayerTable) -> impl Iterator<Item = &Slot> {
    layout
        .slots()
        .iter()
        .filter(move |s| !matches!(per_layer, PerLayerTable::Host(_)) || s.spec().name != EMBED_TOKENS_PER_LAYER)
}

struct Inputs {
    params: HashMap<String, Value>,
    /// Each `[accumulation, rows, seq]`, the per-layer rows with one more dimension.
    batch: Vec<Value>,
}

struct Builder<'a> {
    g: &'a Graph,
    arch: &'a Arch,
    layout: &'a Layout,
    options: &'a StepOptions,
    role: &'a dyn Fn(&Slot) -> Role,
}

impl Builder<'_> {
    fn slots(&self) -> impl Iterator<Item = &Slot> {
        device_slots(self.layout, self.options.per_layer)
    }

    fn parameters(&self, donate: bool) -> Result<HashMap<String, Value>> {
        self.slots()
            .map(|s| {
                let role = (self.role)(s);
                let options = InputOptions { donate: donate && role.trained, sharding: s.sharding.clone() };
                let v = self.g.input_with(&s.name, role.dtype, s.shape.clone(), options)?;
                Ok((s.name.clone(), v))
            })
            .collect()
    }

    fn batch(&self, accumulation: usize) -> Result<Vec<Value>> {
        let o = self.options;
        let shape: Shape = [accumulation, o.rows, o.seq].into();
        let mut fields = vec![names::INPUTS, names::POSITIONS, names::TARGETS, names::TARGET_SEGMENTS];
        if o.segments {
            fields.push(names::SEGMENTS);
        }
        if o.per_layer == PerLayerTable::HostTrained {
            fields.push(names::PER_LAYER_INDEX);
        }
        let input = |name: &str, dtype, shape: &[usize]| {
            let sharding = batch_sharding(self.layout, shape);
            self.g.input_with(name, dtype, shape.to_vec(), InputOptions { sharding, ..InputOptions::default() })
        };
        let mut batch: Vec<Value> =
            fields.into_iter().map(|f| input(f, DType::I32, shape.dims())).collect::<Result<_>>()?;
        if let (PerLayerTable::Host(dtype), Some(p)) = (o.per_layer, self.arch.per_layer_input()) {
            let wide = [shape.dims(), &[self.arch.layers().len() * p.width]].concat();
            batch.push(input(names::PER_LAYER_ROWS, dtype, &wide)?);
        }
        Ok(batch)
    }

    /// The slots that are trained.
    fn trained(&self) -> Vec<&Slot> {
        self.slots().filter(|s| (self.role)(s).trained).collect()
    }

    /// Moments of trained slots, donated. They lie as their parameter does: under fsdp every device holds its part of them.
    fn moments(&self, trained: &[&Slot]) -> Result<Vec<Moments>> {
        let mut moments = vec![Moments::default(); trained.len()];
        for (prefix, dtype) in self.options.update.moment_dtypes() {
            for (slot, m) in trained.iter().zip(&mut moments) {
                let donated = InputOptions { donate: true, sharding: slot.sharding.clone() };
                m.set(
                    prefix,
                    self.g.input_with(&format!("{prefix}{}", slot.name), dtype, slot.shape.clone(), donated)?,
                );
            }
        }
        Ok(moments)
    }

    /// Gradients as results, each after `last`.
    fn gradient_outputs(&self, slots: &[&Slot], grads: &[Value], last: impl Fn(Value) -> Result<Value>) -> Result<()> {
        for (slot, &grad) in slots.iter().zip(grads) {
            let options = OutputOptions { sharding: slot.sharding.clone(), ..OutputOptions::default() };
            self.g.output_with(&format!("{}{}", names::GRAD, slot.name), last(grad)?, options)?;
        }
        Ok(())
    }

    /// [`StepSums`] without norms, as a result.
    fn plain_sums(&self, sums: &LossSums) -> Result<()> {
        let zero = self.g.scalar(DType::F32, 0.0)?;
        output_sums(self.g, &[sums.total, sums.z, sums.weight, zero, zero])
    }

    fn inputs(&self, accumulation: usize) -> Result<Inputs> {
        Ok(Inputs { params: self.parameters(false)?, batch: self.batch(accumulation)? })
    }

    /// Sums of one micro-batch, whose fields are `[rows, seq]`.
    fn sums(
        &self,
        g: &Graph,
        params: &HashMap<String, Value>,
        b: &[Value],
        gradient: HeadGradient,
    ) -> Result<LossSums> {
        let segments = self.options.segments.then(|| b[4]);
        let rows = matches!(self.options.per_layer, PerLayerTable::Host(_)) && self.arch.per_layer_input().is_some();
        let batch = BatchValues {
            ids: b[0],
            positions: b[1],
            targets: b[2],
            target_segments: b[3],
            segments,
            per_layer_ids: if self.options.per_layer == PerLayerTable::HostTrained { b.last().copied() } else { None },
            per_layer_rows: if rows { b.last().copied() } else { None },
        };
        let options = LossOptions { gradient, ..self.options.loss.clone() };
        loss_sums(g, self.arch, self.layout, &options, params, &batch)
    }

    /// Sums over all micro-batches and the summed gradients of `wanted` slots, in f32 (f64 of f64 activations).
    fn gradients(&self, inputs: &Inputs, wanted: &[&Slot]) -> Result<(LossSums, Vec<Value>)> {
        let g = self.g;
        let head = match wanted.iter().any(|s| s.spec().name == EMBED_TOKENS) {
            true => HeadGradient::HiddenAndTable,
            false => HeadGradient::Hidden,
        };
        let summed = self.options.loss.dtype.accumulator();
        // Frozen parameters of every slot, then the trained: what a loop takes as invariants.
        let names: Vec<String> = self.slots().map(|s| s.name.clone()).collect();
        let micro = |g: &Graph, params: &HashMap<String, Value>, b: &[Value]| -> Result<(LossSums, Vec<Value>)> {
            let sums = self.sums(g, params, b, head)?;
            let wrt: Vec<Value> = wanted.iter().map(|s| params[&s.name]).collect();
            let grads = g.grad(sums.total, &wrt)?;
            let grads = grads
                .into_iter()
                .zip(&wrt)
                .zip(wanted)
                .map(|((grad, &p), slot)| {
                    let grad = match grad {
                        Some(grad) => g.convert(grad, summed)?,
                        None => g.splat(summed, g.shape(p), 0.0)?,
                    };
                    like_slot(g, slot, grad)
                })
                .collect::<Result<_>>()?;
            Ok((sums, grads))
        };
        let n = self.options.accumulation;
        if n == 1 {
            return micro(g, &inputs.params, &only(g, &inputs.batch)?);
        }
        let zero = g.scalar(DType::F32, 0.0)?;
        let mut carry = vec![zero; 3];
        for s in wanted {
            carry.push(like_slot(g, s, g.splat(summed, s.shape.clone(), 0.0)?)?);
        }
        let consts: Vec<Value> = names.iter().map(|n| inputs.params[n]).collect();
        let (out, _) = g.scan(n, &carry, &inputs.batch, &consts, |g, c, x, k| {
            let params: HashMap<String, Value> = names.iter().cloned().zip(k.iter().copied()).collect();
            let (sums, grads) = micro(g, &params, x)?;
            let new = [sums.total, sums.z, sums.weight].into_iter().chain(grads);
            let next = c.iter().zip(new).map(|(&c, v)| g.add(c, v)).collect::<Result<_>>()?;
            Ok((next, vec![]))
        })?;
        let sums = LossSums { total: out[0], z: out[1], weight: out[2] };
        Ok((sums, out[3..].to_vec()))
    }

    /// New parameters and moments from summed gradients: the outputs of a step.
    fn update(
        &self,
        params: &HashMap<String, Value>,
        trained: &[&Slot],
        sums: &LossSums,
        grads: &[Value],
        moments: &[Moments],
        scalars: Value,
    ) -> Result<()> {
        let g = self.g;
        let _scope = g.scope("optimizer");
        let mean = per_target(g, sums)?;
        let called = self.options.loss.called;
        let squares: Vec<Value> = grads.iter().map(|&v| sum_of_squares(g, v, called)).collect::<Result<_>>()?;
        let square = g.mul(total(g, &squares)?, g.mul(mean, mean)?)?;
        let factor = self.options.update.clip(g, g.sqrt(square)?)?;
        let factor = g.mul(factor, mean)?;
        let mut new = Vec::with_capacity(trained.len());
        for ((slot, &grad), m) in trained.iter().zip(grads).zip(moments) {
            let p = params[&slot.name];
            new.push(apply(g, &self.options.update, p, grad, m, factor, scalars, (self.role)(slot).decayed, called)?);
        }
        let mut squares = Vec::new();
        // Of a table on the host, only some rows are here: its norm is not known.
        for s in self.slots().filter(|s| !self.options.is_hosted(s)) {
            let after = trained.iter().position(|t| t.name == s.name).map(|i| &new[i]);
            squares.push(match after {
                Some(Updated { square: Some(square), .. }) => *square,
                Some(Updated { parameter, .. }) => sum_of_squares(g, *parameter, called)?,
                None => sum_of_squares(g, params[&s.name], called)?,
            });
        }
        let param_square = total(g, &squares)?;
        for (slot, Updated { parameter: p, .. }) in trained.iter().zip(&new) {
            let reuse = OutputOptions { reuse: Some(params[&slot.name]), sharding: slot.sharding.clone() };
            g.output_with(&slot.name, *p, reuse)?;
        }
        for (prefix, _) in self.options.update.moment_dtypes() {
            for ((slot, Updated { moments: after, .. }), before) in trained.iter().zip(&new).zip(moments) {
                if let (Some(value), Some(reuses)) = (after.get(prefix), before.get(prefix)) {
                    let reuse = OutputOptions { reuse: Some(reuses), sharding: slot.sharding.clone() };
                    g.output_with(&format!("{prefix}{}", slot.name), value, reuse)?;
                }
            }
        }
        output_sums(g, &[sums.total, sums.z, sums.weight, square, param_square])
    }
}

/// One training step: everything donated that it replaces.
///
/// Inputs, in order: the slots of [`device_slots`]; first and second moments of the trained ones (as far as the update has
/// them); the batch fields `[accumulation, rows, seq]`; [`Scalars`]. Outputs: the trained slots, their moments, [`StepSums`].
///
/// # Errors
/// When shapes do not fit each other.
pub fn step_program(
    arch: &Arch,
    layout: &Layout,
    options: &StepOptions,
    role: &dyn Fn(&Slot) -> Role,
) -> Result<Program> {
    let g = layout.graph("train_step")?;
    let b = Builder { g: &g, arch, layout, options, role };
    let params = b.parameters(true)?;
    let trained = b.trained();
    let moments = b.moments(&trained)?;
    let batch = b.batch(options.accumulation)?;
    let scalars = g.input(names::SCALARS, DType::F32, [3])?;
    let inputs = Inputs { params, batch };
    let (sums, grads) = b.gradients(&inputs, &trained)?;

    b.update(&inputs.params, &trained, &sums, &grads, &moments, scalars)?;
    g.finish()
}

/// Gradients of the **mean** loss by every trained slot, and [`StepSums`]: for tests and for updates made elsewhere.
///
/// Inputs: the slots, the batch fields. Outputs: `grad:` and the slot's name, in f32 (f64 of f64 activations); the sums.
///
/// # Errors
/// When shapes do not fit each other.
pub fn gradient_program(
    arch: &Arch,
    layout: &Layout,
    options: &StepOptions,
    role: &dyn Fn(&Slot) -> Role,
) -> Result<Program> {
    let g = layout.graph("gradients")?;
    let b = Builder { g: &g, arch, layout, options, role };
    let inputs = b.inputs(options.accumulation)?;
    let slots = b.trained();
    let (sums, grads) = b.gradients(&inputs, &slots)?;
    let mean = per_target(&g, &sums)?;
    b.gradient_outputs(&slots, &grads, |grad| g.mul_bcast(grad, g.convert(mean, g.dtype(grad))?))?;
    b.plain_sums(&sums)?;
    g.finish()
}

/// [`StepSums`] of one batch, without gradients. Inputs: the slots, the batch fields `[1, rows, seq]`.
///
/// # Errors
/// When shapes do not fit each other.
pub fn eval_program(
    arch: &Arch,
    layout: &Layout,
    options: &StepOptions,
    role: &dyn Fn(&Slot) -> Role,
) -> Result<Program> {
    let g = layout.graph("eval")?;
    let b = Builder { g: &g, arch, layout, options, role };
    let inputs = b.inputs(1)?;
    let sums = b.sums(&g, &inputs.params, &only(&g, &inputs.batch)?, HeadGradient::None)?;
    b.plain_sums(&sums)?;
    g.finish()
}

/// How a batch field `[accumulation, rows, seq, ..]` lies on the layout's mesh.
#[must_use]
pub fn batch_sharding(layout: &Layout, shape: &[usize]) -> Option<Sharding> {
    let logical = [axis::WHOLE, axis::BATCH, axis::LENGTH].into_iter().chain(std::iter::repeat(axis::WHOLE));
    let dims: Vec<(&str, usize)> = logical.zip(shape.iter().copied()).collect();
    layout.partition().map(|p| p.activation(&dims))
}

/// A value of a slot's shape, which lies as the slot does.
fn like_slot(g: &Graph, slot: &Slot, v: Value) -> Result<Value> {
    match &slot.sharding {
        Some(s) => g.sharding_constraint(v, s.clone()),
        None => Ok(v),
    }
}

/// The fields of the only micro-batch.
fn only(g: &Graph, batch: &[Value]) -> Result<Vec<Value>> {
    batch.iter().map(|&v| g.reshape(v, g.dims(v)[1..].to_vec())).collect()
}

/// What makes a sum over targets their mean: a batch without targets has no gradient.
fn per_target(g: &Graph, sums: &LossSums) -> Result<Value> {
    let one = g.scalar(DType::F32, 1.0)?;
    g.div(one, g.max(sums.weight, one)?)
}

fn total(g: &Graph, values: &[Value]) -> Result<Value> {
    values.iter().try_fold(g.scalar(DType::F32, 0.0)?, |sum, &v| g.add(sum, v))
}

fn output_sums(g: &Graph, values: &[Value]) -> Result<()> {
    let parts: Vec<Value> = values.iter().map(|&v| g.reshape(v, [1])).collect::<Result<_>>()?;
    g.output(names::SUMS, g.concatenate(&parts, 0)?)
}
