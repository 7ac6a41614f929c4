"""The examples of docs/library.md, run as they are printed on a small random model."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from tiny_tokenizer import gpt2_like

import rlhf_jax
from rlhf_jax.data.chat_template import prepare_tokenizer
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.pretrained import Pretrained, save_pretrained
from rlhf_jax.stages.from_scratch import make_hf_config
from rlhf_jax.stages.models import NewModelConfig

README, TEXT = (
    (Path(__file__).parents[1] / name).read_text(encoding="utf-8") for name in ("README.md", "docs/library.md")
)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLES = [code for code in PYTHON.findall(TEXT) if "STEPS" in code]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the folder "model"."""
    tokenizer = gpt2_like(pad_token="<s>")
    sizes = NewModelConfig(
        len(tokenizer), 32, num_layers=2, num_heads=2, num_kv_heads=2, mlp_size=48, max_positions=160
    )
    hf = make_hf_config(sizes, len(tokenizer)) | {"eos_token_id": tokenizer.eos_token_id}
    config, mesh = decoder_config(hf, scalar_head=False), tiny.mesh_of("one")
    params = tiny.random_params(config, mesh)
    save_pretrained(Pretrained(config, params, tokenizer, hf, {}, Layout(mesh, TRAIN)), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_public_name_exists_with_a_docstring_and_is_in_the_document():
    assert sorted(rlhf_jax.__all__) == rlhf_jax.__all__
    for name in rlhf_jax.__all__:
        assert getattr(rlhf_jax, name).__doc__, name
        assert re.search(rf"\b{name}\b", TEXT), f"docs/library.md does not name {name}"
    methods = [
        name for name in vars(rlhf_jax.Engine) if not name.startswith("_") and callable(getattr(rlhf_jax.Engine, name))
    ]
    assert [name for name in methods if f"| `{name}(" not in TEXT or not getattr(rlhf_jax.Engine, name).__doc__] == []


def test_every_public_name_has_for_type_checkers_the_import_that_happens_when_it_is_asked_for():
    (block,) = [node for node in ast.parse(Path(rlhf_jax.__file__).read_text()).body if isinstance(node, ast.If)]
    imports = [(node.module, alias) for node in block.body for alias in node.names]
    for module, alias in imports:
        found = importlib.import_module(module)
        expected = getattr(found, alias.name, None) or importlib.import_module(f"{module}.{alias.name}")
        assert getattr(rlhf_jax, alias.asname) is expected, alias.asname
    assert sorted(alias.asname for _, alias in imports) == rlhf_jax.__all__
    assert set(rlhf_jax.__all__) < set(dir(rlhf_jax))
    with pytest.raises(AttributeError, match="'rlhf_jax' has no attribute 'from_trained'"):
        rlhf_jax.from_trained  # noqa: B018


def test_importing_the_package_and_reading_a_command_line_import_no_jax_no_transformers_and_no_torch():
    code = """import sys, rlhf_jax
from rlhf_jax.cli import parse_args
assert parse_args(["train", "mine.toml", "sft.steps=3"]).overrides == ["sft.steps=3"]
print({"jax", "numpy", "optax", "orbax", "tokenizers", "torch", "transformers"} & sys.modules.keys())
from rlhf_jax import from_pretrained
print({"orbax", "torch", "transformers"} & sys.modules.keys())
import rlhf_jax.train
print({"torch", "transformers"} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n" * 3


def test_the_short_examples_of_the_document_and_the_readme_run(folder, capsys):
    model = rlhf_jax.from_pretrained("model")
    prepare_tokenizer(model.tokenizer)
    rlhf_jax.save_pretrained(model, "runs/demo/ppo/export")
    config = decoder_config(model.hf_config, scalar_head=True)
    params = tiny.random_params(config, tiny.mesh_of("one"))
    scorer = Pretrained(config, params, model.tokenizer, model.hf_config, {}, model.layout)
    rlhf_jax.save_pretrained(scorer, "runs/demo/reward/export")
    short = [code for text in (README, TEXT) for code in PYTHON.findall(text) if code not in EXAMPLES]
    assert len(short) == 2
    for code in short:
        exec(code, {})
    answers = capsys.readouterr().out.splitlines()
    assert (
        answers[-1] == f"(1, {answers[-1].split(', ')[1]}, {config.vocab_size})"
        and (folder / "copy/config.json").exists()
    )


def test_the_examples_have_at_most_40_and_60_lines():
    assert [len(code.splitlines()) <= limit for code, limit in zip(EXAMPLES, (40, 60), strict=True)] == [True, True]


def test_the_reward_of_the_grpo_loop_rises_and_its_export_is_the_policy(folder, capsys):
    names = {}
    exec(EXAMPLES[0], names)
    rewards = names["rewards"]
    assert len(rewards) == 20 and len(capsys.readouterr().out.splitlines()) == 20
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.15, rewards
    batch, engine = rlhf_jax.pad_rows(names["rows"]), names["engine"]
    trained = rlhf_jax.from_pretrained(folder / "trained")
    np.testing.assert_allclose(engine.score(trained, batch), engine.score(names["state"], batch), atol=1e-5)
    assert np.abs(engine.score(names["model"], batch) - engine.score(trained, batch)).max() > 0.1


def test_the_turns_are_learned_from_the_sampled_tokens_alone_and_the_reward_rises(folder):
    names, sampled = {}, []
    original = rlhf_jax.Engine.sample

    def sample(engine, weights, contexts, *args):
        answers = original(engine, weights, contexts, *args)
        sampled.append(([list(context) for context in contexts], answers))
        return answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf_jax.Engine, "sample", sample)
        exec(EXAMPLES[1], names)
    rewards, tokenizer, batch = names["rewards"], names["model"].tokenizer, names["batch"]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05, rewards
    assert len(sampled) == 12 * 3
    for index in range(16):
        tokens, mask, logprobs = list(names["task"]), [False] * len(names["task"]), [0.0] * len(names["task"])
        for contexts, answers in sampled[-3:]:
            assert contexts[index] == tokens, "the next turn reads exactly the tokens before it"
            answer = answers[index]
            text = tokenizer.decode(answer.tokens, skip_special_tokens=True).lower()
            result = tokenizer.encode(f"\n\nTool: {sum(map(text.count, 'aeiou'))} vowels\n\nAssistant:")
            tokens += answer.tokens + result
            mask += [True] * len(answer.tokens) + [False] * len(result)
            logprobs += answer.logprobs + [0.0] * len(result)
        size = batch["mask"][index].sum()
        assert batch["tokens"][index][:size].tolist() == tokens and not batch["tokens"][index][size:].any()
        assert batch["loss_mask"][index][:size].tolist() == mask and not batch["loss_mask"][index][size:].any()
        np.testing.assert_array_equal(batch["sampled"][index][:size], np.float32(logprobs))
    state, meta = names["engine"].load_state("run", names["model"])
    assert meta == {"step": 11} and int(state.train.step) == 12
    jax.tree.map(np.testing.assert_array_equal, state.train, names["state"].train)
