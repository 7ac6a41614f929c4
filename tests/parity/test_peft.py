"""LoRA adapters in PEFT's format: adapters saved by PEFT compute the same here, and those saved here do in PEFT."""

import dataclasses
import functools
import json

import jax
import numpy as np
import peft
import pytest
from checkpoints import assert_close, checkpoint, load, padded_rows, torch, torch_inputs, torch_logits, transformers
from safetensors.numpy import load_file, save_file

from rlhf_jax.mesh import MeshConfig, make_mesh
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.lora import LoraConfig, is_adapter, merge_adapters
from rlhf_jax.models.pretrained import apply, from_pretrained, reward_from_pretrained, save_adapter, score

# Every warning fails the tests, so PEFT loads our files without one; this one is between PEFT and transformers.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")]

# Modules to adapt, by the names that users give to PEFT: fused, grouped and plain ones.
TARGETS = {
    "opt": ["q_proj", "v_proj", "out_proj", "fc2"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "codegen": ["qkv_proj", "out_proj", "fc_in"],
    "bloom": ["query_key_value", "dense_h_to_4h"],
    "falcon-7b": ["query_key_value", "dense"],
    "falcon-40b": ["query_key_value", "dense", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"],
    "mixtral": ["q_proj", "o_proj"],
}
SCALAR = ("opt", "gpt2", "gpt_neox", "phi3", "llama")
LORA = LoraConfig(rank=3, alpha=5.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(name, scalar_head) -> the folder of a tiny checkpoint."""

    @functools.cache
    def make(name, scalar_head=False):
        folder = tmp_path_factory.mktemp("base") / name
        checkpoint(name, folder, scalar_head=scalar_head)
        return folder

    return make


def torch_base(folder, scalar_head=False):
    kind = transformers.AutoModelForSequenceClassification if scalar_head else transformers.AutoModelForCausalLM
    return load(kind, folder)


def peft_adapter(base, folder, *, scalar_head=False, **settings):
    """The torch model with a random adapter that PEFT created from these settings and saved to `folder`."""
    model = torch_base(base, scalar_head)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "SEQ_CLS" if scalar_head else "CAUSAL_LM"} | settings
    settings["fan_in_fan_out"] = model.config.model_type == "gpt2"
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def our_adapter(base, lora, *, scalar_head=False, mesh=None):
    """This package's model with random separate adapters."""
    model = (reward_from_pretrained if scalar_head else from_pretrained)(base, mesh=mesh)
    rng = np.random.default_rng(2)
    params = dict(model.params)
    config = dataclasses.replace(model.config, lora=lora)
    for path, leaf in abstract_params(config).items():
        if is_adapter(path):
            params[path] = model.layout.put(0.3 * rng.standard_normal(leaf.shape, np.float32), *leaf.axes)
    return dataclasses.replace(model, config=config, params=params)


def same_logits(model, theirs):
    ids, mask = padded_rows("right", model.config.vocab_size)
    logits, expected = np.asarray(apply(model, ids, mask)), torch_logits(theirs, ids, mask)
    assert_close(logits[mask], expected[mask])
    with theirs.disable_adapter():  # an adapter without effect would make the equality trivial
        plain = torch_logits(theirs, ids, mask)
    assert np.abs(plain[mask] - expected[mask]).max() > 0.05 * np.abs(expected[mask]).max()


def same_scores(model, theirs):
    ids, mask = padded_rows("right", model.config.vocab_size)
    with torch.no_grad():
        expected = theirs(**torch_inputs(theirs, ids, mask)).logits.numpy()[:, 0]
    assert_close(score(model, ids, mask), expected)


def same_params(left, right):
    assert left.config == right.config and left.params.keys() == right.params.keys()
    for path in left.params:
        np.testing.assert_array_equal(left.params[path], right.params[path], err_msg=path)


# ---- Adapters saved by PEFT, loaded here


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_saved_by_peft_gives_the_same_logits(name, base, tmp_path):
    theirs = peft_adapter(base(name), tmp_path / "adapter", target_modules=TARGETS[name])
    model = from_pretrained(base(name), tmp_path / "adapter")
    assert model.config.lora.rank == 4 and model.config.lora.alpha == 8.0
    same_logits(model, theirs)


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "mixtral"])
def test_all_linear_with_rank_stabilised_scale_gives_the_same_logits(name, base, tmp_path):
    theirs = peft_adapter(base(name), tmp_path / "adapter", target_modules="all-linear", use_rslora=True)
    model = from_pretrained(base(name), tmp_path / "adapter")
    adapted = {path.split("/")[2] for path in model.params if is_adapter(path)}
    assert (
        adapted
        == set(model.config.lora.targets)
        == {"q", "k", "v", "o", "up", "down"} | ({"gate"} if model.config.gated_mlp else set())
    )
    assert model.config.lora.alpha == 8 * 4 / 4**0.5
    same_logits(model, theirs)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_ranks_and_scales_of_single_modules_and_layers_give_the_same_logits(name, rslora, base, tmp_path):
    first, *_, last = TARGETS[name]
    theirs = peft_adapter(
        base(name),
        tmp_path / "adapter",
        target_modules=TARGETS[name],
        use_rslora=rslora,
        rank_pattern={rf"\w+\.1\..*{first}": 6, last: 2},
        alpha_pattern={rf".*\.0\..*\.{first}": 32, rf"^.*{last}": 1},
    )
    model = from_pretrained(base(name), tmp_path / "adapter")
    assert model.config.lora.rank == 6
    same_logits(model, theirs)


@pytest.mark.parametrize("name", TARGETS)
def test_layers_without_an_adapter_get_a_zero_adapter(name, base, tmp_path):
    settings = {"target_modules": TARGETS[name], "layers_to_transform": [1]}
    theirs = peft_adapter(base(name), tmp_path / "adapter", **settings)
    model = from_pretrained(base(name), tmp_path / "adapter")
    for path, leaf in model.params.items():
        if is_adapter(path):
            assert not np.any(leaf[0]) and np.any(leaf[1])
    same_logits(model, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.1\.mlp\.(up|down)_proj|.*0\.self_attn\.q_proj"},
        {"target_modules": ["proj", "up_proj", "model.layers.1.self_attn.v_proj"]},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj", "model.layers.1.self_attn.v_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.5},
        {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
    ],
)
def test_target_modules_match_as_in_peft(settings, base, tmp_path):
    theirs = peft_adapter(base("llama"), tmp_path / "adapter", **settings)
    same_logits(from_pretrained(base("llama"), tmp_path / "adapter"), theirs)


