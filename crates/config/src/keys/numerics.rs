//! Number types, precision, attention and memory.

use super::{Category, Key, within};
use crate::choice::{Attention, FloatType, MatmulPrecision, RematPolicy, TableHome};
use crate::value::Literal;

pub(super) const KEYS: &[Key] = &within(
    Category::Numerics,
    [
        Key::choice(
            "dtype",
            FloatType::WORDS,
            "bfloat16",
            "Type of activations, and the type weights are rounded to before a product. `float32` is the mode of \
             proof, `bfloat16` the mode of speed; `float64` proves curves of training on a CPU.",
        ),
        Key::choice("weight_dtype", FloatType::WORDS, "float32", "Type in which trained weights are stored."),
        Key::choice("grad_dtype", FloatType::WORDS, "float32", "Type to which f32 gradients are rounded."),
        Key::choice("matmul_precision", MatmulPrecision::WORDS, "default", "How exactly XLA multiplies matrices."),
        Key::bool("activations_in_float32", false, "Computes the MLP's activation in f32."),
        Key::bool("float32_qk_product", false, "Accumulates the product of queries and keys in f32."),
        Key::bool("float32_logits", false, "Computes the attention softmax in f32."),
        Key::bool("logits_dot_in_fp32", false, "Accumulates the output projection in f32."),
        Key::bool("cast_logits_to_fp32", true, "Hands out the logits in f32."),
    ],
);

const KERNEL: &str = "this version computes attention with XLA's own operations; leave it to `autoselected`";
const OFFLOAD: &str = "offloading to host memory is not offered yet";

pub(super) const MEMORY: &[Key] = &within(
    Category::Memory,
    [
        Key::choice("attention", Attention::WORDS, "autoselected", "How attention is computed.").refuse(&[
            ("flash", KERNEL),
            ("cudnn_flash_te", KERNEL),
            ("cudnn_flash_jax", KERNEL),
            ("paged", "paged attention belongs to serving engines"),
            ("vllm_rpa", "kernels of vLLM are not part of this project"),
            ("vllm_batched_rpa", "kernels of vLLM are not part of this project"),
        ]),
        Key::choice(
            "remat_policy",
            RematPolicy::WORDS,
            "full",
            "What each layer keeps for the backward pass; the rest is computed again.",
        )
        .synonym(&[("minimal_flash", "minimal_with_context")])
        .refuse(&[
            ("minimal_with_quantization", "quantized training is not offered"),
            ("minimal_with_context_and_quantization", "quantized training is not offered"),
            ("qkv_proj_offloaded", OFFLOAD),
            ("minimal_offloaded", OFFLOAD),
            ("custom", "choosing tensor by tensor is not offered; take one of the named policies"),
        ]),
        Key::bool(
            "scan_layers",
            false,
            "Loops over groups of like layers instead of writing every layer out: the program compiles in a time that \
             does not depend on depth, and may run slower. Needs a pattern of layers that divides both the layers with \
             own keys and values and those that borrow them.",
        )
        .differs(Literal::Bool(true), "MaxText cannot loop over these models' layers"),
        Key::int(
            "num_vocab_tiling",
            1,
            "Number of pieces in which output projection and loss are computed; divides the tokens per device. \
             Memory falls, the result stays the same up to rounding. Left out: one piece up to 64 MiB of \
             f32 logits, else at least two, each of 256 MiB or 512 tokens, whatever is more.",
        )
        .at_least(1),
        Key::choice(
            "per_layer_table",
            TableHome::WORDS,
            "auto",
            "Where the table of per-layer embeddings is. `host`: only the rows of a batch are on the device; a trained table \
             takes memory for the rows that occurred so far, and a step changes only the rows in its batch (weights, decay \
             and moments of all others rest). `auto`: `host` if it is frozen, else `device`.",
        )
        .own(),
        Key::int("max_segments_per_seq", -1, "Most documents packed into one sequence; -1 sets no limit.").at_least(-1),
    ],
);
