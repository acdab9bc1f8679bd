//! Output directories, metrics, evaluation, profiling.

use super::{Category, Key, within};
use crate::choice::Profiler;

pub(super) const KEYS: &[Key] = &within(
    Category::Output,
    [
        Key::text(
            "run_name",
            "",
            "Name of the run, a directory below `base_output_directory`. Empty means the environment variable \
             JOBSET_NAME, else model name and time.",
        ),
        Key::path(
            "base_output_directory",
            "",
            "Directory of all runs; empty means `lapidary_output` in the working directory.",
        ),
        Key::path("metrics_file", "", "File to which every step's metrics are appended as JSON lines."),
        Key::bool("enable_tensorboard", true, "Writes event files for TensorBoard."),
        Key::int("log_period", 100, "Steps between flushes of the metrics.").at_least(1),
        Key::bool("log_config", true, "Logs every key at the start."),
        Key::int("eval_interval", -1, "Steps between evaluations; -1 does not evaluate.").at_least(-1),
        Key::int("eval_steps", -1, "Batches per evaluation; -1 takes all there are.").at_least(-1),
        Key::int("eval_start_step", 0, "First step after which to evaluate."),
        Key::float("target_eval_loss", 0.0, "Evaluation loss at which training stops early."),
        Key::bool("abort_on_nan_loss", true, "Stops when the loss is not a number."),
        Key::bool("abort_on_inf_loss", true, "Stops when the loss is infinite."),
        Key::choice("profiler", Profiler::WORDS, "", "Records a profile: `xplane`, or empty for none.")
            .refuse(&[("nsys", "start the whole command under `nsys profile` instead")]),
        Key::int("skip_first_n_steps_for_profiler", 1, "Steps before the profile starts."),
        Key::int("profiler_steps", 5, "Steps in the profile.").at_least(1),
        Key::int("max_inflight_computations", 2, "Steps handed to the device ahead of the one that is read back.")
            .at_least(1),
        Key::bool("enable_wandb", false, "Sends metrics to Weights & Biases.")
            .only("nothing is sent anywhere; read `metrics_file` or the TensorBoard files"),
        Key::text("wandb_project_name", "maxtext", "Project at Weights & Biases.").inert("nothing is sent anywhere"),
        Key::text("wandb_run_name", "", "Run name at Weights & Biases.").inert("nothing is sent anywhere"),
        Key::bool("gcs_metrics", false, "Copies metrics to Cloud Storage.").only("metrics are written locally"),
        Key::bool("save_config_to_gcs", false, "Copies the configuration to Cloud Storage.")
            .only("the configuration is written locally"),
    ],
);
