"""Which settings of a run may differ when it continues, on folders without models."""

import re
import tomllib

import pytest
import tomli_w
from tiny_recipe import write_recipe

from rlhf_jax.config import dump_config, load_config, with_defaults
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.run_folder import check_same_data, open_run


@pytest.fixture
def open_again(tmp_path):
    """open_again(*overrides) opens a run of these settings, whose SFT is finished and whose reward model has begun."""
    path = write_recipe(tmp_path)

    def open_with(*overrides):
        recipe = load_config(path, [f"run.dir={tmp_path / 'run'}", *overrides], Recipe)
        open_run(recipe.run, dump_config(recipe), Recipe)
        return recipe

    recipe = open_with()
    recipe.run.export("sft").mkdir(parents=True)
    recipe.run.folder("reward").mkdir()
    return open_with


def settings(recipe):
    return tomllib.loads((recipe.run.folder("config.toml")).read_text())


def test_a_stage_that_has_begun_goes_on_with_another_learning_rate_and_says_so(open_again, caplog):
    changed = open_again("reward.optim.learning_rate=1e-4")
    assert caplog.messages == [
        "the run goes on with another learning rate, reward.optim.learning_rate: 0.001 -> 0.0001",
    ]
    assert settings(changed)["reward"]["optim"]["learning_rate"] == 1e-4
    caplog.clear()
    open_again("reward.optim.learning_rate=1e-4")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["sft.optim.learning_rate=1e-4"], "sft.optim.learning_rate: 0.003 -> 0.0001"),  # finished
        (["reward.optim.warmup_steps=2"], "reward.optim.warmup_steps: 0 -> 2"),
        (
            ["reward.optim.learning_rate=1e-4", "reward.batch_size=16"],
            "reward.batch_size: 8 -> 16; reward.optim.learning_rate: 0.001 -> 0.0001",
        ),
    ],
)
def test_other_changes_of_a_run_that_has_begun_are_refused_and_change_nothing(open_again, tmp_path, overrides, named):
    before = (tmp_path / "run/config.toml").read_text()
    with pytest.raises(ValueError, match=re.escape(f"holds a run of another configuration ({named})")):
        open_again(*overrides)
    assert (tmp_path / "run/config.toml").read_text() == before


def test_with_overwrite_another_learning_rate_starts_over(open_again, tmp_path):
    open_again("reward.optim.learning_rate=1e-4", "run.overwrite=true")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]


def test_a_key_that_the_configuration_of_an_older_version_lacks_has_its_default(open_again, tmp_path):
    path = tmp_path / "run/config.toml"
    older = tomllib.loads(path.read_text())
    del older["run"]["seed"], older["model"]["lora"]["rank"], older["data"]["max_bad_rows"], older["ppo"]
    del older["reward"]["optim"]["clip_norm"], older["data"]["sources"][0]["weight"]
    path.write_text(tomli_w.dumps(older))
    recipe = open_again()
    assert settings(recipe)["run"]["seed"] == 0
    path.write_text(tomli_w.dumps(older))
    check_same_data(recipe.run, dump_config(recipe))
    with pytest.raises(ValueError, match=re.escape("(run.seed: 0 -> 1; reward.optim.clip_norm: 1.0 -> 2.0)")):
        open_again("run.seed=1", "reward.optim.clip_norm=2.0")


def test_a_default_is_that_of_the_parent_and_unknown_keys_stay():
    filled = with_defaults(Recipe, {"ppo": {"actor": {"warmup_steps": 3}, "gone": 1}, "data": {}})
    assert filled["ppo"]["actor"]["learning_rate"] == Recipe.ppo.actor.learning_rate
    assert filled["ppo"]["actor"]["warmup_steps"] == 3 and filled["ppo"]["gone"] == 1
