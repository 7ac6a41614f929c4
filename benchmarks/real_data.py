"""Real dialogues, a random OPT with 10M parameters, LoRA, 8 simulated devices: train, then check the export in torch.

    pip install torch==2.13.0
    python -m benchmarks.real_data [key=value ...]

Needs the data that configs/real_data.toml names.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from benchmarks.provenance import record
from rlhf_jax.stages.from_scratch import train_tokenizer

CONFIG = "configs/real_data.toml"
BASE, RUN = Path("runs/opt-10m"), Path("runs/real_data")
SOURCES = [Path(f"../shared/data/{name}/train.jsonl") for name in ("hh-rlhf-harmless", "alpaca-eval-preferences")]


def main(overrides: list[str]) -> None:
    missing = [str(path) for path in SOURCES if not path.exists()]
    if missing:
        sys.exit(f"skipped: {', '.join(missing)} not there")
    if not BASE.exists():
        make_base()
    devices = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "rlhf_jax", "train", CONFIG, *overrides]
    subprocess.run(command, env={**os.environ, "XLA_FLAGS": devices}, check=True)
    record("real_data", {**training_numbers(), **parity()})


def make_base() -> None:
    """Writes a random OPT made by transformers, and a tokenizer trained on the data."""
    texts = [json.loads(line)["chosen"] for path in SOURCES for line in path.open()]
    tokenizer = train_tokenizer(texts, 8192)
    torch.manual_seed(0)
    sizes = dict(hidden_size=320, ffn_dim=1280, num_hidden_layers=6, num_attention_heads=8, word_embed_proj_dim=320)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model = OPTForCausalLM(
        OPTConfig(vocab_size=len(tokenizer), max_position_embeddings=512, init_std=0.08, **sizes, **ids)
    )
    model.save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    print(f"{BASE}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


def records(stage: str, key: str) -> list[float]:
    lines = (RUN / stage / "metrics.jsonl").read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]


def training_numbers() -> dict[str, float]:
    losses, scores = records("sft", "held_out_loss"), records("ppo", "score_mean")
    return {
        "sft_held_out_loss_before": losses[0],
        "sft_held_out_loss_after": losses[-1],
        "reward_held_out_accuracy_before": records("reward", "held_out_accuracy")[0],
        "reward_held_out_accuracy_after": records("reward", "held_out_accuracy")[-1],
        "reward_longer_is_chosen": records("reward", "held_out_longer_is_chosen")[-1],
        "ppo_score_first_five": float(np.mean(scores[:5])),
        "ppo_score_last_five": float(np.mean(scores[-5:])),
    }


def parity() -> dict[str, float]:
    """Compares the exported actor here and in torch transformers: logits, and greedy answers to eight real prompts."""
    import jax

    import rlhf_jax

    folder = RUN / "ppo" / "export"
    ours = rlhf_jax.from_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    with (RUN / "ppo" / "rollouts" / "000001.jsonl").open() as lines:
        prompts = [json.loads(line)["prompt"] for line in itertools.islice(lines, 8)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    ids, mask = batch.input_ids.numpy(), batch.attention_mask.numpy()
    with torch.no_grad():
        wanted = theirs(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.numpy()
        answers = theirs.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=48
        )[:, ids.shape[1] :].numpy()
    got = np.asarray(rlhf_jax.apply(ours, ids, mask))
    real = mask.astype(bool)
    error = float(np.abs(got[real] - wanted[real]).max() / np.abs(wanted[real]).max())
    sample = rlhf_jax.SampleConfig(max_new_tokens=48, temperature=0.0)
    rollout = rlhf_jax.generate(ours, ids, mask, sample, jax.random.key(0))
    tokens, kept = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    same = [bool((tokens[i][kept[i]] == answers[i][: kept[i].sum()]).all()) for i in range(len(prompts))]
    assert error < 2e-4, error
    assert all(same), same
    return {"logits_relative_error": error, "greedy_answers_identical": float(np.mean(same))}


if __name__ == "__main__":
    main(sys.argv[1:])
