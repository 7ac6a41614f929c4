"""Lower bounds and expected durations of a run from FLOPs, bytes and links, and its cost.

A floor assumes data-sheet rates and transfers that overlap with computation entirely. Expected durations divide by the
efficiencies below and overlap nothing. They are assumptions, named in every plan: nothing here was measured on a GPU.
N is the number of weights in matrix products per token, for B sequences of T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rlhf_jax.data.config import BUILTIN, DataConfig
from rlhf_jax.data.mixture import draws_per_epoch
from rlhf_jax.data.records import RowSpec
from rlhf_jax.data.selection import source_sizes
from rlhf_jax.hardware import Gpu, Machine
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.config import DecoderConfig, Remat
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.lora import is_adapter
from rlhf_jax.plan.abstract import device_bytes
from rlhf_jax.plan.phase import Phase
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.table import STAGES

# Gathers of each weight per micro-batch of an update, by the compiled text: one forward and one backward, where
# recomputation and gradients share the gathered weights.
GATHERS_PER_PASS = 2


# Shares of the data sheet that are expected to be reached.
MATMUL_SHARE = 0.35  # of FLOP/s: half is reported for long sequences on H100 (MaxText, 7B); 512 tokens reach less
MEMORY_SHARE = 0.6  # of the bandwidth, while decoding
LINK_SHARE = 0.6  # of the links, and of PCIe to the host


@dataclass(frozen=True)
class Work:
    """The work of one GPU in a phase: FLOPs of matrix products, bytes of its memory, over its links and to the host."""

    flops: float = 0.0
    memory: float = 0.0
    link: float = 0.0
    host: float = 0.0

    def seconds(self, flops_rate: float, machine: Machine) -> dict[str, float]:
        """The {"floor" and "expected"} seconds."""
        compute, memory = self.flops / flops_rate, self.memory / machine.gpu.bandwidth
        moved = self.link / slowest_link(machine), self.host / host_link(machine.gpu)
        expected = max(compute / MATMUL_SHARE, memory / MEMORY_SHARE) + sum(moved) / LINK_SHARE
        return {"floor": max(compute, memory, *moved), "expected": expected}


def slowest_link(machine: Machine) -> float:
    """Bytes per second of one GPU over the slowest link that a collective of all GPUs crosses."""
    return machine.gpu.network if machine.nodes > 1 else machine.gpu.link


def host_link(gpu: Gpu) -> float:
    """Bytes per second between one GPU and pinned host memory, each way: 16 lanes of its generation's PCIe."""
    return {"7": 16e9, "8": 32e9}.get(gpu.capability[0], 64e9)


def matmul_rate(gpu: Gpu, dtype: str) -> float:
    """FLOP/s of matrix products: float32 as TF32, half as fast; before Ampere all but float16 in float32, an eighth."""
    if gpu.capability < "8.0":
        return gpu.flops if dtype == "float16" else gpu.flops / 8
    return gpu.flops / 2 if dtype == "float32" else gpu.flops


def weights_per_token(config: DecoderConfig) -> tuple[int, int]:
    """(N of the layers for one token, N of the head); an expert counts by its share of the tokens."""
    body = 0
    for path, leaf in abstract_params(config).items():
        if path.endswith("kernel") and not path.startswith(("head/", "score/")):
            size = math.prod(leaf.shape)
            body += size * config.experts.per_token // config.experts.count if "/experts/" in path else size
    return body, 0 if config.scalar_head else config.padded_vocab * config.embed_size


def forward_flops(config: DecoderConfig, rows: int, length: int, head_tokens: int) -> float:
    """2 N per token, and 4 T H d per token and layer for scores and their sum of values (every pair is computed)."""
    body, head = weights_per_token(config)
    return rows * (length * (2.0 * body + attention_flops(config, length)) + head_tokens * 2.0 * head)


