#!/usr/bin/env python3
"""Loads Hugging Face directories with transformers and fails on any warning, missing, unexpected or mismatched tensor.

Environment (any Python from 3.10 on; runs on CPU):

    python -m venv hf-venv
    hf-venv/bin/pip install torch transformers safetensors

Use:

    hf-venv/bin/python scripts/load_exports.py DIR [DIR ...]
    hf-venv/bin/python scripts/load_exports.py --convert target/release/lapidary MODEL [MODEL ...]

With `--convert`, every model is taken to MaxText and back in all three profiles first (in a temporary directory), and what
comes back is loaded. Every tensor that transformers holds afterwards must have the bytes of the file, and a forward run
must give finite logits. The exit code is 0 only if all of it holds.
"""

import argparse
import json
import logging
import pathlib
import subprocess
import sys
import tempfile
import warnings

import torch
import transformers
from safetensors import safe_open


class Collect(logging.Handler):
    """Keeps every message from warnings on up."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def stored(directory):
    """Every tensor of a directory by name."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors.update({name: f.get_tensor(name) for name in f.keys()})
    return tensors


def load(directory):
    """Loads one directory; gives what is wrong, in sentences."""
    config = json.loads((directory / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    collect = Collect()
    logger = logging.getLogger("transformers")
    logger.addHandler(collect)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        model, info = model_class.from_pretrained(directory, dtype="auto", output_loading_info=True)
        ids = torch.arange(1, 9)[None] % config.get("text_config", config)["vocab_size"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
    logger.removeHandler(collect)
    problems = [f"warning: {m}" for m in collect.messages + [str(w.message) for w in raised]]
    problems += [f"{kind}: {sorted(map(str, found))}" for kind, found in info.items() if found]
    if not torch.isfinite(logits).all():
        problems.append("logits are not finite")
    held = model.state_dict()
    files = stored(directory)
    # Keys and values of layers that borrow them are in official checkpoints, and transformers passes over them silently.
    ignored = [name for name in files if name not in held]
    for name in ignored:
        if ".self_attn." not in name:
            problems.append(f"{name} is not in the model")
    for name, tensor in files.items():
        if name in ignored:
            continue
        if held[name].dtype != tensor.dtype or not torch.equal(held[name], tensor):
            problems.append(f"{name} is {held[name].dtype} and not what the file holds")
    return problems, model_class.__name__, len(files), len(ignored)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    parser.add_argument("--convert", metavar="LAPIDARY", help="take every model to MaxText and back first")
    args = parser.parse_args()
    logging.getLogger("transformers").propagate = False
    transformers.utils.logging.disable_progress_bar()
    bad = 0

    def report(label, directory):
        nonlocal bad
        problems, name, count, ignored = load(directory)
        bad += bool(problems)
        print(f"{'FAIL' if problems else 'ok':4}  {label}: {name}, {count} tensors, {ignored} of them redundant")
        for problem in problems:
            print(f"      {problem}")

    for model in args.models:
        if not args.convert:
            report(model, model)
            continue
        with tempfile.TemporaryDirectory() as tmp:
            mt = pathlib.Path(tmp) / "mt"
            run = lambda *words: subprocess.run([args.convert, "convert", *words], check=True, capture_output=True)
            run(model, mt, "--to", "maxtext")
            for profile in ["lean", "causal", "official"]:
                back = pathlib.Path(tmp) / profile
                base = ["--base", model] if profile == "official" else []
                run(mt, back, "--to", "hf", "--profile", profile, *base)
                report(f"{model.parent.name}/{model.name} as {profile}", back)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
