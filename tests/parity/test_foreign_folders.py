"""Folders that hold more than config.json says, or under other names: tied heads, heads of values, whole containers."""

import json
import logging

import numpy as np
import pytest
from checkpoints import assert_close, build, padded_rows, torch, torch_logits, transformers
from safetensors.numpy import load_file, save_file

from rlhf_jax.models.pretrained import apply, from_pretrained, reward_from_pretrained, save_pretrained, score

pytestmark = pytest.mark.parity

LLAMA = dict(
    model_type="llama",
    vocab_size=150,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=40,
)
IDS, MASK = padded_rows("left", 150)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rewrite(folder, change, **keys):
    """Save `change(tensors)` as the tensors of the folder, and `keys` in its config.json."""
    weights = folder / "model.safetensors"
    save_file(change(load_file(weights)), weights, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def same_logits(folder, theirs):
    model = from_pretrained(folder)
    assert_close(np.asarray(apply(model, IDS, MASK))[MASK], torch_logits(theirs, IDS, MASK)[MASK])
    return model


def warnings_of(caplog, read, *args):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model = read(*args)
    return model, caplog.text


# ---- Tied embeddings


def test_a_tied_model_may_store_its_embedding_under_the_name_of_the_head_alone(tmp_path):
    theirs = build(LLAMA | {"tie_word_embeddings": True})
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {HEAD if n == EMBEDDING else n: t for n, t in tensors.items()})
    assert not any(name == EMBEDDING for name in load_file(tmp_path / "model.safetensors"))
    same_logits(tmp_path, theirs)
    scorer = reward_from_pretrained(tmp_path)
    np.testing.assert_array_equal(scorer.params["embed/tokens"][:150], theirs.lm_head.weight.detach())


def test_a_tied_model_with_two_different_tensors_uses_both_as_transformers_does(tmp_path, caplog):
    build(LLAMA | {"tie_word_embeddings": False}).save_pretrained(tmp_path / "source")
    rewrite(tmp_path / "source", lambda tensors: tensors, tie_word_embeddings=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    model, text = warnings_of(caplog, same_logits, tmp_path / "source", theirs)
    assert "its lm_head.weight is not its model.embed_tokens.weight: both are used" in text
    save_pretrained(model, tmp_path / "copy")
    copy, source = (load_file(tmp_path / name / "model.safetensors") for name in ("copy", "source"))
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(copy[HEAD], source[HEAD])
    _, text = warnings_of(caplog, reward_from_pretrained, tmp_path / "copy")
    assert "both are used" not in text


# ---- Heads that a model does not use


@pytest.fixture(scope="module")
def with_value_head(tmp_path_factory):
    """with_value_head(kind) -> a folder with a language model and a head of values; that model, head [64] and bias."""
    head = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    theirs = build(LLAMA)

    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        theirs.save_pretrained(folder)
        values = {"v_head.summary.weight": head[None], "v_head.summary.bias": np.full(1, 0.75, np.float32)}
        if kind == "LLaMA-Factory":
            save_file(values, folder / "value_head.safetensors")
        elif kind == "DeepSpeed-Chat":

            def change(tensors):
                base = {f"rwtransformer.{n.removeprefix('model.')}": t for n, t in tensors.items() if n != HEAD}
                return base | {"v_head.weight": head[None]}

            rewrite(folder, change)
        else:
            prefix = "pretrained_model." if kind == "TRL-wrapped" else ""
            rewrite(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()} | values)
        return folder, theirs, head, 0.0 if kind == "DeepSpeed-Chat" else 0.75

    return make


@pytest.mark.parametrize("kind", ["TRL", "TRL-wrapped", "LLaMA-Factory"])
def test_a_language_model_with_a_head_of_values_is_read_without_it_and_logs_it(kind, with_value_head, caplog):
    folder, theirs, *_ = with_value_head(kind)
    _, text = warnings_of(caplog, same_logits, folder, theirs)
    assert "v_head.summary.bias, v_head.summary.weight left out, as this model does not use them" in text


@pytest.mark.parametrize("kind", ["TRL", "TRL-wrapped", "LLaMA-Factory", "DeepSpeed-Chat"])
def test_a_head_of_values_is_the_scalar_head_of_a_reward_model_except_for_its_bias(kind, with_value_head, caplog):
    folder, theirs, head, bias = with_value_head(kind)
    model, text = warnings_of(caplog, reward_from_pretrained, folder)
    assert "starts at random" not in text
    assert ("v_head.summary.bias (0.75) is left out" in text) == bool(bias)
    with torch.no_grad():
        hidden = theirs.model(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).last_hidden_state[:, -1].numpy()
    assert_close(score(model, IDS, MASK), hidden @ head)


def test_heads_of_another_use_and_old_buffers_are_left_out_and_other_surplus_is_refused(tmp_path, caplog):
    theirs = build(LLAMA)
    theirs.save_pretrained(tmp_path)
    layer = "model.layers.0.self_attn.rotary_emb"
    old = {f"{layer}.inv_freq": np.ones(4, np.float32), "model.position_ids": np.arange(40)[None]}
    old |= {f"{layer}.cos_cached": np.ones((1, 1, 40, 8), np.float32)}
    rewrite(tmp_path, lambda tensors: tensors | old | {"score.weight": np.ones((1, 64), np.float32)})
    _, text = warnings_of(caplog, same_logits, tmp_path, theirs)
    assert "score.weight left out" in text and "inv_freq" not in text
    rewrite(tmp_path, lambda tensors: tensors | {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)})
    with pytest.raises(ValueError, match="surplus: model.layers.0.self_attn.q_norm.weight$"):
        from_pretrained(tmp_path)
