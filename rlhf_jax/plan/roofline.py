"""How long a run takes at least, and what to expect, from FLOPs, bytes and links; and what it costs.

A floor takes the machine at its data sheet, with transfers hidden behind the work. What is expected divides by the
efficiencies below and hides nothing. They are assumptions, named in every plan: nothing here was measured on a GPU.
N weights in matrix products that a token passes, B sequences of T tokens.
"""

from __future__ import annotations

import dataclasses
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
from rlhf_jax.plan.phases import Phase, decoder_configs, prompt_positions
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.batch_sizes import micro_batches
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.ppo import ppo_sizes
from rlhf_jax.stages.table import STAGES

# How often an update gathers each weight in a micro-batch, by the compiled text: once forward and once backward,
# where what is recomputed and its gradients share the gathered weights.
GATHERS_PER_PASS = 2


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet that are expected to be reached."""

    matmul: float = 0.35  # of FLOP/s: half is reported for long sequences on H100 (MaxText, 7B); 512 tokens reach less
    memory: float = 0.6  # of the bandwidth, while decoding
    link: float = 0.6  # of the links, and of PCIe to the host


@dataclass(frozen=True)
class Work:
    """What one GPU does in a phase: FLOPs of matrix products, bytes of its memory, over its links and to the host."""

    flops: float = 0.0
    memory: float = 0.0
    link: float = 0.0
    host: float = 0.0

    def floor(self, flops_rate: float, machine: Machine) -> float:
        moved = self.link / slowest_link(machine), self.host / host_link(machine.gpu)
        return max(self.flops / flops_rate, self.memory / machine.gpu.bandwidth, *moved)

    def expected(self, flops_rate: float, machine: Machine, share: Efficiency) -> float:
        work = max(self.flops / flops_rate / share.matmul, self.memory / machine.gpu.bandwidth / share.memory)
        moved = self.link / slowest_link(machine) + self.host / host_link(machine.gpu)
        return work + moved / share.link


def slowest_link(machine: Machine) -> float:
    """Bytes a second of one GPU over what a collective of all has to cross."""
    return machine.gpu.network if machine.nodes > 1 else machine.gpu.link


def host_link(gpu: Gpu) -> float:
    """Bytes a second between one GPU and pinned host memory, each way: 16 lanes of its generation's PCIe."""
    return {"7": 16e9, "8": 32e9}.get(gpu.capability[0], 64e9)


def matmul_rate(gpu: Gpu, dtype: str) -> float:
    """FLOP/s of matrix products: float32 as TF32, half as fast; before Ampere both in float32, an eighth of float16."""
    if gpu.capability < "8.0":
        return gpu.flops / 8
    return gpu.flops if dtype == "bfloat16" else gpu.flops / 2


def weights_per_token(config: DecoderConfig) -> tuple[int, int]:
    """(N of the layers that one token passes, N of the head); an expert counts by its share of the tokens."""
    body = 0
    for path, leaf in abstract_params(config).items():
        if path.endswith("kernel") and not path.startswith(("head/", "score/")):
            size = math.prod(leaf.shape)
            body += size * config.experts.per_token // config.experts.count if "/experts/" in path else size
    return body, 0 if config.scalar_head else config.padded_vocab * config.embed_size


def forward_flops(config: DecoderConfig, rows: int, length: int, head_tokens: int) -> float:
    """2 N a token, and 4 T H d a token and layer for scores and their sum of values (every pair is computed)."""
    body, head = weights_per_token(config)
    attention = 4 * length * config.num_heads * config.head_dim * config.num_layers
    return rows * (length * (2.0 * body + attention) + head_tokens * 2.0 * head)


def attention_flops(config: DecoderConfig, rows: int, length: int) -> float:
    """Of scores and their sums of values, which are recomputed where nothing else is."""
    return 4.0 * rows * length**2 * config.num_heads * config.head_dim * config.num_layers


def training_factor(lora_rank: int, remat: Remat) -> int:
    """Forward passes that an update costs: 1, with recomputation 1 more, and 1 for the gradients of the activations,
    1 for those of the weights, which adapters spare but for their own."""
    return 2 + (remat == "layers") + (lora_rank == 0)


def work_of_phases(recipe: Recipe, found: list[Phase], mesh) -> dict[str, Work]:
    """{"stage/name": Need} of one GPU, in one optimizer step (SFT, reward model) or one iteration (PPO)."""
    layout = Layout(mesh, TRAIN)
    actor, critic = decoder_configs(recipe, layout.shards("vocab"))
    result = {}
    for phase in found:
        if phase.name == "update":
            state, _, batch = phase.args
            config, length = getattr(recipe, phase.stage), batch.tokens.shape[-1]
            decoder = critic if STAGES[phase.stage].exports == "scorer" else actor
            rows = math.prod(batch.tokens.shape[:-1])
            micro = micro_batches(phase.stage, config.batch_size, config.micro_batch_size, layout)
            flops, again = forward_flops(decoder, rows, length, length), attention_flops(decoder, rows, length)
            result[f"{phase.stage}/update"] = _update_work(recipe, decoder, state, flops, again, micro, layout)
    for stage in sampling_stages(found):
        by_name = {phase.name: phase for phase in found if phase.stage == stage}
        result |= {f"{stage}/{name}": need for name, need in _sampling_needs(recipe, by_name, stage, layout).items()}
    return result


