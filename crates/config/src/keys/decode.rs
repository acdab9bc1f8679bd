//! Generating text, and fine-tuning.

use super::{Category, Key, within};
use crate::choice::SamplingStrategy;

pub(super) const KEYS: &[Key] = &within(
    Category::Decode,
    [
        Key::text("prompt", "I love to", "Text to continue."),
        Key::text("system_prompt", "", "Instruction put before the chat."),
        Key::bool("use_chat_template", false, "Wraps the prompt in the model's chat template."),
        Key::text("chat_template", "", "A chat template to use instead of the checkpoint's."),
        Key::path("chat_template_path", "", "A file with a chat template to use instead of the checkpoint's."),
        Key::choice("decode_sampling_strategy", SamplingStrategy::WORDS, "greedy", "How the next token is chosen."),
        Key::float(
            "decode_sampling_nucleus_p",
            -1.0,
            "Share of the probability from which `nucleus` and `composite` draw; -1 where they are not used.",
        )
        .at_least(-1)
        .at_most(1),
        Key::int("decode_sampling_top_k", 0, "Number of tokens from which `topk` and `composite` draw."),
        Key::float("decode_sampling_temperature", 1.0, "Divides the logits before a draw.").positive(),
        Key::text("autoregressive_decode_assert", "", "Text that generation must give, else the command fails."),
        Key::text("prefill_cache_dir", "", "Directory of saved prefill results.").only("prefill results are not saved"),
    ],
);

const ONE_SET: &str = "adapters are read from `lora.lora_restore_path`";

pub(super) const FINE_TUNING: &[Key] = &within(
    Category::FineTuning,
    [
        Key::bool("use_sft", false, "Trains on conversations instead of plain text."),
        Key::bool("use_dpo", false, "Trains on preferences; excludes `use_sft`.")
            .only("preference training is not offered"),
        Key::bool("sft_train_on_completion_only", false, "Counts only the answers in the loss."),
        Key::text("formatting_func_path", "", "Python function that formats conversations.")
            .only("no Python runs here; give a chat template"),
        Key::bool("lora.enable_lora", false, "Trains low-rank adapters and leaves the base weights as they are."),
        Key::int("lora.lora_rank", 0, "Rank of the adapters; at least 1 when they are trained."),
        Key::float("lora.lora_alpha", 0.0, "The adapter's product is scaled by alpha over rank."),
        Key::text(
            "lora.lora_module_path",
            "",
            "Regular expression of the modules that get adapters; empty means the attention and MLP projections of \
             every layer.",
        ),
        Key::text("lora.lora_weight_qtype", "", "Quantized type of the frozen base weights.")
            .or_null()
            .only("quantized base weights (QLoRA) are not offered"),
        Key::int("lora.lora_tile_size", 0, "Tile of quantized base weights.")
            .or_null()
            .only("quantized base weights (QLoRA) are not offered"),
        Key::path("lora.lora_restore_path", "", "Adapters to start from."),
        Key::text("hf_lora_adapter_path", "", "Adapter in PEFT's format, for conversion.").only(ONE_SET),
        Key::text("lora_input_adapters_path", "", "Parent directory of adapters, for decoding.").only(ONE_SET),
    ],
);
