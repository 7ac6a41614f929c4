"""The cost of a quantised base: errors of a trained model's kernels and logits, and LoRA on it against float32.

    python -m benchmarks.quantised                                        (seed 0, seven minutes on two cores)
    python -m benchmarks.quantised --seeds 0 1 2 --steps 750 --kinds nf4  (a quarter of an hour per seed)

Trains the demo's model by SFT on questions about numbers only (runs/quantised/SEED/base). From there LoRA over a
float32, an int8 and an NF4 base learns, on the same rows, to look up facts, which the base has never seen. No GPU,
no network.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import record
from rlhf_jax.cli import main as command
from rlhf_jax.config import load_config
from rlhf_jax.data import builtin
from rlhf_jax.data.batches import Batches
from rlhf_jax.data.selection import select_rows
from rlhf_jax.mesh import single_device_mesh
from rlhf_jax.models.config import Compute
from rlhf_jax.models.decoder import bind, logits
from rlhf_jax.models.dtypes import QUANTISED_KINDS
from rlhf_jax.models.pretrained import Pretrained, from_pretrained
from rlhf_jax.models.quantised import Quantised, dequantise
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.from_scratch import make_base_model

CONFIG, RUNS = "configs/demo.toml", Path("runs/quantised")
BASE_STEPS = 150
LOOK_UP = re.compile(r"The |In the |.* (lives in|likes) ")  # start of a prompt that states the requested fact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300, help="of LoRA")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--kinds", nargs="+", choices=QUANTISED_KINDS, default=list(QUANTISED_KINDS), help="besides float32"
    )
    args = parser.parse_args()
    for seed in args.seeds:
        record("quantised", one_seed(seed, RUNS / str(seed), args), "seed", "steps")


def one_seed(seed: int, runs: Path, args: argparse.Namespace) -> dict:
    shutil.rmtree(runs, ignore_errors=True)
    options = [f"run.seed={seed}", f"data.builtin_seed={seed}"]
    numbers, look_ups = write_kinds(load_config(CONFIG, options, Recipe).data, runs)
    # The tokenizer is trained on all questions, as that of a pretrained model covers more than its fine-tuning data.
    recipe = load_config(CONFIG, [*options, f"run.dir={runs / 'new'}", "run.overwrite=true"], Recipe)
    new = make_base_model(recipe.context("sft", single_device_mesh()))
    base = runs / "base"
    sft(base, f"model.actor={new}", source(numbers), f"sft.steps={BASE_STEPS}", *options)
    export, losses_of = base / "sft" / "export", {}
    for kind in ("float32", *args.kinds):
        lora = (f"model.lora={{ rank = {args.rank} }}", f"model.frozen_dtype={kind}", f"model.actor={export}")
        sft(runs / kind, source(look_ups), f"sft.steps={args.steps}", *lora, *options)
        before, after = losses(runs / kind)
        losses_of[kind] = {"held_out_loss_before": before, "held_out_loss_after": after}
    whole = losses_of["float32"]
    for entry in losses_of.values():
        entry["over_float32"] = entry["held_out_loss_after"] / whole["held_out_loss_after"] - 1
    gain = 1 - whole["held_out_loss_after"] / whole["held_out_loss_before"]
    error = errors(export, [source(numbers), *options])
    return {
        "seed": seed,
        "steps": args.steps,
        "rank": args.rank,
        "base_losses": losses(base),
        "error": error,
        "lora": losses_of,
        "gain_of_float32": gain,
    }


def write_kinds(data, folder: Path) -> tuple[Path, Path]:
    """Writes the built-in dialogues to two files: (numbers, look-ups)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(builtin.make_rows(data.builtin_seed, data.builtin_rows))
    paths = folder / "numbers.jsonl", folder / "look_ups.jsonl"
    for path, wanted in zip(paths, (False, True), strict=True):
        kept = [row for row in rows if bool(LOOK_UP.match(row["prompt"])) == wanted]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return paths


def source(path: Path) -> str:
    return f'data.sources=[{{ path = "{path}", answer = "answer" }}]'


def sft(run: Path, *settings: str) -> None:
    code = command(["sft", CONFIG, f"run.dir={run}", "run.overwrite=true", *settings])
    if code:
        sys.exit(code)


def losses(run: Path) -> list[float]:
    lines = (run / "sft" / "metrics.jsonl").read_text().splitlines()
    return [record["held_out_loss"] for record in map(json.loads, lines) if "held_out_loss" in record]


def errors(folder: Path, overrides: list[str]) -> dict[str, dict[str, float]]:
    """Relative (Frobenius) errors against float32; logits on held-out rows, activations in float32."""
    recipe = load_config(CONFIG, overrides, Recipe)
    whole = from_pretrained(folder)
    rows = select_rows(recipe.data, whole.tokenizer, recipe.row_spec("sft"), held_out=True)
    batch = Batches(rows, batch_size=64, seed=0)[0]

    def logits_of(model: Pretrained) -> np.ndarray:
        hidden = bind(model.config, model.params)(batch.tokens, batch.mask, Compute(jnp.dtype("float32"), "none"))
        return np.asarray(logits(model.config, model.params, hidden))[batch.mask]

    want, result = logits_of(whole), {}
    for kind in QUANTISED_KINDS:
        model = from_pretrained(folder, dtype=kind)
        paths = [path for path, leaf in model.params.items() if isinstance(leaf, Quantised)]
        pairs = [(np.asarray(dequantise(model.params[path], jnp.float32)), whole.params[path]) for path in paths]
        got, bits = logits_of(model), sum(leaf.nbytes * 8 for p in paths for leaf in jax.tree.leaves(model.params[p]))
        result[kind] = {
            "kernels": relative([a for a, _ in pairs], [b for _, b in pairs]),
            "logits": relative([got - got.mean(-1, keepdims=True)], [want - want.mean(-1, keepdims=True)]),
            "same_argmax": float((got.argmax(-1) == want.argmax(-1)).mean()),
            "bits_per_weight": bits / sum(b.size for _, b in pairs),
        }
    return result


def relative(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    wrong, size = (sum(float(np.square(x).sum()) for x in arrays) for arrays in (map(np.subtract, got, want), want))
    return (wrong / size) ** 0.5


if __name__ == "__main__":
    main()
