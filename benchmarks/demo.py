"""The demo by every method, for several seeds: held-out answers judged good, KL to the SFT model, and seconds.

    python -m benchmarks.demo [--seeds 0 1 2 3 4] [--methods sft ppo ...] [--note TEXT] [key=value ...]

Of each seed one SFT model and one reward model are trained, from which every method starts. All policies answer the
same held-out prompts, sampled at temperature 1 and greedily. About half an hour on two free cores per seed.

Runs in runs/benchmark-demo/SEED, where the same command continues. Compiled programs are kept next to them: the seconds
of the first seed include compiling and those of the others do not.
`key=value` changes keys of configs/demo.toml.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import record
from rlhf_jax.cli import set_compile_cache
from rlhf_jax.config import dump_config, load_config
from rlhf_jax.data.builtin_judge import judge
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.selection import read_examples
from rlhf_jax.evaluate import held_out_prompts, sample_texts
from rlhf_jax.likelihood import answer_kl
from rlhf_jax.models.pretrained import from_pretrained, reward_from_pretrained
from rlhf_jax.recipe import Recipe
from rlhf_jax.scoring import score_texts, win_rate
from rlhf_jax.stages.run_folder import open_run

CONFIG, RUNS = "configs/demo.toml", Path("runs/benchmark-demo")
GRPO = ('run.stages=["sft", "reward", "grpo"]', "data.split={sft=4, reward=4, grpo=2}")
RLOO = ("advantage=leave_one_out", "ratio=product", "scale=sequence", "kl_in=score", "kl_coef=2.0")
# {method: (its stage, what changes configs/demo.toml)}; all have the same prompts for SFT.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sft": ("sft", ()),
    "ppo": ("ppo", ()),
    "grpo": ("grpo", GRPO),
    "rloo": ("grpo", (*GRPO, *(f"grpo.{each}" for each in RLOO))),
    "dpo": ("dpo", ('run.stages=["sft", "dpo"]', "data.split={sft=4, dpo=6}")),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the configuration")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--note", default="", help="about the machine, such as that other processes shared it")
    args = parser.parse_intermixed_args(argv)
    use_cache(RUNS / "cache")
    for seed in args.seeds:
        settings = [f"run.seed={seed}", *args.overrides]
        base, seconds = train_base(seed, settings)
        for method in args.methods:
            result = {"seed": seed, "method": method, **measure(method, base, settings)}
            result["seconds"] = seconds if method == "sft" else {method: result["seconds"]}
            record("demo", result, "seed", "method", note=args.note)


def use_cache(folder: Path) -> None:
    """Keep compiled programs and tokenized rows in `folder`, of this process and of those that it starts."""
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    os.environ["XDG_CACHE_HOME"] = str(folder.absolute())
    set_compile_cache(os.environ)


def train(stage: str, settings: list[str], run: Path) -> float:
    """Train one stage in `run` if it is not finished there; the seconds that it took, 0 if it was resumed."""
    kept = run / "seconds.json"
    seconds = json.loads(kept.read_text()) if kept.exists() else {}
    if stage not in seconds:
        resumed, start = (run / stage).exists(), time.perf_counter()
        run_command(stage, CONFIG, *settings)
        seconds[stage] = 0.0 if resumed else time.perf_counter() - start
        kept.write_text(json.dumps(seconds) + "\n")
    return seconds[stage]


def train_base(seed: int, settings: list[str]) -> tuple[Path, dict[str, float]]:
    """The folder with the SFT and the reward model of a seed, and the seconds of these stages."""
    base = RUNS / str(seed) / "base"
    return base, {stage: train(stage, [*settings, f"run.dir={base}"], base) for stage in ("sft", "reward")}


def run_command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "rlhf_jax", *words], check=True)


def branch(base: Path, name: str, settings: list[str], stage: str) -> tuple[Path, float]:
    """Train `stage` from the models of `base`, in a folder next to it, if not done; the folder, and seconds."""
    run, settings = base.with_name(name), [*settings, f"run.dir={base.with_name(name)}"]
    recipe = load_config(CONFIG, settings, Recipe)
    open_run(recipe.run, dump_config(recipe), Recipe)
    for part in ("base", "sft/export", "reward/export"):
        if (base / part).exists() and not (run / part).exists():
            shutil.copytree(base / part, run / part)
    return run, train(stage, settings, run)


def measure(method: str, base: Path, settings: list[str]) -> dict[str, Any]:
    """Train by a method from the models of `base`, unless that is done; seconds, and numbers of its policy."""
    if method == "sft":
        own = {"content": content_accuracy(base, settings)}
        return own | {"seconds": 0.0, **judge_policy(base / "sft" / "export", base, settings)}
    stage, changes = METHODS[method]
    run, seconds = branch(base, method, [*settings, *changes], stage)
    return {"seconds": seconds, **judge_policy(run / stage / "export", base, settings)}


def judge_policy(export: Path, base: Path, settings: list[str]) -> dict[str, Any]:
    """Answers of a policy to held-out prompts, sampled and greedy, as the judge of the built-in data finds them."""
    recipe = load_config(CONFIG, settings, Recipe)
    policy, reference = (from_pretrained(folder) for folder in (export, base / "sft" / "export"))
    examples, batch = held_out_prompts(policy.tokenizer, "ppo", recipe.data, recipe.evaluate.prompts)
    found: dict[str, Any] = {"prompts": len(examples)}
    for how, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        sample = dataclasses.replace(recipe.evaluate.sample, temperature=temperature)
        config = dataclasses.replace(recipe.evaluate, sample=sample)
        rollout, texts = sample_texts(policy, batch.tokens, batch.mask, config)
        asked = [example.turns[-1][1] for example in examples]
        verdicts = [judge(*each) for each in zip(asked, texts, rollout.ended.tolist(), strict=True)]
        share, low, high = win_rate([verdict.good for verdict in verdicts], [0.5] * len(verdicts))
        found[how] = {"good": share, "interval": [low, high], "length": float(rollout.mask.sum(axis=1).mean())}
        found[how]["faults"] = dict(Counter(fault for verdict in verdicts for fault in verdict.faults))
        wrong = [prompt for prompt, verdict in zip(asked, verdicts, strict=True) if "wrong" in verdict.faults]
        found[how]["wrong_sums"] = sum(len(re.findall(r"\d+", prompt)) == 2 for prompt in wrong)
        if how == "sampled":
            found["kl"], *found["kl_interval"] = answer_kl(reference, rollout, config.batch_size)
    return found


def content_accuracy(run: Path, settings: list[str]) -> dict[str, Any]:
    """The reward model's accuracy on held-out pairs that differ only in right and wrong content, by the judge."""
    data = load_config(CONFIG, settings, Recipe).data
    pairs = []
    for example in read_examples(data, RowSpec("pair", "reward"), held_out=True):
        prompt = example.turns[-1][1]
        chosen, rejected = (judge(prompt, text, ended=True).faults for text in (example.chosen, example.rejected))
        if sorted([*chosen, "wrong"]) == sorted(rejected):
            pairs.append((prompt, example.chosen, example.rejected))
    scorer = reward_from_pretrained(run / "reward" / "export")
    chosen, rejected = (
        score_texts(scorer, [dialogue(pair[0], pair[side]) for pair in pairs], batch_size=256) for side in (1, 2)
    )
    sums = np.array([len(re.findall(r"\d+", prompt)) == 2 for prompt, _, _ in pairs])
    right = chosen > rejected
    return {"pairs": len(pairs), "accuracy": float(right.mean()), "sums": float(right[sums].mean())}


def dialogue(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    main()
