"""The table of stages, the only list of them.

A new stage is its own file, its objective, one row here, and its section in the recipe. A row names its functions
as "module:function", for `pkgutil.resolve_name`, so that reading the table imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rlhf_jax.data.records import RowKind
    from rlhf_jax.stages.context import ModelKind
    from rlhf_jax.stages.models import ModelConfig
    from rlhf_jax.stages.run_folder import RunConfig


class Sampled(NamedTuple):
    """What a stage that generates trains, for the plan: names of functions.

    Attributes:
        optimizers: (its section, optimizer steps) -> Optimizers.
        engine: (its section, models, actor, scorer, optimizers, eos_ids, layout) -> HybridEngine.
        models: (actor, scorer, models, optimizers, seed, its section) -> (EngineState, FrozenParams).
    """

    optimizers: str
    engine: str
    models: str


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        name: name of its command, its section of the configuration and its folder in the run folder.
        help: help text of its command.
        rows: kind of row that it learns from.
        share: its share of the prompts if `data.split` does not name it.
        exports: kind of model in RUN/NAME/export.
        run: name of the function (StageContext, its section of the configuration) -> None, which writes the exports.
        needs: (models, its section) -> kinds of models that it starts from, each exported by an earlier stage.
        takes: kinds of models that it starts from where an earlier stage of the run exports one.
        objective: name of the objective of a supervised stage, for the plan; "" for the others.
        sampled: models of a stage that generates, for the plan.
        more_exports: {name for `rlhf-jax export --stage`: folder in RUN/NAME} of its other exports.
    """

    name: str
    help: str
    rows: RowKind
    share: float
    exports: ModelKind
    run: str
    needs: Callable[[ModelConfig, Any], tuple[ModelKind, ...]] = lambda model, config: ()
    takes: tuple[ModelKind, ...] = ()
    objective: str = ""
    sampled: Sampled | None = None
    more_exports: Mapping[str, str] = field(default_factory=dict)


_ROWS = (
    Stage(
        name="sft",
        help="supervised fine-tuning alone",
        rows="demonstration",
        share=2.0,
        exports="policy",
        run="rlhf_jax.stages.sft:run_sft",
        objective="rlhf_jax.stages.sft:sft_objective",
    ),
    Stage(
        name="reward",
        help="the reward model alone",
        rows="pair",
        share=4.0,
        exports="scorer",
        run="rlhf_jax.stages.reward:run_reward",
        needs=lambda model, config: ("policy",) if model.reward_from_policy else (),
        objective="rlhf_jax.stages.reward:reward_objective",
    ),
    Stage(
        name="ppo",
        help="PPO alone, after a policy and a reward model in the same run folder",
        rows="prompt",
        share=4.0,
        exports="policy",
        run="rlhf_jax.stages.ppo:run_ppo",
        needs=lambda model, config: ("policy", "scorer") if config.model_weight is not None else ("policy",),
        sampled=Sampled(
            "rlhf_jax.stages.ppo:ppo_optimizers", "rlhf_jax.stages.ppo:ppo_engine", "rlhf_jax.stages.ppo:ppo_models"
        ),
        more_exports={"critic": "export_critic", "ema": "export_ema"},
    ),
    Stage(
        name="dpo",
        help="DPO alone: preference pairs without a reward model",
        rows="pair",
        share=4.0,
        exports="policy",
        run="rlhf_jax.stages.dpo:run_dpo",
        takes=("policy",),
        objective="rlhf_jax.stages.dpo:dpo_objective",
    ),
    Stage(
        name="grpo",
        help="GRPO, RLOO and their relatives alone: groups of answers, scored by a reward model or by functions",
        rows="prompt",
        share=4.0,
        exports="policy",
        run="rlhf_jax.stages.grpo:run_grpo",
        needs=lambda model, config: ("scorer",) if config.model_weight is not None else (),
        takes=("policy",),
        sampled=Sampled(
            "rlhf_jax.stages.grpo:grpo_optimizers",
            "rlhf_jax.stages.grpo:grpo_engine",
            "rlhf_jax.stages.grpo:grpo_models",
        ),
        more_exports={"grpo_ema": "export_ema"},
    ),
)
STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _ROWS}


def check_stages(names: Sequence[str], model: ModelConfig, configs: Mapping[str, Any]) -> None:
    """Raise ValueError for `run.stages` with an unknown or repeated name, or a stage without a model to start from.

    configs: {name of a stage: its section}.
    """
    if unknown := [name for name in names if name not in STAGES]:
        raise ValueError(f"run.stages names {', '.join(unknown)}; the stages are {', '.join(STAGES)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"run.stages = {list(names)}: name at least one stage, and each once")
    for name in names:
        start = sources(name, names, model, configs[name])
        if (wanted := getattr(configs[name], "start", "")) not in ("", *start.values()):
            earlier = exporters("policy", names[: names.index(name)])
            raise ValueError(f'{name}.start="{wanted}": the stages before it that export a policy are {earlier}')
        for kind in STAGES[name].needs(model, configs[name]):
            if kind not in start:
                makers = " or ".join(stage.name for stage in STAGES.values() if stage.exports == kind)
                reason = f"{name} starts from a {kind}, which no stage before it leaves"
                fix = f"put {makers} before {name}"
                if kind == "scorer" and hasattr(configs[name], "rewards"):
                    fix += f', or score by functions alone, {name}.rewards = ["FILE.py:FUNCTION"]'
                raise ValueError(f"run.stages = {list(names)}: {reason}: {fix}")


def exporters(kind: ModelKind, names: Iterable[str]) -> list[str]:
    """The names of those of these stages that export a model of this kind, in order."""
    return [name for name in names if STAGES[name].exports == kind]


def sources(name: str, names: Sequence[str], model: ModelConfig, config: Any) -> dict[ModelKind, str]:
    """{kind of model that the stage needs or takes: the latest stage before it that exports one, or its `start`}."""
    before = names[: names.index(name)]
    latest = {kind: exporters(kind, before) for kind in (*STAGES[name].needs(model, config), *STAGES[name].takes)}
    start = getattr(config, "start", "")
    return {kind: start if start in found else found[-1] for kind, found in latest.items() if found}


def latest_export(kind: ModelKind, run: RunConfig) -> Path | None:
    """The export of the last stage of the run that has exported a model of this kind; None if there is none."""
    folders = [run.export(name) for name in exporters(kind, run.stages)]
    return next((folder for folder in reversed(folders) if folder.exists()), None)


def export_folders() -> dict[str, str]:
    """{name for `rlhf-jax export --stage`: folder in the run folder} of everything that any stage exports."""
    more = {other: f"{name}/{path}" for name, stage in STAGES.items() for other, path in stage.more_exports.items()}
    return {name: f"{name}/export" for name in STAGES} | more