def attention_flops(config: DecoderConfig, length: float) -> float:
    """FLOPs of one token's scores over `length` tokens and their sum of values."""
    return 4.0 * length * config.num_heads * config.head_dim * config.num_layers


def training_factor(lora_rank: int, remat: Remat) -> int:
    """Cost of an update in forward passes: 1, with recomputation 1 more, 1 for the gradients of the activations, and 1
    for those of the weights, which adapters save except for their own."""
    return 2 + (remat == "layers") + (lora_rank == 0)


def work_of_phases(recipe: Recipe, found: list[Phase], mesh) -> dict[str, Work]:
    """{"stage/name": Work} of one GPU, in one optimizer step (SFT, reward model) or one iteration (PPO)."""
    works = {"publish": _publish_work, "generate": _generate_work, "score": _score_work}
    works |= dict.fromkeys(("update", "actor", "critic"), _update_work)
    layout = Layout(mesh, TRAIN)
    return {f"{each.stage}/{each.name}": works[each.name](recipe, each, layout) for each in found if each.name in works}


def _publish_work(recipe: Recipe, phase: Phase, layout: Layout) -> Work:
    """Reading the weights, writing and moving the generation weights, and the round trip of an offloaded average."""
    model, shards, actor = recipe.model, layout.shards("vocab"), phase.passes[0]
    average = 2 * 4 * _num_parameters(actor.decoder) / shards
    host = average if getattr(recipe, phase.stage).ema_decay and model.offload_ema else 0.0
    if model.one_copy:
        return Work(host=host)
    weights = device_bytes(actor.params)
    # (t - tg) / (t tg) of the model comes over the links, t and tg being the shards of training and generation; where
    # training has every weight whole, nothing does.
    moved = weights * (1 - layout.mesh.shape["tensor"] / shards) if recipe.mesh.zero == 3 else 0.0
    return Work(memory=device_bytes(phase.args) + 2 * weights, link=moved, host=host)


def _generate_work(recipe: Recipe, phase: Phase, layout: Layout) -> Work:
    """Prefill of all prompts, then decoding token by token, with the all-reduces of tensor parallelism."""
    ((actor, params, rows, prompt, *_),) = phase.passes
    mesh, tensor = layout.mesh, layout.mesh.shape["tensor"]
    new, width = getattr(recipe, phase.stage).sample.max_new_tokens, recipe.model.compute.dtype.itemsize
    local, seen = rows / (mesh.shape["data"] * mesh.shape["fsdp"]), prompt + new / 2  # rows of a tensor group
    weights = device_bytes(params)
    decode = forward_flops(actor, 1, 1, 1) + attention_flops(actor, seen)
    # Only a few rows of the embedding are read, but the whole head; and on average half of the answers' cache.
    reread = weights - actor.padded_vocab * actor.embed_size * width / tensor
    reads = new * (reread + phase.cache * seen / (prompt + new))
    if recipe.model.one_copy:  # separate adapters: read and multiplied at every token
        leaves = abstract_params(recipe.model.with_lora(actor))
        extra = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if is_adapter(path))
        decode, reads = decode + 2.0 * extra, reads + new * extra * width / tensor
    prefill = forward_flops(actor, local, prompt, 1) / tensor
    reduced = 2 * 2 * (tensor - 1) / tensor * local * (prompt + new) * actor.hidden_size * width * actor.num_layers
    return Work(prefill + new * local * decode / tensor, reads + weights, reduced)


def _score_work(recipe: Recipe, phase: Phase, layout: Layout) -> Work:
    """The passes of all models that score: actor and reference, critic and reward model."""
    model, frozen = recipe.model, phase.args[1]
    flops = sum(phase.micro * forward_flops(each.decoder, *each[2:5]) for each in phase.passes)
    gathered = sum(_gather_bytes(recipe, each.decoder, layout) for each in phase.passes)
    reference = 0.0
    if model.offload_reference:
        stored = 4 if model.frozen_dtype == "float32" else 2
        size = sum(math.prod(leaf.shape) for leaf in frozen.reference.values())
        reference = size * stored / layout.shards("vocab")
    return Work(flops / layout.shards("batch"), link=phase.micro * gathered, host=reference)


