//! Batch, sequence length and steps.

use super::{Category, Key, within};

pub(super) const KEYS: &[Key] = &within(
    Category::Run,
    [
        Key::float(
            "per_device_batch_size",
            12.0,
            "Sequences per device and micro-batch. Below 1, several devices share a sequence; the batch over all \
             devices must come to at least one sequence.",
        )
        .positive()
        .at_most(1 << 24),
        Key::int("gradient_accumulation_steps", 1, "Micro-batches whose gradients make one step.").at_least(1),
        Key::float(
            "eval_per_device_batch_size",
            0.0,
            "Sequences per device in evaluation; 0 means `per_device_batch_size`.",
        )
        .at_most(1 << 24),
        Key::int("max_target_length", 2048, "Tokens per sequence.").at_least(1),
        Key::int("max_prefill_predict_length", 64, "Longest prompt, in tokens, when generating.").at_least(1),
        Key::int("steps", 150_001, "Training steps; -1 means `learning_rate_schedule_steps`.").at_least(-1),
        Key::int("init_weights_seed", 0, "Seed of the random initial weights."),
    ],
);
