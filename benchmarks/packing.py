"""The padding of rows of one length, of a few lengths and of several documents; of pairs also the CPU time of training.

    python -m benchmarks.packing FILE [--kind pair] [--length 512] [--vocab-size 8192] [--steps 16]

FILE is JSON lines with the fields prompt, chosen and rejected, or chosen and rejected alone, which are whole dialogues
then. A BPE tokenizer is trained on the chosen texts. The steps are of DPO without a reference (SimPO), on a random
model of 7 million weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import timing
from benchmarks.provenance import record
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.selection import select_rows
from rlhf_jax.mesh import TRAIN, Layout, single_device_mesh
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import abstract_params, init_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.optim import make_optimizer
from rlhf_jax.stages.dpo import DPOConfig, dpo_objective
from rlhf_jax.stages.from_scratch import train_tokenizer
from rlhf_jax.stages.supervised import make_programs
from rlhf_jax.train_step import init_state

ROWS, LENGTHS = 4, 8  # rows of a batch; lengths that rows are padded to, where they are a few


def padding(batches: Batches) -> float:
    """The share of the positions of an epoch that hold no token."""
    masks = [batches[step].mask for step in range(batches.steps_per_epoch)]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)


def cpu_seconds_per_pair(batches: Batches, vocab: int, steps: int) -> float:
    """CPU seconds of the first `steps` optimizer steps by the pairs in them; compilation is left out.

    Of all threads: other processes on the machine, which may stop this one, change it little.
    """
    sizes = dataclasses.replace(timing.SIZES["qwen3"], vocab=vocab)
    config, layout = decoder_config(sizes.hf_config, scalar_head=False), Layout(single_device_mesh(), TRAIN)
    settings = DPOConfig(loss="simpo")
    tx = make_optimizer(settings.optim, 1000)
    objective = dpo_objective(config, Compute(jax.numpy.dtype("float32"), "none", 128), layout, settings)
    update, _ = make_programs(objective, config, layout, tx, 1)
    state = init_state(init_params(config, jax.random.key(0), layout), tx, abstract_params(config), layout)
    seconds, pairs, compiled = 0.0, 0, set()
    for step in range(steps):
        batch = batches[step]
        if batch.tokens.shape not in compiled:
            compiled.add(batch.tokens.shape)
            state, _ = jax.block_until_ready(update(state, {}, batch))
        start = time.process_time()
        state, _ = jax.block_until_ready(update(state, {}, batch))
        seconds += time.process_time() - start
        pairs += int(np.isfinite(batch.scores[..., 0]).sum())
    return seconds / pairs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--kind", choices=("demonstration", "pair"), default="demonstration", help="of the rows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="steps of pairs; 0: none (default: %(default)s)")
    args = parser.parse_args(argv)
    with args.file.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["chosen"] for line in lines]
    tokenizer = prepare_tokenizer(train_tokenizer(texts, args.vocab_size))
    data = DataConfig((SourceConfig(str(args.file)),), split={"rows": 1.0}, held_out=0.0, max_length=args.length)
    spec = RowSpec(args.kind, "rows")
    rows = select_rows(data, tokenizer, spec, held_out=False)
    packed = select_rows(data, tokenizer, dataclasses.replace(spec, pack_length=args.length), held_out=False)
    forms = {
        "one_length": Batches(rows, batch_size=ROWS, seed=0, width=args.length),
        "few_lengths": Batches(rows, batch_size=ROWS, seed=0, width=args.length, buckets=LENGTHS),
        "packed": Batches(packed, batch_size=ROWS, seed=0, width=args.length),
    }
    result = {"file": args.file.parent.name, "kind": args.kind, "length": args.length, "documents": len(rows)}
    result |= {"packed_rows": len(packed), "lengths": LENGTHS}
    result["padding"] = {name: padding(batches) for name, batches in forms.items()}
    if args.kind == "pair" and args.steps:
        vocab = len(tokenizer)
        result["cpu_seconds"] = {
            name: cpu_seconds_per_pair(batches, vocab, args.steps) for name, batches in forms.items()
        }
    record("packing", result, "file", "kind", "length")


if __name__ == "__main__":
    main()