def _num_parameters(decoder: DecoderConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in abstract_params(decoder).values())


def _gather_bytes(recipe: Recipe, decoder: DecoderConfig, layout: Layout) -> float:
    """Bytes that reach a GPU when every weight is gathered once, in the dtype of the computation.

    Training splits each weight over all devices but replicas under ZeRO-3, over those of tensor below it, and so too
    an actor's base that generation shares.
    """
    is_shared = recipe.model.one_copy and not decoder.scalar_head
    shards = layout.shards("vocab") if recipe.mesh.zero == 3 and not is_shared else layout.mesh.shape["tensor"]
    return _num_parameters(decoder) * recipe.model.compute.dtype.itemsize * (1 - 1 / shards)


def _update_work(recipe: Recipe, phase: Phase, layout: Layout) -> Work:
    """All optimizer steps: passes; weights and gradients over the links, by the ZeRO stage; Adam reads 4 and
    writes 3 arrays of its shard, and offloaded moments come from the host and go back."""
    ((decoder, _, rows, length, head_tokens, _),), micro = phase.passes, phase.micro
    model, zero, mesh = recipe.model, recipe.mesh.zero, layout.mesh.shape
    count, shards = layout.shards("batch"), layout.shards("vocab")
    trained = 4.0 * sum(math.prod(leaf.shape) for leaf in phase.args[0].trainable.values())  # bytes over all devices
    shard = trained / (shards if zero else mesh["tensor"])
    passes = training_factor(model.with_lora(decoder).lora.rank, model.remat)
    work = forward_flops(decoder, micro * rows, length, head_tokens) * passes
    if model.remat == "dots":  # scores and their sums of values are recomputed where nothing else is
        work += micro * rows * length * attention_flops(decoder, length)
    # Gradients of a layer are reduced in the dtype of the computation, and summed over micro-batches in float32: to
    # their shards from stage 2 on, and below to all of fsdp, which costs twice what scattering them does.
    reduced = trained * model.compute.dtype.itemsize / 4
    if zero >= 2:
        link = micro * reduced * (1 - 1 / shards)
    else:
        link = micro * reduced * (1 - 1 / mesh["tensor"] + 2 * (1 - 1 / mesh["fsdp"]) / mesh["tensor"])
    link += 2 * micro * (count > shards) * reduced / shards  # and all-reduced over data
    link += micro * GATHERS_PER_PASS * _gather_bytes(recipe, decoder, layout)
    if zero in (1, 2):  # each sends its updated parameters to all, in float32
        link += trained / mesh["tensor"] * (1 - 1 / mesh["fsdp"])
    host = 4 * shard if model.offload_optimizer else 0.0  # two moments, each way
    return Work(*(phase.runs * part for part in (work / count, 7 * shard, link, host)))


def iteration_seconds(recipe: Recipe, found: list[Phase], mesh, machine: Machine) -> float:
    """Expected seconds of an iteration of PPO; without PPO, of a step of each stage."""
    flops_rate, every = matmul_rate(machine.gpu, recipe.model.dtype), work_of_phases(recipe, found, mesh)
    sampled = [need for name, need in every.items() if f"{name.split('/')[0]}/generate" in every]
    return sum(need.seconds(flops_rate, machine)["expected"] for need in sampled or every.values())


