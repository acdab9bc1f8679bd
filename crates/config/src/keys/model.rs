//! Which model, and its shape.

use super::{Category, Key, within};
use crate::choice::DecoderBlock;
use crate::value::Literal;

const OTHER_BLOCK: &str = "only the decoder of Gemma 4 E2B and E4B is built here";
const GEMMA_NORMS: &str = "the layers of this decoder always have these norms";

pub(super) const KEYS: &[Key] = &within(
    Category::Model,
    [
        Key::text(
            "model_name",
            "default",
            "Picks the model file `models/<model_name>.yml`, which fixes the shape. A trailing `-Instruct` is ignored. \
             `default` stands for no model file: the shape then comes from your own configuration.",
        ),
        Key::bool(
            "override_model_config",
            false,
            "Allows keys that the model file sets to be changed. Without it such a change is an error, because it \
             silently describes another model.",
        ),
        Key::choice("decoder_block", DecoderBlock::WORDS, "gemma4_small", "The class of the decoder layers.")
            .differs(Literal::Text("llama2"), "only one class is built here")
            .refuse(&[
                ("llama2", OTHER_BLOCK),
                ("gemma", OTHER_BLOCK),
                ("gemma2", OTHER_BLOCK),
                ("gemma3", OTHER_BLOCK),
                ("gemma4", "that is the class of the large Gemma 4 models; only E2B and E4B are built here"),
                ("deepseek", OTHER_BLOCK),
                ("mistral", OTHER_BLOCK),
                ("mixtral", OTHER_BLOCK),
                ("qwen3", OTHER_BLOCK),
                ("llama4", OTHER_BLOCK),
                ("gpt3", OTHER_BLOCK),
                ("gpt_oss", OTHER_BLOCK),
                ("simple", OTHER_BLOCK),
            ]),
        Key::int(
            "global_parameter_scale",
            1,
            "Multiplies the base sizes so that the parameter count grows by about this factor; a power of two. Heads \
             and MLP width double first, then the hidden size, then the number of layers.",
        )
        .at_least(1),
        Key::int("base_num_decoder_layers", 16, "Number of decoder layers before scaling.").at_least(1),
        Key::int("base_emb_dim", 2048, "Hidden size before scaling.").at_least(1),
        Key::int("base_num_query_heads", 16, "Number of query heads before scaling.").at_least(1),
        Key::int("base_num_kv_heads", 16, "Number of key/value heads before scaling; divides the query heads.")
            .at_least(1),
        Key::int(
            "global_num_kv_heads",
            0,
            "Number of key/value heads of full-attention layers; 0 means the same as the sliding layers.",
        ),
        Key::int("head_dim", 128, "Head size of sliding-window layers; even.").at_least(2),
        Key::int("global_head_dim", 0, "Head size of full-attention layers; even; 0 means `head_dim`."),
        Key::int("base_mlp_dim", 7168, "Inner width of the MLP before scaling.").at_least(1),
        Key::list(
            "mlp_activations",
            &["gelu", "linear"],
            "Activation of the MLP's gate, and `linear` for the branch it multiplies.",
        )
        .differs(Literal::List(&["silu", "linear"]), "the only gate this decoder has"),
        Key::int("vocab_size", 32_000, "Rows of the token table, and width of the logits.").at_least(1),
        Key::int(
            "hidden_size_per_layer_input",
            0,
            "Width of the per-layer embedding that every layer receives for each token; 0 builds a model without.",
        ),
        Key::int("vocab_size_per_layer_input", 0, "Rows of the per-layer embedding table; 0 means `vocab_size`."),
        Key::int(
            "num_kv_shared_layers",
            0,
            "Number of last layers that project no keys and values and read those of the last earlier layer of the \
             same kind.",
        ),
        Key::bool("use_double_wide_mlp", false, "Doubles the MLP width of the layers that borrow keys and values."),
        Key::int("sliding_window_size", 0, "Positions that a sliding-window layer sees, the query's own included."),
        Key::int(
            "sliding_window_pattern",
            0,
            "Period of the layer kinds: every period-th layer attends to all positions, the others to the window. \
             MaxText fixes it by model name (5 for gemma4-e2b, else 6), which is also the default here.",
        )
        .at_least(1)
        .or_null()
        .own(),
        Key::int(
            "rope_max_timescale",
            10_000,
            "Base of the rotary frequencies where a layer kind does not set its own.",
        )
        .at_least(1),
        Key::int(
            "local_rope_max_timescale",
            -1,
            "Base of the rotary frequencies of sliding-window layers; -1 means `rope_max_timescale`.",
        )
        .at_least(-1),
        Key::int(
            "global_rope_max_timescale",
            -1,
            "Base of the rotary frequencies of full-attention layers; -1 means `rope_max_timescale`.",
        )
        .at_least(-1),
        Key::float(
            "global_rope_proportion",
            0.25,
            "Share of a full-attention head that is rotated; the frequencies are those of the whole head.",
        )
        .positive()
        .at_most_one(),
        Key::float("local_rope_proportion", 1.0, "Share of a sliding-window head that is rotated.")
            .positive()
            .at_most_one()
            .only("the sliding layers of this decoder rotate the whole head"),
        Key::float(
            "normalization_layer_epsilon",
            1e-5,
            "Added to the mean square in the norms. MaxText leaves the four norms of a layer at 1e-6 whatever this \
             says; here it counts for all of them.",
        )
        .positive(),
        Key::bool("logits_via_embedding", true, "Uses the token table as the output projection.")
            .differs(Literal::Bool(false), "these models have no other output projection")
            .only("these models have no separate output projection"),
        Key::bool(
            "normalize_embedding_logits",
            true,
            "In MaxText, divides the logits by the root of the hidden size, because its token table is stored scaled.",
        )
        .only("weights are held unscaled, so the product needs no correction; the logits are the same"),
        Key::float(
            "final_logits_soft_cap",
            0.0,
            "Bounds the logits to this size by a tanh; null or 0 leaves them alone.",
        )
        .or_null()
        .differs(Literal::Float(0.0), "0 means none, and is read as null"),
        Key::float("attn_logits_soft_cap", 0.0, "Bounds the attention logits by a tanh.")
            .or_null()
            .differs(Literal::Float(0.0), "0 means none, and is read as null")
            .only("this decoder has no soft cap in attention"),
        Key::bool("v_norm_with_scale", false, "Gives the norm of the values a weight.")
            .differs(Literal::Bool(true), "the value norm of this decoder has no weight")
            .only("the value norm of this decoder has no weight"),
        Key::bool("qk_norm_with_scale", true, "Gives the norms of queries and keys a weight.")
            .only("the query and key norms of this decoder have a weight"),
        Key::bool("use_post_attn_norm", true, "Normalises the output of attention.")
            .differs(Literal::Bool(false), GEMMA_NORMS)
            .only(GEMMA_NORMS),
        Key::bool("use_post_ffw_norm", true, "Normalises the output of the MLP.")
            .differs(Literal::Bool(false), GEMMA_NORMS)
            .only(GEMMA_NORMS),
    ],
);
