#!/usr/bin/env python3
"""Makes a golden file (JSON lines) with MaxText's own loader and model, for `lapidary verify --golden`.

Run it where MaxText runs, with MaxText's arguments after the output file:

    DECOUPLE_GCLOUD=TRUE JAX_PLATFORMS=cpu python golden_from_maxtext.py maxtext.jsonl src/maxtext/configs/base.yml \\
        model_name=gemma4-e2b scan_layers=false hardware=cpu skip_jax_distributed_system=true attention=dot_product \\
        per_device_batch_size=1 max_target_length=128 dtype=float32 weight_dtype=float32 matmul_precision=highest \\
        run_name=golden base_output_directory=out load_parameters_path=CHECKPOINT/0/items

Two sequences of random tokens are run: one of max_target_length, one of a quarter of it and one more, padded.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from maxtext.common.common_types import DECODING_ACTIVE_SEQUENCE_INDICATOR, MODEL_MODE_TRAIN
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils


def main():
    out, arguments = sys.argv[1], sys.argv[2:]
    config = pyconfig.initialize([sys.argv[0], *arguments])
    if not config.load_parameters_path:
        raise SystemExit("load_parameters_path is not set: the weights would be random")
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = model_creation_utils.from_pretrained(config, mesh=mesh, model_mode=MODEL_MODE_TRAIN)
    length = config.max_target_length
    random = np.random.default_rng(3)
    with open(out, "w") as f:
        for count in (length, length // 4 + 1):
            ids, segments = np.zeros((2, 1, length), np.int32)
            ids[0, :count] = random.integers(1, config.vocab_size, count)
            segments[0, :count] = DECODING_ACTIVE_SEQUENCE_INDICATOR
            with mesh:
                logits = model(
                    decoder_input_tokens=jnp.array(ids),
                    decoder_positions=jnp.arange(length, dtype=np.int32)[None],
                    decoder_segment_ids=jnp.array(segments),
                    enable_dropout=False,
                )
            logits = np.asarray(logits, np.float32)[0, :count]
            line = {"prompt": f"{count} random tokens", "tokens": ids[0, :count].tolist(), "logits": logits.tolist()}
            f.write(json.dumps(line) + "\n")
            print(f"{count} tokens: logits from {logits.min():.3f} to {logits.max():.3f}")


if __name__ == "__main__":
    main()
