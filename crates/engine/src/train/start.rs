//! What a run settles before its first step: its name, its model, whether it may go on, what it says of itself.

use std::collections::BTreeMap;

use config::Config;
use gemma4::Arch;
use serde_json::json;

use super::TrainError;
use super::optimizer::Rule;
use super::plan::Plan;
use super::step::PerLayerTable;
use crate::metrics::summary::{Summary, render};
use crate::planner::memory_rows;
use crate::train_state::{Share, StoreOptions, TrainerState};
use crate::{Model, Runtime, metrics, peak};

type Result<T> = std::result::Result<T, TrainError>;

pub(super) fn optimizer_name(plan: &Plan) -> &'static str {
    match plan.step.update.rule {
        Rule::AdamW(_) => "adamw",
        Rule::Sgd => "sgd",
    }
}

pub(super) fn run_name(config: &Config) -> String {
    if !config.output.run_name.is_empty() {
        return config.output.run_name.clone();
    }
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    format!("{}_{}", model_name(config), stamp(seconds))
}

/// The model's name, or that of the directory it comes from.
fn model_name(config: &Config) -> String {
    let load = std::path::Path::new(&config.checkpoint.load_parameters_path);
    match load.file_name().filter(|_| !config.raw().tells_a_model()) {
        Some(name) => name.to_string_lossy().into_owned(),
        None => config.model.name.clone(),
    }
}

/// `YYYY-MM-DD-HH-MM` of seconds since 1970, UTC.
fn stamp(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 1 March of year 0, in eras of 400 years.
    let z = days + 719_468;
    let (era, day) = (z / 146_097, z % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let (d, m) = (of_year - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let y = year + era * 400 + u64::from(m <= 2);
    format!("{y:04}-{m:02}-{d:02}-{:02}-{:02}", rest / 3600, rest / 60 % 60)
}

/// The configured architecture, which is also that of the checkpoint; that of the checkpoint where none is configured.
pub(super) fn architecture(config: &Config, given: Option<&Model>) -> Result<Arch> {
    if let Some(model) = given.filter(|_| !config.raw().tells_a_model()) {
        return Ok(model.arch().clone());
    }
    let configured = Arch::from_config(config)?;
    let Some(model) = given else { return Ok(configured) };
    if &configured == model.arch() {
        return Ok(configured);
    }
    let (a, b) = (configured.spec(), model.arch().spec());
    let (a, b) = (format!("{a:#?}"), format!("{b:#?}"));
    let differs = a.lines().zip(b.lines()).find(|(x, y)| x != y);
    let reason = match differs {
        Some((ours, theirs)) => format!(
            "the configuration says {}, the checkpoint {}; set the keys of the model to match its config.json",
            ours.trim().trim_end_matches(','),
            theirs.trim().trim_end_matches(',')
        ),
        None => "their layers differ".to_owned(),
    };
    Err(TrainError::OtherModel { path: model.path().to_owned(), reason })
}

pub(super) fn store_options(config: &Config, plan: &Plan, given: Option<&Model>, share: Share) -> StoreOptions {
    let hf = given.filter(|m| m.report().is_some());
    StoreOptions {
        keep: config.checkpoint.max_to_keep,
        conditional: true,
        arch: plan.arch.clone(),
        source: hf.map(|m| m.path().to_owned()),
        share,
    }
}

/// What must be as it was for a run to go on.
pub(super) fn identity(config: &Config, plan: &Plan, processes: usize) -> BTreeMap<String, serde_json::Value> {
    let step = &plan.step;
    BTreeMap::from([
        ("opt_type".to_owned(), json!(optimizer_name(plan))),
        ("weight_dtype".to_owned(), json!(config.numerics.weight_dtype)),
        ("mu_dtype".to_owned(), json!(config.optimizer.mu_dtype)),
        ("trainable_parameters_mask".to_owned(), json!(config.optimizer.trainable)),
        // Moments of a table on the host are stored otherwise than those of one on the device.
        (
            "per_layer_table".to_owned(),
            json!(if step.per_layer == PerLayerTable::HostTrained { "host" } else { "device" }),
        ),
        ("train_layer_scalar".to_owned(), json!(config.optimizer.train_layer_scalar)),
        ("max_target_length".to_owned(), json!(step.seq)),
        // Of all devices and processes: a run may go on with another number of them.
        ("micro_batch_size_to_train_on".to_owned(), json!(step.rows * processes)),
        ("gradient_accumulation_steps".to_owned(), json!(step.accumulation)),
    ])
}

pub(super) fn check_identity(state: &TrainerState, now: &BTreeMap<String, serde_json::Value>) -> Result<()> {
    for (name, value) in now {
        if let Some(was) = state.keys.get(name)
            && was != value
        {
            let reason = format!("{name} was {was} when the run's last checkpoint was written and is {value} now");
            return Err(TrainError::Key {
                key: "run_name",
                reason: format!("{reason}; set it back, or start another run with load_parameters_path"),
            });
        }
    }
    Ok(())
}

/// The peak rate: published where the device is in the table, else measured.
pub(super) fn peak_rate(runtime: &Runtime, plan: &Plan) -> Option<f64> {
    let dtype = plan.step.loss.dtype;
    let kind = runtime.client().devices().first().map(|d| d.kind.clone()).unwrap_or_default();
    match peak::find(&kind).and_then(|d| d.flops_per_second(dtype.name())) {
        Some(rate) => Some(rate),
        // Virtual devices share what there is.
        None => peak::measure(runtime, dtype).ok().map(|m| m.best_flops_per_second() / plan.devices() as f64),
    }
}

pub(super) fn summary(plan: &Plan, config: &Config) -> String {
    render(&Summary {
        model: &model_name(config),
        parameters: plan.counts,
        flops: &plan.flops,
        // Measured after the first step, see `peak_rate`.
        peak_flops: None,
        devices: plan.devices(),
        memory: &memory_rows(plan),
        // Virtual devices share the machine's memory.
        memory_limit: metrics::memory::machine().map(|m| m.total / plan.devices() as u64),
    })
}

#[cfg(test)]
mod tests {
    use super::stamp;

    #[test]
    fn stamps_are_dates() {
        assert_eq!(stamp(0), "1970-01-01-00-00");
        assert_eq!(stamp(951_826_554), "2000-02-29-12-15");
        assert_eq!(stamp(1_795_521_550), "2026-11-24-11-59");
    }
}