def test_the_name_all_linear_selects_every_linear_layer(base, tmp_path):
    theirs = peft_adapter(base("llama"), tmp_path / "adapter", target_modules="all-linear")
    change(tmp_path / "adapter", target_modules="all-linear")
    same_logits(from_pretrained(base("llama"), tmp_path / "adapter"), theirs)


def test_tensor_names_with_the_adapter_name_and_other_dtypes_are_read(base, tmp_path):
    peft_adapter(base("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    plain = from_pretrained(base("llama"), tmp_path / "adapter")
    rename(tmp_path / "adapter", lambda name: name.replace(".weight", ".default.weight"))
    same_params(plain, from_pretrained(base("llama"), tmp_path / "adapter"))
    rename(tmp_path / "adapter", dtype=np.float16)
    half = from_pretrained(base("llama"), tmp_path / "adapter")
    a = "layers/attention/q/lora_a"
    np.testing.assert_array_equal(half.params[a], np.asarray(plain.params[a]).astype(np.float16).astype(np.float32))


def test_a_fused_adapter_is_unchanged_after_a_round_trip(base, tmp_path):
    peft_adapter(base("phi3"), tmp_path / "theirs", target_modules=TARGETS["phi3"])
    save_adapter(from_pretrained(base("phi3"), tmp_path / "theirs"), tmp_path / "ours", base="x")
    theirs, ours = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(theirs[name], ours[name])


def test_a_fused_adapter_of_some_layers_keeps_its_rank_after_its_parts_have_diverged(base, tmp_path):
    settings = {"target_modules": TARGETS["phi3"], "layers_to_transform": [1]}
    peft_adapter(base("phi3"), tmp_path / "theirs", **settings)
    model = from_pretrained(base("phi3"), tmp_path / "theirs")
    key = jax.random.key(0)
    trained = {path: leaf * jax.random.normal(key, leaf.shape) for path, leaf in model.params.items()}
    params = {path: trained[path] if is_adapter(path) else leaf for path, leaf in model.params.items()}
    params["layers/attention/q/lora_a"] *= 2.0
    model = dataclasses.replace(model, params=params)
    save_adapter(model, tmp_path / "ours", base="x")
    same_params(model, from_pretrained(base("phi3"), tmp_path / "ours"))


def test_a_zero_adapter_is_rejected(base, tmp_path):
    peft_adapter(base("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    rename(tmp_path / "adapter", scale=0.0)
    with pytest.raises(ValueError, match="is zero: load the base without it"):
        from_pretrained(base("llama"), tmp_path / "adapter")


# ---- Adapters saved here, loaded by PEFT


@pytest.mark.parametrize("name", TARGETS)
def test_an_exported_adapter_gives_the_same_logits_in_peft(name, base, tmp_path):
    model = our_adapter(base(name), LORA)
    save_adapter(model, tmp_path / "adapter", base=str(base(name)))
    same_logits(model, peft.PeftModel.from_pretrained(torch_base(base(name)), str(tmp_path / "adapter")))
    linears = [path.split("/")[2] for path in model.params if path.endswith("lora_a")]
    lora = dataclasses.replace(LORA, targets=tuple(one for one in LORA.targets if one in linears))
    wanted = dataclasses.replace(model, config=dataclasses.replace(model.config, lora=lora))
    same_params(wanted, from_pretrained(base(name), tmp_path / "adapter"))


@pytest.mark.parametrize("targets", [("v",), ("q", "v", "down"), ("k", "up")])
@pytest.mark.parametrize("name", ["gpt2", "falcon-40b", "phi3", "llama"])
def test_single_linears_of_a_fused_module_can_be_adapted(name, targets, base, tmp_path):
    model = our_adapter(base(name), LoraConfig(rank=2, alpha=8.0, targets=targets))
    save_adapter(model, tmp_path / "adapter", base=str(base(name)))
    same_logits(model, peft.PeftModel.from_pretrained(torch_base(base(name)), str(tmp_path / "adapter")))
    same_params(model, from_pretrained(base(name), tmp_path / "adapter"))


def test_merged_adapters_equal_separate_adapters(base, tmp_path):
    peft_adapter(base("phi3"), tmp_path / "adapter", target_modules="all-linear", rank_pattern={"qkv_proj": 7})
    model = from_pretrained(base("phi3"), tmp_path / "adapter")
    merged = dataclasses.replace(
        model, params=merge_adapters(model.params, model.config.lora), config=model.config.without_lora()
    )
    ids, mask = padded_rows("right", model.config.vocab_size)
    assert_close(np.asarray(apply(merged, ids, mask))[mask], np.asarray(apply(model, ids, mask))[mask])


@pytest.mark.parametrize("name", ["llama", "falcon-40b"])
def test_adapters_are_read_and_written_sharded_over_a_mesh(name, base, tmp_path):
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    model = our_adapter(base(name), LORA, mesh=mesh)
    save_adapter(model, tmp_path / "adapter", base="x")
    split, whole = (from_pretrained(base(name), tmp_path / "adapter", mesh=m) for m in (mesh, None))
    same_params(split, whole)
    b = split.params["layers/attention/q/lora_b"]
    assert b.sharding.is_equivalent_to(model.params["layers/attention/q/lora_b"].sharding, 3)
    assert not b.is_fully_replicated


# ---- Scalar heads


@pytest.mark.parametrize("name", SCALAR)
def test_an_adapter_of_a_classifier_carries_its_head_in_both_directions(name, base, tmp_path):
    source = base(name, True)
    theirs = peft_adapter(source, tmp_path / "theirs", scalar_head=True, target_modules=TARGETS[name])
    model = reward_from_pretrained(source, tmp_path / "theirs")
    same_scores(model, theirs)
    with pytest.raises(ValueError, match="scalar head: load it with reward_from_pretrained"):
        from_pretrained(base(name), tmp_path / "theirs")

    ours = our_adapter(source, LORA, scalar_head=True)
    ours.params["score/kernel"] = 3.0 * ours.params["score/kernel"]
    save_adapter(ours, tmp_path / "ours", base=str(source))
    same_scores(ours, peft.PeftModel.from_pretrained(torch_base(source, True), str(tmp_path / "ours")))
    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "ours"), num_labels=1)
    same_scores(ours, auto.eval())
    same_scores(reward_from_pretrained(source, tmp_path / "ours"), auto)


def test_an_adapter_of_a_language_model_keeps_the_scalar_head_of_the_base(base, tmp_path):
    peft_adapter(base("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    plain, adapted = (reward_from_pretrained(base("llama", True), adapter) for adapter in (None, tmp_path / "adapter"))
    np.testing.assert_array_equal(plain.params["score/kernel"], adapted.params["score/kernel"])
    change(tmp_path / "adapter", modules_to_save=["score"])
    with pytest.raises(ValueError, match="missing: score"):
        reward_from_pretrained(base("llama", True), tmp_path / "adapter")


@pytest.mark.parametrize("file", ["value_head.safetensors", "value_head.bin", "pytorch_model.bin"])
def test_a_head_of_values_next_to_an_adapter_is_its_scalar_head_and_is_logged_elsewhere(file, base, tmp_path, caplog):
    theirs = peft_adapter(base("llama"), tmp_path / "adapter", target_modules=["q_proj"])
    head = np.random.default_rng(0).standard_normal((1, theirs.config.hidden_size)).astype(np.float32)
    heads = {"v_head.summary.weight": head, "v_head.summary.bias": np.full(1, 0.75, np.float32)}
    if file.endswith(".bin"):
        torch.save({name: torch.tensor(array) for name, array in heads.items()}, tmp_path / "adapter" / file)
    else:
        save_file(heads, tmp_path / "adapter" / file)
    model = reward_from_pretrained(base("llama"), tmp_path / "adapter")
    np.testing.assert_array_equal(model.params["score/kernel"], head.T)
    assert f"{file}: v_head.summary.bias (0.75) is left out" in caplog.text
    assert "starts at random" not in caplog.text
    same_logits(from_pretrained(base("llama"), tmp_path / "adapter"), theirs)
    assert f"{file}: v_head.summary.bias, v_head.summary.weight left out" in caplog.text


# ---- Rejected adapters


def change(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rename(folder, renamed=lambda name: name, *, dtype=np.float32, scale=1.0, drop=(), **more):
    path = folder / "adapter_model.safetensors"
    kept = {name: array for name, array in load_file(path).items() if name not in drop}
    save_file({renamed(name): (scale * array).astype(dtype) for name, array in kept.items()} | more, path)


@pytest.fixture
def adapter(base, tmp_path):
    peft_adapter(base("llama"), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["embed_tokens"]},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"trainable_token_indices": [3]},
        {"alora_invocation_tokens": [1, 2]},
        {"use_qalora": True},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"a_setting_of_tomorrow": {"on": 1}},
    ],
)
def test_settings_beyond_plain_lora_are_rejected_by_name(settings, base, adapter):
    change(adapter, **settings)
    ((key, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{key}.*merge it into its base") as error:
        from_pretrained(base("llama"), adapter)
    assert str(value) in str(error.value) or json.dumps(value) in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_embeddings_are_rejected_by_name(base, tmp_path):
    peft_adapter(base("llama"), tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ValueError, match="changes .*embed_tokens.* merge it into its base"):
        from_pretrained(base("llama"), tmp_path / "adapter")


# ---- What an adapter changes in its base


@pytest.mark.parametrize(
    ("name", "settings", "changed"),
    [
        ("mixtral", {"target_modules": "all-linear"}, "experts/down experts/gate experts/up router"),
        (
            "qwen3_moe",
            {"target_modules": "all-linear", "use_rslora": True},
            "experts/down experts/gate experts/up router",
        ),
        (
            "mixtral",
            {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "alpha_pattern": {"down_proj": 20}},
            "experts/down",
        ),
        (
            "mixtral",
            {"target_modules": ["q_proj"], "target_parameters": ["o_proj.weight", "gate_up_proj"]},
            "experts/gate experts/up",
        ),
        ("opt-350m", {"target_modules": "all-linear"}, "project_in project_out"),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, "head"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, "head tokens"),
        (
            "llama-tied",
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            "tokens",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_an_adapter_changes_besides_linears_is_merged_and_gives_the_same_logits(
    name, settings, changed, base, tmp_path
):
    theirs = peft_adapter(base(name), tmp_path / "adapter", **settings)
    model = from_pretrained(base(name), tmp_path / "adapter")
    paths = {path.removeprefix("layers/").removeprefix("embed/").removesuffix("/kernel") for path in model.changed}
    assert paths == set(changed.split())
    same_logits(model, theirs)
    with pytest.raises(ValueError, match="use save_pretrained"):
        save_adapter(model, tmp_path / "ours", base="x")


@pytest.mark.filterwarnings("ignore")
def test_embeddings_that_an_adapter_repeats_are_logged_and_resized_or_untied_ones_rejected(base, tmp_path, caplog):
    def save_with_embedding(name, change, **settings):
        model = peft_adapter(base(name), tmp_path / "adapter", target_modules=["q_proj"], **settings)
        weights = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(weights)
        embedding = "base_model.model.model.embed_tokens.weight"
        tensors[embedding] = change(model.get_input_embeddings().weight.detach().numpy())
        save_file(tensors, weights)
        return model

    with caplog.at_level("INFO"):
        theirs = save_with_embedding("llama", lambda embedding: embedding)
        model = from_pretrained(base("llama"), tmp_path / "adapter")
    assert "has embed/tokens as in the base" in caplog.text and model.changed == ()
    same_logits(model, theirs)
    save_with_embedding("llama", lambda embedding: np.concatenate([embedding, embedding[:1]]))
    with pytest.raises(ValueError, match="resized the vocabulary of its base from 150 to 151 tokens: merge it"):
        from_pretrained(base("llama"), tmp_path / "adapter")
    peft_adapter(base("llama-tied"), tmp_path / "split", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="changes one of embedding and head, which its base ties"):
        from_pretrained(base("llama-tied"), tmp_path / "split")


def test_target_parameters_that_the_model_lacks_are_refused_with_those_that_it_has(base, adapter):
    change(adapter, target_parameters=["mlp.experts.gate_up_proj"])
    own = "mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight, self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=f"target_parameters of .* are none of this model, which are .*{own}"):
        from_pretrained(base("llama"), adapter)


def test_an_adapter_of_experts_is_refused_with_the_fix_where_the_base_is_quantised(base, tmp_path):
    settings = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    peft_adapter(base("mixtral"), tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=f"rlhf-jax import BASE NEW --adapter {tmp_path}/adapter merges it"):
        from_pretrained(base("mixtral"), tmp_path / "adapter", dtype="int8")


def test_tensors_that_do_not_fit_are_reported_all_at_once(base, adapter):
    q, v = (f"base_model.model.model.layers.{i}.self_attn.{one}_proj" for i, one in ((0, "q"), (1, "v")))
    rename(adapter, drop=[f"{q}.lora_A.weight"], **{f"{v}.lora_B.weight": np.zeros((5, 4), "f")})
    change(adapter, exclude_modules=["layers.1.self_attn.q_proj"])
    with pytest.raises(ValueError) as error:
        from_pretrained(base("llama"), adapter)
    reported = str(error.value)
    assert "missing: model.layers.0.self_attn.q_proj.lora_A;" in reported
    assert "surplus: model.layers.1.self_attn.q_proj.lora_A, model.layers.1.self_attn.q_proj.lora_B;" in reported
    assert "misshaped: model.layers.1.self_attn.v_proj.lora_B ([5, 4] in place of [" in reported


def test_an_adapter_of_another_base_is_rejected(base, adapter):
    with pytest.raises(ValueError, match=r"changes model.layers.0.self_attn.k_proj|changes model.layers.0.self_attn.q"):
        from_pretrained(base("gpt2"), adapter)
    change(adapter, target_modules=["c_attn"])
    with pytest.raises(ValueError, match="no linears of this model"):
        from_pretrained(base("llama"), adapter)


def test_tensors_of_an_unsupported_dtype_are_rejected(base, adapter):
    rename(adapter, dtype=np.float64)
    with pytest.raises(ValueError, match="are not F32, F16, BF16"):
        from_pretrained(base("llama"), adapter)


def test_an_adapter_in_a_pickle_gives_the_same_logits(base, adapter):
    ids, mask = padded_rows("right", 150)
    expected = np.asarray(apply(from_pretrained(base("llama"), adapter), ids, mask))
    weights = {name: torch.tensor(array) for name, array in load_file(adapter / "adapter_model.safetensors").items()}
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    np.testing.assert_array_equal(np.asarray(apply(from_pretrained(base("llama"), adapter), ids, mask)), expected)


def test_absent_and_damaged_files_are_reported(base, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ValueError, match="is damaged.*download it again"):
        from_pretrained(base("llama"), adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there is no .*adapter_model\.safetensors"):
        from_pretrained(base("llama"), adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        from_pretrained(base("llama"), adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no .*adapter_config\.json"):
        from_pretrained(base("llama"), adapter)
