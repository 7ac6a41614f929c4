"""Multimodal folders out: the weights of a text model in the folder that it came from, all else in it as it was."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path

from rlhf_jax import hosts
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.families import decoder_config, head_tensor, hf_tensors
from rlhf_jax.models.families.containers import is_container, names_in_container, text_name
from rlhf_jax.models.hub import read_json
from rlhf_jax.models.lora import NO_LORA
from rlhf_jax.models.safetensors_io import join_names, open_folder, stored_dtype, write_params
from rlhf_jax.models.unstacked import Param

_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth")


def write_container(folder: Path, container: Path, config: DecoderConfig, params: Mapping[str, Param]) -> None:
    """Copy a multimodal folder, with these parameters as those of its text model, in the dtype of that one.

    The other tensors are copied byte for byte, one at a time. Folders within it are not copied.

    Args:
        folder: an existing folder.
        container: the multimodal folder.
        config: of the parameters, whose adapters are merged.
        params: {path: array}, as `write_params` takes them.
    Raises:
        ValueError: not a multimodal folder, one whose text model is another, or an error of `open_folder`.
    """
    hf = read_json(container / "config.json")
    if not is_container(hf):
        raise ValueError(f"{container} is not a multimodal folder, whose text model could be replaced")
    if config.scalar_head:
        raise ValueError(f"a scalar head is no part of {container}: write the reward model alone")
    theirs = decoder_config(hf, scalar_head=False)
    ours = dataclasses.replace(config, lora=NO_LORA, padded_vocab=theirs.padded_vocab, tied=theirs.tied)
    if wrong := [f.name for f in dataclasses.fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)]:
        raise ValueError(f"the text model of {container} is another than this one: they differ in {', '.join(wrong)}")
    entries, tensors, head = open_folder(container), hf_tensors(config), head_tensor(config)
    if config.tied and head and any(name in entries for name in names_in_container(head.name)):
        tensors, params = {**tensors, "head/kernel": head}, {**params, "head/kernel": params["embed/tokens"]}
        if not any(name in entries for name in names_in_container(tensors["embed/tokens"].name)):
            del tensors["embed/tokens"]
    renamed, written = {}, set()
    for path, tensor in tensors.items():
        layers = range(config.num_layers) if "{i}" in tensor.name else range(1)
        for name in names_in_container(tensor.name):
            names = {name.format(i=i) for i in layers}
            if names <= entries.keys():
                renamed[path] = tensor._replace(name=name)
                written |= names
    if missing := tensors.keys() - renamed.keys():
        names = join_names([tensors[path].name for path in missing])
        raise ValueError(f"{container} lacks {names} of this model: is it the folder that it came from?")
    others = {name: entry for name, entry in entries.items() if name not in written}
    for path in container.iterdir():
        if hosts.is_main() and path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    dtype = stored_dtype(container, rename=functools.partial(text_name, in_container=True))
    write_params(folder, params, renamed, dtype, config.lora, others=others)