def sampling_stages(found: list[Phase]) -> list[str]:
    """The stages that learn from their own samples."""
    return [phase.stage for phase in found if phase.name == "generate"]


def _sampling_needs(recipe: Recipe, by_name: dict[str, Phase], stage: str, layout: Layout) -> dict[str, Work]:
    """{name: Need} of the phases of one iteration of PPO."""
    mesh, count = layout.mesh, layout.shards("batch")
    actor, critic = decoder_configs(recipe, layout.shards("vocab"))
    result, config, model = {}, getattr(recipe, stage), recipe.model
    rows, new = config.rollouts, config.sample.max_new_tokens
    prompt = prompt_positions(recipe, min(actor.max_positions, critic.max_positions))
    length = prompt + new
    weights, cache = device_bytes(by_name["generate"].args[0]), by_name["generate"].cache
    tensor = mesh.shape["tensor"]
    local = rows / (mesh.shape["data"] * mesh.shape["fsdp"])  # rows of a tensor group
    width = model.compute.dtype.itemsize
    # (t - tg) / (t tg) of the model comes over the links, t and tg being the shards of training and generation; where
    # one copy serves both, and where training has every weight whole, nothing does.
    moved = weights * (1 - tensor / layout.shards("vocab")) if recipe.mesh.zero == 3 and not model.one_copy else 0.0
    copied = device_bytes(by_name["publish"].args) + 2 * weights if not model.one_copy else 0.0
    average = 2 * 4 * _num_parameters(actor) / layout.shards("vocab") if config.ema_decay and model.offload_ema else 0.0
    result["publish"] = Work(memory=copied, link=moved, host=average)
    decode = (
        forward_flops(actor, 1, 1, 1) + 4 * (prompt + new / 2) * actor.num_heads * actor.head_dim * actor.num_layers
    )
    # Of the embedding a few rows are looked up; the head beside it is read whole. On average half the answers' cache.
    reread = weights - actor.padded_vocab * actor.embed_size * width / tensor
    reads = new * (reread + cache * (prompt + new / 2) / length)
    if model.one_copy:  # adapters beside the weights: read and multiplied at every token
        leaves = abstract_params(model.with_lora(actor))
        extra = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if is_adapter(path))
        decode, reads = decode + 2.0 * extra, reads + new * extra * width / tensor
    prefill = forward_flops(actor, local, prompt, 1) / tensor
    reduced = 2 * 2 * (tensor - 1) / tensor * local * length * actor.hidden_size * width * actor.num_layers
    result["generate"] = Work(prefill + new * local * decode / tensor, reads + weights, reduced)
    passes = 2 * forward_flops(actor, rows, length, new) + 2 * forward_flops(critic, rows, length, 0)
    batch_size, micro = ppo_sizes(config, layout)
    parts = micro * config.rollouts // batch_size
    shards = layout.shards("vocab")
    gathered = (
        2 * parts * sum(_gather_bytes(each, model, num_weight_shards(recipe, each, layout)) for each in (actor, critic))
    )
    reference = 0.0
    if model.offload_reference and not model.lora.rank:
        reference = _num_parameters(actor) * (4 if model.frozen_dtype == "float32" else 2) / shards
    result["score"] = Work(passes / count, link=gathered, host=reference)
    updates = config.ppo_epochs * rows // batch_size
    for name, decoder, head in (("actor", actor, new), ("critic", critic, 0)):
        flops = forward_flops(decoder, batch_size, length, head)
        again = attention_flops(decoder, batch_size, length)
        once = _update_work(recipe, decoder, by_name[name].args[0], flops, again, micro, layout)
        result[name] = Work(*(updates * part for part in dataclasses.astuple(once)))
    return result


def _num_parameters(decoder: DecoderConfig) -> int:
    """Parameters."""
    return sum(math.prod(leaf.shape) for leaf in abstract_params(decoder).values())


def _gather_bytes(decoder: DecoderConfig, model: ModelConfig, shards: int) -> float:
    """Bytes that reach a GPU when every weight is gathered once, in the dtype of the computation."""
    return _num_parameters(decoder) * model.compute.dtype.itemsize * (1 - 1 / shards)


def num_weight_shards(recipe: Recipe, decoder: DecoderConfig, layout: Layout) -> int:
    """Devices over which each weight is split in training: under ZeRO-3 all but replicas, below it those of tensor, and
    so too an actor's base that generation shares."""
    shared = recipe.model.one_copy and not decoder.scalar_head
    return layout.shards("vocab") if recipe.mesh.zero == 3 and not shared else layout.mesh.shape["tensor"]


