"""A small case of PPO that TRL's trainer and ours both compute: four random models, and answers of two kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

PAD, EOS, VOCAB, ROWS, PROMPT, ANSWER = 0, 1, 24, 8, 4, 6
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
IDS = dict(vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=EOS, max_position_embeddings=16)
MODELS = {"policy": False, "reference": False, "value": True, "reward": True}  # whether it has a scalar head


@dataclass(frozen=True)
class Settings:
    """The settings of both trainers, and which answers they learn from."""

    ended: bool  # answers end by EOS after 1 to ANSWER tokens, except two that are cut; else all are cut
    gamma: float
    lam: float
    estimator: str  # of the KL penalty: "k1" or "k3"
    kl_coef: float = 0.3
    clip: float = 0.2
    value_clip: float = 0.1
    missing_eos_penalty: float = 0.5
    temperature: float = 0.7


CASES = {
    # TRL places the score one token after an answer that ended, with a value of its own there, which gamma and lambda
    # discount; at 1 and 1 the advantages are those of a score on the EOS itself.
    "ended": Settings(ended=True, gamma=1.0, lam=1.0, estimator="k3"),
    "cut": Settings(ended=False, gamma=0.95, lam=0.9, estimator="k1"),
}


def prompts() -> np.ndarray:
    """[ROWS, PROMPT] int64, padded on the left."""
    tokens = np.random.RandomState(0).randint(2, VOCAB, (ROWS, PROMPT))
    return np.where(np.arange(PROMPT) >= np.array([0, 1, 2, 0, 3, 1, 0, 2])[:, None], tokens, PAD)


def answers(settings: Settings) -> np.ndarray:
    """[ROWS, ANSWER] int64, padded on the right, EOS included."""
    tokens = np.random.RandomState(1).randint(2, VOCAB, (ROWS, ANSWER))
    if not settings.ended:
        return tokens
    lengths = np.array([6, 1, 3, 2, 5, 6, 4, 6])[:, None]
    at = np.arange(ANSWER)
    is_last = (at == lengths - 1) & (np.arange(ROWS) > 1)[:, None] | (at == lengths - 1) & (lengths < ANSWER)
    return np.where(at < lengths, np.where(is_last, EOS, tokens), PAD)


def noise(*shape: int) -> np.ndarray:
    """Float32 noise, by which what was sampled differs from what trains."""
    return np.random.RandomState(2).normal(0, 0.3, shape).astype(np.float32)


def torch_model(name: str) -> Any:
    """One of MODELS in torch, float32, with weights that depend on the names of its parameters alone."""
    import torch
    import transformers

    config = transformers.LlamaConfig(**SIZES, **IDS, **({"num_labels": 1} if MODELS[name] else {}))
    kind = transformers.LlamaForSequenceClassification if MODELS[name] else transformers.LlamaForCausalLM
    model = kind._from_config(config, attn_implementation="eager").float()
    chance = np.random.RandomState(list(MODELS).index(name))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            values = chance.normal(0, 0.25, tuple(parameter.shape)) + (parameter.ndim == 1)
            parameter.copy_(torch.tensor(values, dtype=torch.float32))
    return model
