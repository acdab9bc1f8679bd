#!/usr/bin/env python3
"""Makes a golden file for `lapidary verify` with Hugging Face transformers. Optional: Lapidary itself needs no Python.

    pip install torch transformers safetensors
    python scripts/golden_from_hf.py MODEL_DIR OUT.safetensors --prompt "The capital of France is" --prompt "Once upon a time"
    python scripts/golden_from_hf.py MODEL_DIR OUT.safetensors --ids "[[2, 818, 5279]]" --hidden

All prompts are cut to the length of the shortest, so that they form one [B, S] batch; --pad keeps them whole and pads on
the left instead. Weights are widened to float32 and attention is eager: what is stored is the reference of truth, computed
in float32. --hidden adds the output of every layer, for `verify --trace`. --last keeps the logits of the last position only
(a 262144-token vocabulary takes 1 MiB a position).
"""
import argparse
import json

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def token_ids(args):
    if args.ids:
        rows = json.loads(args.ids)
        return rows if isinstance(rows[0], list) else [rows]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    return [tokenizer(p)["input_ids"] for p in args.prompt]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory")
    parser.add_argument("out", help="golden file to write (.safetensors)")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", action="append", help="text; may be repeated")
    group.add_argument("--ids", help="token ids as JSON: [..] or [[..], [..]]")
    parser.add_argument("--pad", action="store_true", help="pad on the left instead of cutting")
    parser.add_argument("--hidden", action="store_true", help="also store hidden states and per-layer inputs")
    parser.add_argument("--last", action="store_true", help="store the logits of the last position only")
    args = parser.parse_args()

    rows = token_ids(args)
    if args.pad:
        length = max(map(len, rows))
        mask = [[0] * (length - len(r)) + [1] * len(r) for r in rows]
        rows = [[0] * (length - len(r)) + r for r in rows]
    else:
        length = min(map(len, rows))
        rows, mask = [r[:length] for r in rows], None
    ids = torch.tensor(rows)
    mask = torch.tensor(mask) if mask and not all(map(all, mask)) else None

    config = AutoConfig.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, config=config, dtype=torch.float32, attn_implementation="eager").eval()
    text = model.model.language_model if hasattr(model.model, "language_model") else model.model
    seen, hooks = {}, []

    def keep(name):
        def hook(_module, _inputs, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().float().clone()
        return hook

    if args.hidden:
        hooks.append(text.embed_tokens.register_forward_hook(keep("hidden.embed")))
        hooks += [layer.register_forward_hook(keep(f"hidden.{i}")) for i, layer in enumerate(text.layers)]
        hooks.append(text.norm.register_forward_hook(keep("hidden.final")))
        if text.hidden_size_per_layer_input:
            project = text.project_per_layer_inputs

            def projected(*a, **k):
                seen["ple"] = project(*a, **k)
                return seen["ple"]

            text.project_per_layer_inputs = projected
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    tensors = {"input_ids": ids, ("logits_last" if args.last else "logits"): logits[:, -1] if args.last else logits}
    if mask is not None:
        tensors["attention_mask"] = mask
    tensors.update({k: v.detach().float() for k, v in seen.items()})
    save_file({k: v.contiguous() for k, v in tensors.items()}, args.out)
    print(f"{args.out}: {ids.shape[0]} x {ids.shape[1]} tokens, vocabulary {logits.shape[-1]}")


main()