def _update_work(recipe: Recipe, decoder: DecoderConfig, state, flops: float, again: float, micro: int, layout) -> Work:
    """One optimizer step: passes; weights and gradients over the links, as the ZeRO stage has it; Adam reads 4 and
    writes 3 arrays of its shard, and offloaded moments come from the host and go back.

    Args:
        flops, again: of one forward pass, and of its attention alone.
    """
    model, zero, mesh = recipe.model, recipe.mesh.zero, layout.mesh.shape
    count, shards = layout.shards("batch"), layout.shards("vocab")
    trained = 4.0 * sum(math.prod(leaf.shape) for leaf in state.trainable.values())  # bytes, over all devices
    shard = trained / (shards if zero else mesh["tensor"])
    passes = training_factor(model.with_lora(decoder).lora.rank, model.remat)
    work = flops * passes + again * (model.remat == "dots")
    # Gradients of a layer are reduced in the dtype of the computation, and summed over micro-batches in float32: to
    # their shards from stage 2 on, and below to all of fsdp, which costs twice what scattering them does.
    reduced = trained * model.compute.dtype.itemsize / 4
    if zero >= 2:
        link = micro * reduced * (1 - 1 / shards)
    else:
        link = micro * reduced * (1 - 1 / mesh["tensor"] + 2 * (1 - 1 / mesh["fsdp"]) / mesh["tensor"])
    link += 2 * micro * (count > shards) * reduced / shards  # and over data
    link += micro * GATHERS_PER_PASS * _gather_bytes(decoder, model, num_weight_shards(recipe, decoder, layout))
    if zero in (1, 2):  # what each has stepped goes to all, in float32
        link += trained / mesh["tensor"] * (1 - 1 / mesh["fsdp"])
    host = 4 * shard if model.offload_optimizer else 0.0  # two moments, there and back
    return Work(work / count, 7 * shard, link, host)


def iteration_seconds(recipe: Recipe, found: list[Phase], mesh, machine: Machine) -> float:
    """Expected seconds of an iteration of PPO; of a step of each stage that there is, where PPO is not one."""
    flops_rate, share, every = (
        matmul_rate(machine.gpu, recipe.model.dtype),
        Efficiency(),
        work_of_phases(recipe, found, mesh),
    )
    sampled = [need for name, need in every.items() if name.split("/")[0] in sampling_stages(found)]
    return sum(need.expected(flops_rate, machine, share) for need in sampled or every.values())


def estimate_times(recipe: Recipe, found: list[Phase], mesh, machine: Machine, price: float) -> dict[str, dict]:
    """{stage: {"phases", "floor" and "expected" seconds of a step, an epoch and the stage, "steps", "cost", ...}}.

    Args:
        price: of one GPU for an hour; 0: no cost is told.
    """
    flops_rate = matmul_rate(machine.gpu, recipe.model.dtype)
    share, table = Efficiency(), {}
    for name, need in work_of_phases(recipe, found, mesh).items():
        stage, phase = name.split("/")
        entry = table.setdefault(stage, {"phases": {}})
        floor, expected = need.floor(flops_rate, machine), need.expected(flops_rate, machine, share)
        entry["phases"][phase] = {"floor": floor, "expected": expected}
    for stage, entry in table.items():
        entry["floor"] = sum(times["floor"] for times in entry["phases"].values())
        entry["expected"] = sum(times["expected"] for times in entry["phases"].values())
        config = getattr(recipe, stage)
        is_packed = recipe.row_spec(stage).pack_length > 0  # then rows are known when they are tokenised
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


def training_rows(data: DataConfig, spec: RowSpec) -> int | None:
    """Rows of an epoch before any is dropped for length; None where a source is streamed, or would be downloaded."""
    if any(source.path != BUILTIN and not Path(source.path).is_file() for source in data.sources):
        return None
    if any(source.stream for source in data.sources):
        return None
    sized = [each for each in zip(source_sizes(data, spec), data.sources, strict=True) if each[0]]
    return int(draws_per_epoch(*zip(*sized, strict=True), data.temperature).sum()) if sized else 0


def assumptions(recipe: Recipe) -> list[str]:
    """What the expected seconds rest on."""
    share = Efficiency()
    return [
        f"expected seconds assume {share.matmul:.0%} of the GPU's matrix FLOP/s, {share.memory:.0%} of its memory "
        f"bandwidth and {share.link:.0%} of its links, transfers not hidden; none of this was measured",
        f"every prompt fills its {recipe.data.max_prompt_length} tokens and every answer its "
        f"{recipe.ppo.sample.max_new_tokens}; rows of SFT and reward model fill {recipe.data.max_length}",
        "a floor is the data sheet's speed with transfers hidden behind the work",
        "what is offloaded crosses PCIe of 16 lanes, 32 GB/s each way on A100s and 64 on H100s, at the links' share",
        "links: NVLink or PCIe inside a node, the network that NVIDIA sells with it between nodes",
    ]
