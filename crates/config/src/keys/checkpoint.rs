//! Saving and restoring.

use super::{Category, Key, within};
use crate::value::Literal;

const NATIVE: &str = "training checkpoints are Hugging Face directories; `lapidary convert` writes MaxText's format";
const LOCAL: &str = "checkpoints on local ramdisks across hosts are not offered";

pub(super) const KEYS: &[Key] = &within(
    Category::Checkpoint,
    [
        Key::bool("enable_checkpointing", true, "Saves and restores checkpoints."),
        Key::bool(
            "async_checkpointing",
            true,
            "Writes checkpoints while training goes on; on one CPU device, flushes them: arrays are written before the next step.",
        ),
        Key::int("checkpoint_period", 10_000, "Steps between checkpoints.").at_least(1),
        Key::bool("save_checkpoint_on_start", true, "Saves before the first step."),
        Key::bool("save_checkpoint_on_completion", true, "Saves after the last step."),
        Key::int("max_num_checkpoints_to_keep", 0, "Checkpoints kept; older ones are deleted. Null keeps all.")
            .at_least(1)
            .or_null(),
        Key::path(
            "load_parameters_path",
            "",
            "Checkpoint whose weights start the run: an HF directory or a MaxText one. The run's own latest \
             checkpoint goes first.",
        ),
        Key::path(
            "load_full_state_path",
            "",
            "Checkpoint whose weights, optimizer state and step start the run; excludes `load_parameters_path`.",
        ),
        Key::bool("enable_autocheckpoint", false, "Saves when the machine announces that it will be taken away."),
        Key::choice(
            "source_checkpoint_layout",
            &["orbax", "safetensors"],
            "orbax",
            "Format of the checkpoint to load; in fact it is detected.",
        )
        .refuse(&[("safetensors_dynamic", "there is nothing to choose: HF directories are always read directly")])
        .inert("the format is detected"),
        Key::bool("enable_continuous_checkpointing", false, "Saves again as soon as the last save ended.")
            .only("saves follow `checkpoint_period`"),
        Key::bool("enable_single_replica_ckpt_restoring", false, "Restores on one replica and broadcasts.")
            .only("every process reads its parts from the shared directory"),
        Key::int("checkpoint_storage_target_data_file_size_bytes", 2_147_483_648, "Size of Orbax data files.")
            .at_most(i64::MAX)
            .inert(NATIVE),
        Key::bool("checkpoint_storage_use_ocdbt", true, "Writes OCDBT in Orbax checkpoints.").inert(NATIVE),
        Key::bool("checkpoint_storage_use_zarr3", true, "Writes zarr3 in Orbax checkpoints.").inert(NATIVE),
        Key::int("checkpoint_storage_concurrent_gb", 96, "Bytes in flight while Orbax reads or writes, in GB.")
            .inert("reading is streamed; saving holds one array on one CPU device, elsewhere a copy of the state"),
        Key::text("checkpoint_todelete_subdir", "", "Directory to which old checkpoints are moved.")
            .or_null()
            .only("old checkpoints are deleted"),
        Key::text("checkpoint_todelete_full_path", "", "Path to which old checkpoints are moved.")
            .or_null()
            .only("old checkpoints are deleted"),
        Key::bool("enable_orbax_v1", false, "Uses the new interface of Orbax.").inert(NATIVE),
        Key::bool("enable_emergency_checkpoint", false, "Keeps checkpoints on local disks for fast restarts.")
            .only(LOCAL),
        Key::bool("enable_multi_tier_checkpointing", false, "Keeps checkpoints on several tiers of storage.")
            .only(LOCAL),
        Key::text("local_checkpoint_directory", "", "Directory of local checkpoints.").only(LOCAL),
        Key::int("local_checkpoint_period", 0, "Steps between local checkpoints.").only(LOCAL),
        Key::int("multi_tier_checkpointing_backup_interval_minutes", 0, "Minutes between back-ups.")
            .or_null()
            .only(LOCAL),
        Key::int("multi_tier_checkpointing_backup_interval_steps", 0, "Steps between back-ups.").or_null().only(LOCAL),
        Key::int("mtc_data_parallelism", 0, "Replicas of multi-tier checkpoints.").only(LOCAL),
        Key::text("checkpoint_conversion_fn", "", "Function that converts while restoring.")
            .or_null()
            .differs(Literal::Text("none"), "the word none is read as null")
            .only("foreign formats are converted by `lapidary convert`"),
    ],
);
