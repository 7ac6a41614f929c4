"""Models of a few thousand parameters in the style of each family, with no bias or scale at its initial value."""

import contextlib
import dataclasses
import logging
import re

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.collectives import collectives
from rlhf_jax.decode import Decoding
from rlhf_jax.mesh import GENERATE, TRAIN, Layout, MeshConfig, make_mesh
from rlhf_jax.models.config import DecoderConfig, Experts, Rope
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.inference import Inference
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.sampling import SampleConfig

# 61 ids padded to 64 rows, and all sizes distinct: every sharded size divides by 8, every head count by 2.
OPT = DecoderConfig(
    family="opt",
    vocab_size=61,
    padded_vocab=64,
    hidden_size=32,
    embed_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_size=48,
    max_positions=40,
    activation="relu",
    gated_mlp=False,
    norm="layer",
    norm_eps=1e-5,
    position_rows=42,
    position_offset=2,
    attention_scale=8**-0.5,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    tied=True,
)
OPT_350M = dataclasses.replace(OPT, embed_size=16, residual="post", final_norm=False)
LLAMA = dataclasses.replace(
    OPT,
    family="llama",
    num_heads=8,
    num_kv_heads=2,
    activation="silu",
    gated_mlp=True,
    norm="rms",
    norm_eps=1e-6,
    position_rows=0,
    position_offset=0,
    rope=Rope((1.0, 0.1, 0.01, 0.001)),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    tied=False,
)
LLAMA_TIED = dataclasses.replace(LLAMA, num_heads=4, num_kv_heads=4, tied=True)
SPARSE = dataclasses.replace(LLAMA, family="mixtral", experts=Experts(4, 2, renormalised=True, aux_coef=0.02))
FAMILIES = {"opt": OPT, "opt-350m": OPT_350M, "llama": LLAMA, "llama-tied": LLAMA_TIED, "sparse": SPARSE}
LORA = LoraConfig(rank=4, alpha=8.0)

MESHES = {
    "one": MeshConfig(1, 1, 1),
    "fsdp4-tensor2": MeshConfig(1, 4, 2),
    "data2-fsdp2-tensor2": MeshConfig(2, 2, 2),
}


def mesh_of(name: str) -> Mesh:
    """The mesh of this name in `MESHES`, over the first simulated devices."""
    config = MESHES[name]
    return make_mesh(config, jax.devices()[: config.data * config.fsdp * config.tensor])


def decoding(config: DecoderConfig, sample: SampleConfig, eos: tuple[int, ...], mesh: Mesh, *dtype_and_attention):
    """A `Decoding` on a mesh; attention is "auto" where none is given."""
    return Decoding(Inference(config, Layout(mesh, GENERATE), *dtype_and_attention), sample, eos)


def scalar(config: DecoderConfig) -> DecoderConfig:
    """The same model as a critic or reward model."""
    return dataclasses.replace(config, scalar_head=True)


def with_lora(config: DecoderConfig, lora: LoraConfig) -> DecoderConfig:
    return dataclasses.replace(config, lora=lora)


def random_arrays(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter and adapter on the host, large enough to show errors; rows of vocabulary padding are 0."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for path, leaf in abstract_params(config).items():
        scale = 0.15 if path.endswith(("kernel", "lora_a", "lora_b")) else 0.3
        array = scale * rng.standard_normal(leaf.shape)
        if path.endswith("scale"):
            array += 1.0
        if path in ("embed/tokens", "head/kernel"):
            array[config.vocab_size :] = 0.0
        arrays[path] = array.astype(np.float32)
    return arrays


def on_mesh(config: DecoderConfig, arrays: dict[str, np.ndarray], mesh: Mesh):
    """{path: array} with the training shardings."""
    leaves, layout = abstract_params(config), Layout(mesh, TRAIN)
    return {path: layout.put(array, *leaves[path].axes) for path, array in arrays.items()}


def random_params(config: DecoderConfig, mesh: Mesh, seed: int = 0):
    return on_mesh(config, random_arrays(config, seed), mesh)


def prompts(config: DecoderConfig, lengths, width: int, *, side: str = "left", seed: int = 1):
    """(ids [B, width], mask [B, width]): one row of random real ids per length, padded on `side`."""
    rng = np.random.default_rng(seed)
    place = np.arange(width) if side == "right" else np.arange(width)[::-1]
    mask = place[None] < np.asarray(lengths)[:, None]
    ids = np.zeros((len(lengths), width), np.int32)
    ids[mask] = rng.integers(0, config.vocab_size, mask.sum())
    return ids, mask


@contextlib.contextmanager
def compilations():
    """A list that receives the name of every function compiled while the block runs."""
    names: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            names.extend(re.findall(r"^Compiling (\S+)", record.getMessage()))

    handler, logger = Handler(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)


def collective_kinds(text: str) -> set[str]:
    """The kinds of collectives in a compiled program."""
    return {collective.kind for collective in collectives(text)}


def collective_shapes(text: str, kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array that collectives of a kind return, however often each runs."""
    return [(collective.dtype, collective.shape) for collective in collectives(text) if collective.kind == kind]
