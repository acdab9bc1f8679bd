#!/usr/bin/env python3
"""The losses of a short training run by transformers in f64, to compare `lapidary train` with.

usage: train_curve_from_hf.py MODEL BATCHES OUT.json [--steps N] [--lr RATE] [--dtype float64|float32] [--threads N]
       [--draw ROWS TOKENS]

MODEL is a Hugging Face directory; BATCHES a safetensors file whose tensor `batches` is [steps, rows, tokens] (what
`lapidary train --batches` takes), which --draw makes of random tokens. The rule is AdamW (0.9, 0.95, eps 1e-8, decay 0.1 on
everything), gradients clipped to norm 1, a constant learning rate: in Lapidary's keys adam_b1=0.9 adam_b2=0.95 adam_weight_decay=0.1 gradient_clipping_threshold=1.0
warmup_steps_fraction=0.0 learning_rate_final_fraction=1.0.

transformers computes norms, softmax, rotation and loss in f32 whatever the model's dtype is: with float64 these are widened here.

The same run: lapidary train ... load_parameters_path=MODEL --batches BATCHES dtype=float64 weight_dtype=float64
With --compare METRICS.jsonl the largest relative difference of its losses is printed, and the exit code says whether it is
at most --bound.
"""
import argparse
import json
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Gemma4ForCausalLM


def widen():
    """Lets nothing be narrower than f64."""
    torch.Tensor.float = torch.Tensor.double
    softmax = torch.nn.functional.softmax

    def wide_softmax(x, dim=None, _stacklevel=3, dtype=None):
        return softmax(x, dim=dim, dtype=torch.float64)

    torch.nn.functional.softmax = wide_softmax


def round_frequencies(model):
    """The rotation's frequencies as the nearest f32 numbers: torch's powers are some last digits off, which these models
    amplify (a curve without this leaves the other by 5e-4 at the third step)."""
    rotary, config = model.model.rotary_emb, model.config
    for kind in set(config.layer_types):
        rope = config.rope_parameters[kind]
        old = getattr(rotary, f"{kind}_inv_freq")
        width = 2 * old.numel()
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        # Of full attention only a part is rotated; the rest has frequency zero.
        new = torch.where(old == 0, 0.0, rope["rope_theta"] ** -exponents).to(torch.float32)
        assert torch.allclose(new, old.to(torch.float32), rtol=1e-6), kind
        setattr(rotary, f"{kind}_inv_freq", new)


def draw(args):
    """Batches of random tokens; control tokens are left out."""
    with open(f"{args.model}/config.json") as f:
        config = json.load(f)
    vocab = config.get("text_config", config)["vocab_size"]
    random = torch.Generator().manual_seed(1)
    batches = torch.randint(4, vocab, (args.steps, *args.draw), generator=random, dtype=torch.int32)
    save_file({"batches": batches}, args.batches)


def train(args):
    torch.set_num_threads(args.threads)
    if args.draw:
        draw(args)
    dtype = getattr(torch, args.dtype)
    model = Gemma4ForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="eager")
    model.config.use_cache = False
    if dtype == torch.float64:
        round_frequencies(model)
        widen()
    model.train()
    rule = dict(lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), **rule)
    with safe_open(args.batches, "pt") as f:
        batches = f.get_tensor("batches")[: args.steps].long()
    losses = []
    for step, ids in enumerate(batches):
        loss = model(input_ids=ids, labels=ids).loss
        assert loss.dtype == dtype, loss.dtype
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.12f}, gradient {norm.item():.9f}", file=sys.stderr, flush=True)
        with open(args.out, "w") as f:
            json.dump({"dtype": args.dtype, "losses": losses}, f)
    return losses


def compare(args, losses):
    with open(args.compare) as f:
        lines = [json.loads(line) for line in f]
    found = {line["step"]: line["learning/loss"] for line in lines if "learning/loss" in line}
    pairs = [(step, found[step], want) for step, want in enumerate(losses) if step in found]
    assert pairs, f"{args.compare} has none of the steps"
    for step, got, want in pairs:
        print(f"step {step}: {got:.9f} for {want:.9f}, {abs(got - want) / want:.1e}")
    worst = max(abs(got - want) / want for _, got, want in pairs)
    print(f"{len(pairs)} losses, largest relative difference {worst:.1e}")
    return 0 if worst <= args.bound else 1


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("batches")
    p.add_argument("out")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--lr", type=float, default=3e-4)
    p.add_argument("--dtype", default="float64", choices=["float64", "float32"])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--draw", type=int, nargs=2, metavar=("ROWS", "TOKENS"), help="make BATCHES first")
    p.add_argument("--compare", help="metrics.jsonl of a run; OUT.json is read instead of made if it has its steps")
    p.add_argument("--bound", type=float, default=1e-4)
    a = p.parse_args()
    known = []
    if a.compare:
        try:
            with open(a.out) as f:
                known = json.load(f)["losses"]
        except FileNotFoundError:
            pass
    curve = known if len(known) >= a.steps else train(a)
    sys.exit(compare(a, curve) if a.compare else 0)
