//! The step in two programs, between which processes sum their gradients on the host.

use std::collections::HashMap;

use gemma4::Arch;
use gemma4::layout::{Layout, Slot};
use gemma4::loss::LossSums;
use graph::{InputOptions, Program, Value};
use tensor::{DType, Shape};

use super::{Builder, Result, Role, StepOptions, names};

/// Gradients of the **summed** loss by every trained slot, in f32, and [`super::StepSums`] without norms. Sums of several
/// processes add up to those of the whole batch.
///
/// Inputs: the slots, the batch fields. Outputs: `grad:` and the slot's name; the sums.
///
/// # Errors
/// When shapes do not fit each other.
pub fn summed_gradient_program(
    arch: &Arch,
    layout: &Layout,
    options: &StepOptions,
    role: &dyn Fn(&Slot) -> Role,
) -> Result<Program> {
    let g = layout.graph("summed_gradients")?;
    let b = Builder { g: &g, arch, layout, options, role };
    let inputs = b.inputs(options.accumulation)?;
    let slots = b.trained();
    let (sums, grads) = b.gradients(&inputs, &slots)?;
    b.gradient_outputs(&slots, &grads, Ok)?;
    b.plain_sums(&sums)?;
    g.finish()
}

/// The update by given gradients: the second half of [`super::step_program`].
///
/// Inputs, in order: the slots; first and second moments of the trained ones; their summed gradients, f32; the sums of
/// [`summed_gradient_program`]; [`super::Scalars`]. Outputs: the trained slots, their moments, [`super::StepSums`].
///
/// # Errors
/// When shapes do not fit each other.
pub fn update_program(
    arch: &Arch,
    layout: &Layout,
    options: &StepOptions,
    role: &dyn Fn(&Slot) -> Role,
) -> Result<Program> {
    let g = layout.graph("update")?;
    let b = Builder { g: &g, arch, layout, options, role };
    let params: HashMap<String, Value> = b.parameters(true)?;
    let trained = b.trained();
    let moments = b.moments(&trained)?;
    let mut grads = Vec::with_capacity(trained.len());
    for slot in &trained {
        let options = InputOptions { sharding: slot.sharding.clone(), ..InputOptions::default() };
        grads.push(g.input_with(&format!("{}{}", names::GRAD, slot.name), DType::F32, slot.shape.clone(), options)?);
    }
    let sums = g.input(names::SUMS, DType::F32, [5])?;
    let scalars = g.input(names::SCALARS, DType::F32, [3])?;
    let sum = |i: usize| g.reshape(g.slice_dim(sums, 0, i, i + 1)?, Shape::from([0usize; 0]));
    let sums = LossSums { total: sum(0)?, z: sum(1)?, weight: sum(2)? };
    b.update(&params, &trained, &sums, &grads, &moments, scalars)?;
    g.finish()
}
