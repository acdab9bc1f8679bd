//! Devices, and how arrays are spread over them.

use super::{Category, Key, Kind, within};
use crate::choice::Hardware;
use crate::value::Literal;

const HOSTS: &str = "say gpu, and tell `train` of the other processes (docs/guide/hosts.md)";
const DILOCO: &str = "DiLoCo is not offered";
const PIPELINE: &str = "the gemma4_small decoder cannot be cut into pipeline stages";
const ULYSSES: &str = "sequences are shared by gathering keys and values (the context axis), not by exchanging heads";
const EXPERT: &str = "the model is dense and has no experts to spread; use the fsdp axis";
const SERVING: &str = "the axis belongs to MaxText's serving engine";
const NOT_IN_MESH: &str = "the axis is not part of the mesh, in MaxText neither";

/// Devices within one host or slice along an axis.
const fn ici(name: &'static str, doc: &'static str) -> Key {
    Key::int(name, 1, doc).at_least(-1)
}

/// Slices or hosts along an axis.
const fn dcn(name: &'static str) -> Key {
    Key::int(name, 1, "Slices, joined by the data-centre network, along this axis. -1 takes the slices that are left.")
        .at_least(-1)
}

/// Slices along an axis that is known and not offered.
const fn dcn_axis(name: &'static str, reason: &'static str) -> Key {
    Key::int(name, 1, "Slices along this axis; known from MaxText, not offered.").at_least(-1).only(reason)
}

/// Devices along an axis that is known and not offered.
const fn axis(name: &'static str, reason: &'static str) -> Key {
    Key::int(name, 1, "Devices along this axis; known from MaxText, not offered.").at_least(-1).only(reason)
}

pub(super) const KEYS: &[Key] = &within(
    Category::Mesh,
    [
        Key::choice("hardware", Hardware::WORDS, "auto", "Kind of device; picks the plugin that is loaded.")
            .differs(Literal::Text("tpu"), "the plugin found decides")
            .refuse(&[("gpu_multiprocess", HOSTS)]),
        Key::path(
            "pjrt_plugin",
            "",
            "Path of the PJRT plugin to load; empty looks in the environment variable LAPIDARY_PJRT_PLUGIN, then in \
             the cache directory.",
        )
        .own(),
        Key::path(
            "jax_cache_dir",
            "",
            "Directory of compiled programs. Null means the tool's own cache directory, an empty text none at all.",
        )
        .or_null()
        .differs(Literal::Text("~/jax_cache"), "the programs compiled here are not JAX's"),
        ici("ici_data_parallelism", "Devices along the data axis: the batch is cut, the weights are whole."),
        ici(
            "ici_fsdp_parallelism",
            "Devices along the fsdp axis: batch and weights are cut. -1 takes the devices that are left.",
        )
        .with_default(Literal::Int(-1)),
        ici("ici_fsdp_transpose_parallelism", "Devices along a second fsdp axis, which cuts the MLP's other side."),
        ici(
            "ici_tensor_parallelism",
            "Devices along the tensor axis: heads, MLP width and vocabulary are cut. Key/value heads that it does not divide \
             are whole on every device.",
        ),
        ici("ici_context_parallelism", "Devices that share every sequence; keys and values of full layers are gathered."),
        ici(
            "ici_tensor_sequence_parallelism",
            "Devices along a second tensor axis, which cuts the residual stream along the sequence.",
        ),
        axis("ici_diloco_parallelism", DILOCO),
        axis("ici_sequence_parallelism", NOT_IN_MESH),
        axis("ici_context_usp_ulysses_parallelism", ULYSSES),
        axis("ici_context_autoregressive_parallelism", SERVING),
        axis("ici_pipeline_parallelism", PIPELINE),
        axis("ici_expert_parallelism", EXPERT),
        axis("ici_autoregressive_parallelism", SERVING),
        dcn("dcn_data_parallelism").with_default(Literal::Int(-1)),
        dcn("dcn_fsdp_parallelism"),
        dcn("dcn_fsdp_transpose_parallelism"),
        dcn("dcn_tensor_parallelism"),
        dcn("dcn_context_parallelism"),
        dcn("dcn_tensor_sequence_parallelism"),
        dcn_axis("dcn_diloco_parallelism", DILOCO),
        dcn_axis("dcn_sequence_parallelism", NOT_IN_MESH),
        dcn_axis("dcn_context_usp_ulysses_parallelism", ULYSSES),
        dcn_axis("dcn_context_autoregressive_parallelism", SERVING),
        dcn_axis("dcn_pipeline_parallelism", PIPELINE),
        dcn_axis("dcn_expert_parallelism", EXPERT),
        dcn_axis("dcn_autoregressive_parallelism", SERVING),
        Key::new(
            "logical_axis_rules",
            Kind::AxisRules,
            Literal::Null,
            "Which mesh axes a logical axis of parameters or activations is cut over, each rule `[logical, [mesh, ..]]`. Rules \
             given here replace the built-in ones of the same name; null keeps all of those.",
        )
        .or_null()
        .differs(Literal::Null, "MaxText writes its whole list as the default; the same rules are built in"),
        Key::bool(
            "override_logical_axis_rules",
            false,
            "Whether `logical_axis_rules` is the whole list, so that axes without a rule are not cut.",
        ),
        Key::int(
            "num_cpu_devices",
            0,
            "Virtual devices of a CPU, which share its cores: to try a mesh out. 0 means as many as the axes ask for.",
        )
        .at_most(1024)
        .own(),
        Key::choice("shard_mode", &["auto"], "auto", "Who places arrays: `auto` leaves it to the partitioner.")
            .refuse(&[("explicit", "it is not defined for the gemma4_small decoder")]),
        Key::float(
            "sharding_tolerance",
            0.02,
            "Largest share of parameter bytes that may lie whole on every device when there are several.",
        )
        .at_most(1),
        Key::bool("skip_jax_distributed_system", false, "Leaves out the start of JAX's distributed service.")
            .inert("there is no such service; one process runs alone"),
        Key::bool("shardy", true, "Partitions with Shardy.").only("Shardy is the only partitioner used"),
    ],
);
