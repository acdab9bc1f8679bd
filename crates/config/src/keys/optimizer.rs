//! Learning rate and optimizer.

use super::{Category, Key, within};
use crate::choice::{DecayStyle, OptimizerKind, ScheduleKind};

pub(super) const SCHEDULE: &[Key] = &within(
    Category::Schedule,
    [
        Key::float("learning_rate", 3e-5, "Peak learning rate."),
        Key::choice("lr_schedule_type", ScheduleKind::WORDS, "cosine", "Course of the learning rate after warm-up."),
        Key::float("warmup_steps_fraction", 0.1, "Share of the schedule that warms up from 0.").at_most(1),
        Key::float("learning_rate_final_fraction", 0.1, "Learning rate at the end, as a share of the peak.")
            .alias(&["cosine_learning_rate_final_fraction"]),
        Key::int(
            "learning_rate_schedule_steps",
            -1,
            "Length of the schedule in steps; -1 means `steps`. Beyond it the rate is 0.",
        )
        .at_least(-1),
        Key::float(
            "wsd_decay_steps_fraction",
            0.1,
            "Share of the schedule that decays, when `lr_schedule_type` is `wsd`.",
        )
        .at_most(1),
        Key::choice(
            "wsd_decay_style",
            DecayStyle::WORDS,
            "linear",
            "Course of the decay, when `lr_schedule_type` is `wsd`.",
        ),
    ],
);

pub(super) const KEYS: &[Key] = &within(
    Category::Optimizer,
    [
        Key::choice("opt_type", OptimizerKind::WORDS, "adamw", "The rule that turns gradients into updates.")
            .refuse(&[("muon", "it is not defined for the gemma4_small decoder")]),
        Key::float("adam_b1", 0.9, "Decay of the first moment.").at_most(1),
        Key::float("adam_b2", 0.95, "Decay of the second moment.").at_most(1),
        Key::float("adam_eps", 1e-8, "Added to the root of the second moment."),
        Key::float("adam_eps_root", 0.0, "Added to the second moment under the root."),
        Key::float("adam_weight_decay", 0.1, "Weight decay, decoupled from the gradient."),
        Key::choice(
            "mu_dtype",
            &["", "bfloat16", "float32", "float16"],
            "",
            "Type of the first moment; empty means `weight_dtype`.",
        ),
        Key::list(
            "adamw_mask",
            &[],
            "Regular expressions of parameters without weight decay. Empty decays all, norms and embeddings included.",
        ),
        Key::list(
            "trainable_parameters_mask",
            &[],
            "Regular expressions of the parameters to train; the others stay as they are and have no optimizer state. \
             Empty trains all.",
        ),
        Key::float(
            "gradient_clipping_threshold",
            1.0,
            "Largest norm of the whole gradient; a larger one is scaled down to it. 0 does not clip.",
        ),
        Key::float("z_loss_multiplier", 0.0, "Factor of the squared log-partition added to every token's loss."),
        Key::bool(
            "train_layer_scalar",
            false,
            "Trains every layer's `layer_scalar`, which Hugging Face holds as a constant.",
        )
        .own(),
        Key::bool("skip_step_on_spikes", false, "Skips a step whose loss or gradient norm is far out of the ordinary."),
        Key::int(
            "skip_step_interval",
            128,
            "Steps over which the ordinary is measured, when `skip_step_on_spikes` is set.",
        )
        .at_least(2),
        Key::float(
            "skip_step_scaling_factor",
            6.0,
            "Standard deviations that count as far, when `skip_step_on_spikes` is set.",
        ),
    ],
);
