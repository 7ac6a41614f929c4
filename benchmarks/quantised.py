"""What a quantised base costs: errors of a trained model's kernels and logits, and LoRA on it against LoRA on float32.

    python benchmarks/quantised.py [key=value ...]

Trains the demo's model by SFT for a while (runs/quantised/base), then goes on from it with LoRA over a float32, an int8
and an NF4 base, on the same rows. Prints one JSON object. No GPU, no network.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.cli import main as command
from rlhf_jax.config import load
from rlhf_jax.data.batches import Batches, sft_rows
from rlhf_jax.data.sources import load_examples
from rlhf_jax.models.decoder import bind, logits
from rlhf_jax.models.pretrained import Pretrained, from_pretrained
from rlhf_jax.models.quantised import KINDS, Quantised, dequantise
from rlhf_jax.recipe import Recipe

CONFIG, RUNS = "configs/demo.toml", Path("runs/quantised")
BASE_STEPS, LORA_STEPS = 150, 60


def main(overrides: list[str]) -> None:
    base = RUNS / "base"
    sft(base, f"sft.steps={BASE_STEPS}", *overrides)
    export = base / "sft" / "export"
    result = {"base_loss": losses(base)[-1], "error": errors(export, overrides), "lora": {}}
    for kind in ("float32", *KINDS):
        lora = ("model.lora={ rank = 16 }", f"model.frozen_dtype={kind}", f"model.actor={export}", "run.seed=1")
        sft(RUNS / kind, f"sft.steps={LORA_STEPS}", *lora, *overrides)
        before, after = losses(RUNS / kind)
        result["lora"][kind] = {"held_out_loss_before": before, "held_out_loss_after": after}
    whole = result["lora"]["float32"]["held_out_loss_after"]
    for numbers in result["lora"].values():
        numbers["over_float32"] = numbers["held_out_loss_after"] / whole - 1
    print(json.dumps(result, indent=2))


def sft(run: Path, *settings: str) -> None:
    code = command(["sft", CONFIG, f"run.dir={run}", "run.overwrite=true", *settings])
    if code:
        sys.exit(code)


def losses(run: Path) -> list[float]:
    lines = (run / "sft" / "metrics.jsonl").read_text().splitlines()
    return [record["held_out_loss"] for record in map(json.loads, lines) if "held_out_loss" in record]


def errors(folder: Path, overrides: list[str]) -> dict[str, dict[str, float]]:
    """Relative (Frobenius) errors against float32; logits on held-out rows, activations in float32."""
    recipe = load(CONFIG, overrides, Recipe)
    whole = from_pretrained(folder)
    rows = sft_rows(
        load_examples(recipe.data, "sft", held_out=True), whole.tokenizer, recipe.data, train_on_prompt=False
    )
    batch = Batches(rows, batch_size=64, seed=0)[0]

    def logits_of(model: Pretrained) -> np.ndarray:
        hidden = bind(model.config, model.params)(batch.tokens, batch.mask, dtype=jnp.dtype("float32"), remat="none")
        return np.asarray(logits(model.config, model.params, hidden))[batch.mask]

    want, result = logits_of(whole), {}
    for kind in KINDS:
        model = from_pretrained(folder, dtype=kind)
        paths = [path for path, leaf in model.params.items() if isinstance(leaf, Quantised)]
        pairs = [(np.asarray(dequantise(model.params[path], jnp.float32)), whole.params[path]) for path in paths]
        got, bits = logits_of(model), sum(leaf.nbytes * 8 for p in paths for leaf in jax.tree.leaves(model.params[p]))
        result[kind] = {
            "kernels": relative([a for a, _ in pairs], [b for _, b in pairs]),
            "logits": relative([got - got.mean(-1, keepdims=True)], [want - want.mean(-1, keepdims=True)]),
            "same_argmax": float((got.argmax(-1) == want.argmax(-1)).mean()),
            "bits_a_weight": bits / sum(b.size for _, b in pairs),
        }
    return result


def relative(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    wrong, size = (sum(float(np.square(x).sum()) for x in arrays) for arrays in (map(np.subtract, got, want), want))
    return (wrong / size) ** 0.5


if __name__ == "__main__":
    main(sys.argv[1:])
