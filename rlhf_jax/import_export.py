"""Import and export of Hugging Face folders: `rlhf-jax import` and `rlhf-jax export`."""

from __future__ import annotations

import functools
import logging
import math
import shutil
import tomllib
from pathlib import Path

from rlhf_jax.mesh import MeshConfig, make_mesh
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families.containers import is_container, text_name
from rlhf_jax.models.hub import check_absent, local_folder, read_json, replace_folder
from rlhf_jax.models.pretrained import from_pretrained, has_scalar_head, reward_from_pretrained, save_pretrained
from rlhf_jax.models.safetensors_io import stored_dtype
from rlhf_jax.stages.run_folder import RunConfig
from rlhf_jax.stages.table import export_folders, exporters

LOGGER = logging.getLogger(__name__)


def import_model(
    source: str, destination: str, *, adapter: str | None = None, dtype: str | None = None, container: str | None = None
) -> None:
    """Read a Hugging Face folder or hub id as training would, over all devices, and write it to `destination`.

    Checks every tensor against config.json, merges an adapter, changes the dtype, splits or joins files.

    Args:
        adapter: a PEFT folder whose LoRA is merged; with a scalar head the result is a reward model.
        dtype: dtype of the result; None: that of the source's files.
        container: write this multimodal folder, with the model as its text model, in its dtype.
    Raises:
        ValueError: errors of `from_pretrained` and `save_pretrained`.
    """
    check_absent(Path(destination))
    folder, load = local_folder(source), from_pretrained
    if has_scalar_head(read_json(folder / "config.json")):
        load = reward_from_pretrained
    if adapter is not None and read_json(local_folder(adapter) / "adapter_config.json").get("task_type") == "SEQ_CLS":
        load = reward_from_pretrained
    in_container = is_container(read_json(folder / "config.json"))
    stored = stored_dtype(folder, rename=functools.partial(text_name, in_container=in_container))
    model = load(source, adapter, mesh=make_mesh(MeshConfig()), dtype=stored)
    if container:
        save_pretrained(model, destination, dtype=dtype, container=container)
        LOGGER.info(f"wrote {container} with the text model of {source} to {destination}")
        return
    save_pretrained(model, destination, dtype=dtype or stored)
    kind = "reward model" if model.config.scalar_head else "language model"
    leaves, real = abstract_params(model.config.without_lora()).values(), {"vocab": model.config.vocab_size}
    count = sum(math.prod(real.get(axis, n) for axis, n in zip(leaf.axes, leaf.shape, strict=True)) for leaf in leaves)
    LOGGER.info(f"wrote a {model.config.family} {kind} of {count:,} parameters, {dtype or stored}, to {destination}")


def export_run(
    run: str,
    destination: str,
    *,
    stage: str = "",
    adapter: bool = False,
    dtype: str | None = None,
    container: str | None = None,
) -> None:
    """Write a model that a run has trained to the folder `destination`.

    Args:
        stage: a key of `export_folders`; "": the last stage of the run that exports a policy.
        adapter: write the LoRA adapter alone, for PEFT, instead of the whole model.
        dtype: dtype of the whole model; None: that of the run's export.
        container: write this multimodal folder, with the model as its text model, in its dtype.
    Raises:
        ValueError: no run, a run without a policy and no `stage`, a stage that is not finished,
            no adapter, a destination that exists and is not empty.
    """
    if not (Path(run) / "config.toml").exists():
        raise ValueError(f"{run} is no run folder (it has no config.toml): give the run.dir of a training")
    stages = tomllib.loads((Path(run) / "config.toml").read_text()).get("run", {}).get("stages", RunConfig.stages)
    folders, policies = export_folders(), exporters("policy", stages)
    if not (stage or policies):
        raise ValueError(f"{run}: none of its stages ({', '.join(stages)}) exports a policy: choose one with --stage")
    stage = stage or policies[-1]
    folder = Path(run) / folders[stage]
    if not folder.exists():
        done = ", ".join(name for name, place in folders.items() if (Path(run) / place).exists()) or "none"
        fix = ", or was trained without (ppo.ema_decay = 0)" if stage == "ema" else ""
        raise ValueError(f"{stage} of {run} is not finished ({folder} does not exist){fix}; finished: {done}")
    if adapter and (dtype or container):
        option = "--dtype" if dtype else "--container"
        raise ValueError(f"{option} is for a whole model, an adapter is float32: leave one of them out")
    if not adapter:
        import_model(str(folder), destination, dtype=dtype, container=container)
        return
    folder = folder.with_name(f"{folder.name}_adapter")
    if not folder.exists():
        raise ValueError(f"{stage} of {run} was trained whole, without LoRA, so it has no adapter: leave --adapter out")
    with replace_folder(Path(destination)) as unfinished:
        shutil.copytree(folder, unfinished, dirs_exist_ok=True)
    base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    LOGGER.info(f"wrote a LoRA adapter of {base} to {destination}")