def estimate_times(recipe: Recipe, found: list[Phase], mesh, machine: Machine, price: float) -> dict[str, dict]:
    """{stage: {"phases", "floor" and "expected" seconds of a step, an epoch and the stage, "steps", "cost", ...}}.

    Args:
        price: of one GPU for an hour; 0: no cost is reported.
    """
    flops_rate = matmul_rate(machine.gpu, recipe.model.dtype)
    table: dict[str, dict] = {}
    for name, need in work_of_phases(recipe, found, mesh).items():
        stage, phase = name.split("/")
        table.setdefault(stage, {"phases": {}})["phases"][phase] = need.seconds(flops_rate, machine)
    for stage, entry in table.items():
        entry |= {kind: sum(each[kind] for each in entry["phases"].values()) for kind in ("floor", "expected")}
        config = getattr(recipe, stage)
        is_packed = recipe.row_spec(stage).pack_length > 0  # then the number of rows is known only after tokenization
        rows = None if is_packed else training_rows(recipe.data, recipe.row_spec(stage))
        size = config.rollout_batch_size if STAGES[stage].rows == "prompt" else config.batch_size
        steps = rows // size if rows else None  # of one epoch
        entry |= {"rows": rows, "steps_per_epoch": steps, "steps": config.steps or (steps and config.epochs * steps)}
        for kind in ("floor", "expected"):
            entry[f"{kind}_epoch"] = steps and entry[kind] * steps
            entry[f"{kind}_stage"] = entry["steps"] and entry[kind] * entry["steps"]
        rate = price * machine.count / 3600
        entry["cost_of_step"] = rate * entry["expected"] if price else None
        entry["cost"] = rate * entry["expected_stage"] if price and entry["steps"] else None
    return table


def token_rates(recipe: Recipe, found: list[Phase], mesh, machine: Machine) -> dict[str, float]:
    """{stage: tokens per second at the data sheet's speed}, for prompts, answers and rows of full length."""
    flops_rate = matmul_rate(machine.gpu, recipe.model.dtype)
    floors: dict[str, float] = {}
    for name, need in work_of_phases(recipe, found, mesh).items():
        stage = name.split("/")[0]
        floors[stage] = floors.get(stage, 0.0) + need.seconds(flops_rate, machine)["floor"]
    rates = {}
    for stage, floor in floors.items():
        config, spec = getattr(recipe, stage), recipe.row_spec(stage)
        tokens = config.batch_size * (spec.pack_length or recipe.data.max_length) * spec.per_row
        if spec.kind == "prompt":
            tokens = config.rollouts * (recipe.data.max_prompt_length + config.sample.max_new_tokens)
        rates[stage] = tokens / floor
    return rates


def training_rows(data: DataConfig, spec: RowSpec) -> int | None:
    """Rows per epoch before any is dropped for its length; None if a source is streamed or would be downloaded."""
    if any(each.stream or (each.path != BUILTIN and not Path(each.path).is_file()) for each in data.sources):
        return None
    sized = [each for each in zip(source_sizes(data, spec), data.sources, strict=True) if each[0]]
    return int(draws_per_epoch(*zip(*sized, strict=True), data.temperature).sum()) if sized else 0


def assumptions(recipe: Recipe) -> list[str]:
    """The assumptions of the expected seconds."""
    sampled = [name for name in recipe.run.stages if STAGES[name].sampled]
    lengths = dict.fromkeys(str(getattr(recipe, name).sample.max_new_tokens) for name in sampled)
    return [
        f"expected seconds assume {MATMUL_SHARE:.0%} of the GPU's matrix FLOP/s, {MEMORY_SHARE:.0%} of its memory "
        f"bandwidth and {LINK_SHARE:.0%} of its links, transfers not overlapped; none of this was measured",
        f"every prompt fills its {recipe.data.max_prompt_length} tokens and every answer its "
        f"{' or '.join(lengths) or 'no'}; rows of SFT and reward model fill {recipe.data.max_length}",
        "a floor is the data sheet's speed, with transfers that overlap with computation entirely",
        "offloaded arrays cross PCIe of 16 lanes, 32 GB/s each way on A100s and 64 on H100s, at the links' share",
        "links: NVLink or PCIe inside a node, the network that NVIDIA sells with it between nodes",
    ]
