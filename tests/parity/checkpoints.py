"""Tiny random checkpoints of every family, made by transformers, in which every weight has an effect."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import variants_gpt
import variants_llama

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VARIANTS = variants_gpt.VARIANTS | variants_llama.VARIANTS
assert len(VARIANTS) == len(variants_gpt.VARIANTS) + len(variants_llama.VARIANTS), "duplicate names"

EOS, PAD = 0, 1
SPECIAL = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": EOS}
SHOWN = dict(rms_norm_eps=1e-2, layer_norm_eps=1e-2, layer_norm_epsilon=1e-2, router_aux_loss_coef=0.1)
# Seeds of variants whose answers with seed 0 repeat one token or have two so close that rounding could swap them.
SEEDS = dict.fromkeys(
    ["gpt_neo", "gpt_neox-serial-whole-head", "mixtral-tied", "phi3-window", "qwen2-window", "stablelm-biased"], 1
) | {"opt-350m": 4}


def torch_model(name: str, *, scalar_head: bool = False, seed: int = 0):
    """The float32 torch model of this variant in evaluation mode, with every parameter random."""
    return build(VARIANTS[name] | SPECIAL, scalar_head=scalar_head, seed=SEEDS.get(name, seed))


def build(settings: dict, *, scalar_head: bool = False, seed: int = 0):
    """The torch model of config settings with "model_type"; the values of `SHOWN` make small effects visible."""
    config = transformers.AutoConfig.for_model(**SPECIAL | settings | ({"num_labels": 1} if scalar_head else {}))
    for key, value in SHOWN.items():
        if hasattr(config, key) and key not in settings:
            setattr(config, key, value)
    auto = transformers.AutoModelForSequenceClassification if scalar_head else transformers.AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention(config), dtype=torch.float32).eval()
    randomise(model, seed)
    return model


def attention(config) -> str:
    """The eager implementation, except for Falcon, where that of transformers 5.23 adds ALiBi twice to the scores."""
    return "sdpa" if config.model_type == "falcon" else "eager"


@torch.no_grad()
def randomise(model, seed: int) -> None:
    """Draw every parameter, at scales at which attention, positions and each bias change the logits.

    The residual stream consists mostly of what the layers add, not of the embedding: with a tied head the likeliest
    next token would otherwise repeat the last one, whatever the layers compute.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = 0.1 if model.config.model_type.startswith("gemma") else 0.3  # Gemma multiplies embeddings by 8
    drawn = set()
    for module in model.modules():
        kind = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in drawn:  # the tied head
                continue
            drawn.add(parameter)
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                value = 0.2 * noise
            elif parameter.ndim == 1:
                value = 1.0 + 0.3 * noise
            elif isinstance(module, torch.nn.Embedding) or module is model.get_output_embeddings():
                value = embedding * noise
            else:
                inputs = parameter.shape[0] if kind == "Conv1D" else parameter.shape[-1]
                value = (3.0 if "Router" in kind else 2.0) * inputs**-0.5 * noise
            parameter.copy_(value)


def checkpoint(name: str, folder: Path, *, scalar_head: bool = False, seed: int = 0):
    """The torch model of this variant, saved to `folder`."""
    model = torch_model(name, scalar_head=scalar_head, seed=seed)
    model.save_pretrained(folder)
    return model


def load(auto, folder: Path):
    """The model that transformers reads from `folder`, where every tensor must match."""
    config = transformers.AutoConfig.from_pretrained(folder)
    program = attention(config)
    model, report = auto.from_pretrained(folder, config=config, attn_implementation=program, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    return model.eval()


def padded_rows(side: str, vocab: int, lengths=(12, 11, 9, 6, 4, 3, 2, 1), width: int = 12):
    """Ids and mask [rows, width]; "none": every row has `width` real tokens. No real token is PAD or EOS."""
    rng = np.random.default_rng(1)
    ids = rng.integers(3, vocab, size=(len(lengths), width))
    lengths = np.asarray(lengths) if side != "none" else np.full(len(lengths), width)
    place = np.arange(width) if side != "left" else np.arange(width)[::-1]
    mask = place[None] < lengths[:, None]
    return np.where(mask, ids, PAD), mask


def torch_inputs(model, ids: np.ndarray, mask: np.ndarray) -> dict:
    """Arguments for `model`; models with position ids receive them, as from `generate`."""
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask.astype(np.int64))}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    return inputs


def torch_logits(model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits [rows, width, vocabulary], or scores [rows, 1] of a scalar head."""
    with torch.no_grad():
        return model(**torch_inputs(model, ids, mask)).logits.numpy()


def chosen_experts(model, ids: np.ndarray, mask: np.ndarray, real: np.ndarray):
    """[L, X] bool, the experts that receive a token at a `real` position; asserts that no choice is a near tie.

    None for a model without experts.
    """
    if not hasattr(model.config, "num_experts_per_tok"):
        return None
    with torch.no_grad():
        routed = model(**torch_inputs(model, ids, mask), output_router_logits=True).router_logits
    chosen = []
    for logits in routed:  # [rows x width, X] of one layer
        logits = logits.numpy()[real.reshape(-1)]
        order = np.argsort(-logits, axis=1)
        ranked = np.take_along_axis(logits, order, axis=1)
        last = model.config.num_experts_per_tok
        if last < ranked.shape[1]:
            assert (ranked[:, last - 1] - ranked[:, last]).min() > 1e-3, "rounding could choose another expert"
        chosen.append(np.isin(np.arange(logits.shape[1]), order[:, :last]))
    return np.stack(chosen)


def assert_close(ours, theirs, relative=2e-4):
    """Asserts equality to `relative` times the largest element of each vector."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    error = np.max(np.abs(ours - theirs) / np.abs(theirs).max(-1, keepdims=True))
    assert error <= relative, f"relative error {error:.1e}"
