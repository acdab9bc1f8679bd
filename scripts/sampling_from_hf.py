#!/usr/bin/env python3
"""Writes what transformers' logits processors make of random logits: the fixture of Lapidary's sampling tests.

    sampling_from_hf.py crates/engine/src/generate/sampling/hf.json
"""
import json
import sys

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.5, "top_k": 5},
    {"suppress_tokens": [0, 3, 59, 200]},
    {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1, "suppress_tokens": [7]},
    {"temperature": 3.0, "top_k": 40, "top_p": 0.6, "min_p": 0.3},
]


def processors(s):
    """The list and its order, as `_get_logits_processor` builds it with `do_sample`."""
    p = LogitsProcessorList()
    if "repetition_penalty" in s:
        p.append(RepetitionPenaltyLogitsProcessor(s["repetition_penalty"]))
    if "suppress_tokens" in s:
        p.append(SuppressTokensLogitsProcessor(s["suppress_tokens"]))
    if s.get("temperature", 1.0) != 1.0:
        p.append(TemperatureLogitsWarper(s["temperature"]))
    if "top_k" in s:
        p.append(TopKLogitsWarper(s["top_k"]))
    if s.get("top_p", 1.0) < 1.0:
        p.append(TopPLogitsWarper(s["top_p"]))
    if "min_p" in s:
        p.append(MinPLogitsWarper(s["min_p"]))
    return p


def check_order():
    """The same list must come out of the library itself."""
    for s in SETTINGS:
        class Model(transformers.generation.GenerationMixin):
            config = type("C", (), {"is_encoder_decoder": False})()

        c = GenerationConfig(do_sample=True, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **s})
        c._eos_token_tensor = None
        theirs = Model()._get_logits_processor(generation_config=c, input_ids_seq_length=1, device="cpu")
        assert [type(a) for a in theirs] == [type(a) for a in processors(s)], (s, theirs)


check_order()
torch.manual_seed(5)
cases = []
for i, s in enumerate(SETTINGS):
    v = 60 if i % 3 else 300
    # Multiples of 1/64: exact in few digits, and with some ties for top-k.
    logits = torch.randn(1, v).mul(4 * 64).round().div(64)
    seen = torch.randint(0, v, (1, 9))
    out = processors(s)(seen, logits.clone())
    greedy = LogitsProcessorList([p for p in processors(s) if "Warper" not in type(p).__name__])(seen, logits.clone())
    probs = torch.softmax(out.double(), -1)[0]
    cases.append({
        "settings": s, "seen": seen[0].tolist(), "logits": logits[0].tolist(), "greedy": int(greedy.argmax()),
        "probs": {int(t): round(float(probs[t]), 9) for t in torch.nonzero(out[0] > -torch.inf)[:, 0]},
    })
with open(sys.argv[1], "w") as f:
    f.write('{"transformers": "%s", "cases": [\n' % transformers.__version__)
    f.write(",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n]}\n")
