"""Runs the stages of a run in order: skips finished stages and resumes interrupted ones."""

from __future__ import annotations

import dataclasses
import logging
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name

from jax.sharding import Mesh

from rlhf_jax import hosts
from rlhf_jax.config import dump_config
from rlhf_jax.events import describe_machine, record_events
from rlhf_jax.plan import check_fits, device_limit, token_limits
from rlhf_jax.plan.auto import resolve_auto
from rlhf_jax.recipe import Recipe
from rlhf_jax.report import write_report
from rlhf_jax.stages.models import log_devices
from rlhf_jax.stages.run_folder import RunConfig, open_run
from rlhf_jax.stages.table import STAGES
from rlhf_jax.stages.tokenizers import check_same_ids, load_tokenizer
from rlhf_jax.trackers import Trackers, check_packages

LOGGER = logging.getLogger(__name__)


def train(recipe: Recipe, mesh: Mesh, stages: Sequence[str] = ()) -> None:
    """Run these stages of `run.stages`, or all of them, skipping stages whose export exists.

    Raises:
        ValueError: a stage that `run.stages` does not name or whose predecessors are not finished, a run that does not
            fit the devices, a run folder of another configuration, or an error of a stage.
    """
    run, stages = recipe.run, tuple(stages or recipe.run.stages)
    date = hosts.broadcast(recipe.with_date(start=True).data.date)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, date=date))
    if unknown := [name for name in stages if name not in run.stages]:
        raise ValueError(f"{unknown[0]} is not a stage of this run, run.stages = {list(run.stages)}: add it there")
    # RUN/config.toml may be a CONFIG later, and must not delete that run then; settings that are "auto" stay "auto".
    merged = dump_config(dataclasses.replace(recipe, run=dataclasses.replace(run, overwrite=False)))
    # Files are looked for by one process: another may see them later, when they are on a disk of the network.
    waiting = hosts.on_main(lambda: [name for name in stages if run.overwrite or not run.export(name).exists()])
    limits = hosts.gather(device_limit(mesh))
    limit = None if None in limits else min(limits)
    recipe, chosen = resolve_auto(recipe, mesh, limit, waiting)
    for text in chosen:
        LOGGER.info(f"auto: {text}")
    if limit is not None:
        check_fits(recipe, mesh, limit, waiting)
    # Settings that would stop a later stage are rejected before the earlier stages run, or an old run is deleted.
    for name in stages:
        with prefix_errors(name):
            getattr(recipe, name).check(name, recipe.layout(mesh))
    check_reward_tokenizer(recipe, waiting)
    hosts.on_main(check_packages, run.trackers if waiting else ())
    hosts.on_main(open_run, run, merged, Recipe)
    log_devices(mesh, recipe.model)
    if not waiting:
        for name in stages:
            log_skip(run, name)
        return
    start = {"stages": stages, "machine": describe_machine(mesh), "limits": token_limits(recipe, mesh)}
    asked = run.trackers if hosts.is_main() else ()
    with record_events(Path(run.dir), start), Trackers(asked, Path(run.dir), tomllib.loads(merged)) as trackers:
        for name in stages:
            run_stage(recipe, name, mesh, trackers)
    if hosts.is_main():
        try_report(run)


def try_report(run: RunConfig) -> None:
    """Write RUN/report.html. What keeps it from being written is logged: the run itself is complete."""
    try:
        LOGGER.info(f"report: {write_report([run.dir])}")
    except (OSError, ValueError) as error:
        LOGGER.warning(f"no report was written: {error}; `rlhf-jax report {run.dir}` writes it")


def log_skip(run: RunConfig, name: str) -> None:
    LOGGER.info(f"{name}: finished already, {run.export(name)} exists")


def run_stage(recipe: Recipe, name: str, mesh: Mesh, trackers: Trackers) -> None:
    """Run one stage, unless its export exists. ValueError: its predecessors are not finished, or an error of it."""
    run = recipe.run
    if hosts.broadcast(run.export(name).exists()):
        log_skip(run, name)
        return
    context = dataclasses.replace(recipe.context(name, mesh), trackers=trackers)
    missing = [folder.parent.name for folder in context.start.values() if not folder.exists()]
    if missing := hosts.broadcast(missing):
        raise ValueError(
            f"{name} starts from the export of {' and '.join(missing)} in {run.dir}, which is not finished: "
            "run it first, or `train`, which runs all in order"
        )
    with prefix_errors(name):
        resolve_name(STAGES[name].run)(context, getattr(recipe, name))


def check_reward_tokenizer(recipe: Recipe, waiting: Sequence[str]) -> None:
    """ValueError if a stage that is waiting trains `model.reward` on ids that are not the actor's."""
    place, own = recipe.model.reward, recipe.tokenizer
    starts = any(STAGES[name].exports == "scorer" for name in waiting) and not recipe.model.reward_from_policy
    is_known = own != recipe.run.folder("base") or own.exists()
    if starts and own != place and is_known:
        check_same_ids(load_tokenizer(own, recipe.data), load_tokenizer(place, recipe.data), place)


@contextmanager
def prefix_errors(stage: str) -> Iterator[None]:
    """Prefix ValueErrors of the body with the name of the stage, and say of an OSError how the run continues."""
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        fix = "what is saved is intact: make room or allow writing there, and run the same command again"
        raise ValueError(f"{stage}: {error.strerror or error}{where}; {fix}") from error
    except ValueError as error:
        if str(error).startswith(stage):
            raise
        raise ValueError(f"{stage}: {error}") from error
