#!/usr/bin/env python3
"""Reads event files with TensorBoard's own reader and compares them with metrics.jsonl.

Environment (any Python from 3.10 on):

    python -m venv tensorboard-venv
    tensorboard-venv/bin/pip install tensorboard==2.21.0

Use:

    cargo build -p lapidary-engine --example metrics_pattern
    tensorboard-venv/bin/python scripts/check_tensorboard.py --tool target/debug/examples/metrics_pattern
    tensorboard-venv/bin/python scripts/check_tensorboard.py lapidary_output/my_run

With `--tool`, a run is made up that is killed at three quarters and resumed at half. Checked of every run: event files
have exactly the steps of metrics.jsonl, each once and in order, under the same tags; values are equal as 32-bit floats,
NaN and infinity included; texts are there. The exit code is 0 only if all of it holds.
"""

import argparse
import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, STORE_EVERYTHING_SIZE_GUIDANCE


def float32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def logged(run):
    """Tag -> list of (step, value) of metrics.jsonl."""
    series = {}
    for number, line in enumerate((run / "metrics" / "metrics.jsonl").read_text().splitlines(), 1):
        # Python would take NaN; valid JSON has none.
        row = json.loads(line, parse_constant=lambda word: sys.exit(f"metrics.jsonl:{number}: {word} is no JSON"))
        for tag, value in row.items():
            if "/" not in tag:
                continue
            if value is None:
                value = float(row["non_finite"][tag].replace("Infinity", "inf"))
            series.setdefault(tag, []).append((row["step"], value))
    return series


def same(a, b):
    return (math.isnan(a) and math.isnan(b)) or a == b


def check(run):
    expected = logged(run)
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance=STORE_EVERYTHING_SIZE_GUIDANCE)
    reader.Reload()
    problems = []
    if set(reader.Tags()["scalars"]) != set(expected):
        problems.append(f"tags differ: {sorted(set(reader.Tags()['scalars']) ^ set(expected))}")
    for tag in sorted(set(expected) & set(reader.Tags()["scalars"])):
        found = [(event.step, event.value) for event in reader.Scalars(tag)]
        wanted = [(step, float32(value)) for step, value in expected[tag]]
        steps = [step for step, _ in wanted]
        if steps != sorted(set(steps)):
            problems.append(f"{tag}: metrics.jsonl does not have every step once")
        if [step for step, _ in found] != steps:
            problems.append(f"{tag}: steps differ: {[step for step, _ in found]}, {steps}")
        elif not all(same(a[1], b[1]) for a, b in zip(found, wanted)):
            problems.append(f"{tag}: values differ")
    texts = [tag for tag in reader.Tags()["tensors"] if reader.SummaryMetadata(tag).plugin_data.plugin_name == "text"]
    for tag in texts:
        if not reader.Tensors(tag)[0].tensor_proto.string_val[0].decode("utf-8"):
            problems.append(f"{tag}: empty text")
    files = len(list((run / "tensorboard").glob("events.out.tfevents.*")))
    steps = len(expected.get("learning/loss", []))
    print(f"{run}: {files} event files, {len(expected)} tags, {steps} steps, texts: {', '.join(texts) or 'none'}")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=pathlib.Path)
    parser.add_argument("--tool", type=pathlib.Path, help="the example metrics_pattern")
    args = parser.parse_args()
    problems = []
    for run in args.runs:
        problems += check(run)
    if args.tool:
        with tempfile.TemporaryDirectory() as directory:
            run = pathlib.Path(directory)
            subprocess.run([args.tool, run, "20"], check=True, stdout=subprocess.DEVNULL)
            problems += check(run)
            if [step for step, _ in logged(run)["learning/loss"]] != list(range(20)):
                problems.append("the resumed run does not have the steps 0 to 19")
            if not math.isnan(dict(logged(run)["learning/loss"])[7]):
                problems.append("the loss of step 7 should be NaN")
    if not args.runs and not args.tool:
        parser.error("nothing to check")
    for problem in problems:
        print("FAIL:", problem)
    print("PASS" if not problems else "FAIL")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
