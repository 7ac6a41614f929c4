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

from rlhf_jax.data.sources import BUILTIN, DataConfig, load_examples
from rlhf_jax.gpus import Gpu, Machine
from rlhf_jax.mesh import TRAIN, Layout
from rlhf_jax.models.architecture import DecoderConfig
from rlhf_jax.models.decoder import Remat, abstract_params
from rlhf_jax.plan.held import Phase, architectures, device_bytes, prompt_positions
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.ppo import ppo_sizes
from rlhf_jax.stages.sizes import micro_batches


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet that are expected to be reached."""

    matmul: float = 0.35  # of FLOP/s: half is reported for long sequences on H100 (MaxText, 7B); 512 tokens reach less
    memory: float = 0.6  # of the bandwidth, while decoding
    link: float = 0.6  # of the links


@dataclass(frozen=True)
class Need:
    """What one GPU does in a phase: FLOPs of matrix products, bytes of its memory, bytes over its links."""

    flops: float = 0.0
    memory: float = 0.0
    link: float = 0.0

    def floor(self, flops_rate: float, machine: Machine) -> float:
        return max(self.flops / flops_rate, self.memory / machine.gpu.bandwidth, self.link / slowest_link(machine))

    def expected(self, flops_rate: float, machine: Machine, share: Efficiency) -> float:
        work = max(self.flops / flops_rate / share.matmul, self.memory / machine.gpu.bandwidth / share.memory)
        return work + self.link / slowest_link(machine) / share.link


def slowest_link(machine: Machine) -> float:
    """Bytes a second of one GPU over what a collective of all has to cross."""
    return machine.gpu.network if machine.nodes > 1 else machine.gpu.link


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


def training_factor(lora_rank: int, remat: Remat) -> int:
    """Forward passes that an update costs: 1, with recomputation 1 more, and 1 for the gradients of the activations,
    1 for those of the weights, which adapters spare but for their own."""
    return 2 + (remat == "layers") + (lora_rank == 0)


def needs(recipe: Recipe, found: list[Phase], mesh) -> dict[str, Need]:
    """{"stage/name": Need} of one GPU, in one optimizer step (SFT, reward model) or one iteration (PPO)."""
    layout, trained = Layout(mesh, TRAIN), recipe.layout(mesh)
    count = layout.shards("batch")
    actor, critic = architectures(recipe, layout.shards("vocab"))
    by_name = {f"{phase.stage}/{phase.name}": phase for phase in found}
    result = {}
    for stage, decoder in {"sft": actor, "reward": critic}.items():
        if f"{stage}/update" in by_name:
            state, batch = by_name[f"{stage}/update"].args
            config, length = getattr(recipe, stage), batch.tokens.shape[-1]
            rows = math.prod(batch.tokens.shape[:-1])
            micro = micro_batches(stage, config.batch_size, config.micro_batch_size, layout)
            flops = forward_flops(decoder, rows, length, length if stage == "sft" else 0)
            result[f"{stage}/update"] = _update(recipe.model, decoder, state, flops, micro, count, trained)
    if "ppo/generate" not in by_name:
        return result

    config, model = recipe.ppo, recipe.model
    rows, new = config.rollout_batch_size, config.sample.max_new_tokens
    prompt = prompt_positions(recipe, min(actor.max_positions, critic.max_positions))
    length = prompt + new
    weights, cache = device_bytes(by_name["ppo/generate"].args[0]), by_name["ppo/generate"].cache
    tensor = mesh.shape["tensor"]
    local = rows / (mesh.shape["data"] * mesh.shape["fsdp"])  # rows of a tensor group
    width = model.compute.dtype.itemsize
    # (t - tg) / (t tg) of the model comes over the links, t and tg being the shards of training and generation.
    moved = weights * (1 - tensor / trained.shards("vocab"))
    result["ppo/publish"] = Need(memory=device_bytes(by_name["ppo/publish"].args) + 2 * weights, link=moved)
    decode = (
        forward_flops(actor, 1, 1, 1) + 4 * (prompt + new / 2) * actor.num_heads * actor.head_dim * actor.num_layers
    )
    # Of the embedding a few rows are looked up; the head beside it is read whole. On average half the answers' cache.
    reread = weights - actor.padded_vocab * actor.embed_size * width / tensor
    reads = new * (reread + cache * (prompt + new / 2) / length)
    prefill = forward_flops(actor, local, prompt, 1) / tensor
    reduced = 2 * 2 * (tensor - 1) / tensor * local * length * actor.hidden_size * width * actor.num_layers
    result["ppo/generate"] = Need(prefill + new * local * decode / tensor, reads + weights, reduced)
    passes = 2 * forward_flops(actor, rows, length, new) + 2 * forward_flops(critic, rows, length, 0)
    gathered = 2 * sum(_gathered(each, model, trained.shards("vocab")) for each in (actor, critic))
    result["ppo/score"] = Need(passes / count, link=gathered)
    batch_size, micro = ppo_sizes(config, layout)
    updates = config.ppo_epochs * rows // batch_size
    for name, decoder, head in (("actor", actor, new), ("critic", critic, 0)):
        flops = forward_flops(decoder, batch_size, length, head)
        once = _update(model, decoder, by_name[f"ppo/{name}"].args[0], flops, micro, count, trained)
        result[f"ppo/{name}"] = Need(*(updates * part for part in dataclasses.astuple(once)))
    return result


def _gathered(decoder: DecoderConfig, model: ModelConfig, count: int) -> float:
    """Bytes that reach a GPU when every weight is gathered once, in the dtype of the computation."""
    total = sum(math.prod(leaf.shape) for leaf in abstract_params(decoder).values())
    return total * model.compute.dtype.itemsize * (1 - 1 / count)


def _update(model: ModelConfig, decoder: DecoderConfig, state, flops: float, micro: int, count: int, layout) -> Need:
    """One optimizer step: passes; weights gathered in each; gradients scattered; Adam reads 4 and writes 3 arrays."""
    rank = model.role(decoder).lora.rank
    shards, sums, moments = (each.shards("vocab") for each in (layout, layout.gradients, layout.moments))
    trainable = device_bytes(state.trainable) * shards
    # Scattered over those that split the sum of gradients, and what each of them then has reduced over all others.
    reduced = trainable * (1 - 1 / sums) + 2 * trainable / sums * (1 - sums / count)
    link = micro * ((2 + (model.remat != "none")) * _gathered(decoder, model, shards) + reduced)
    link += trainable * (1 / shards - 1 / moments)  # new parameters, back to whoever has the old ones
    return Need(flops * training_factor(rank, model.remat) / count, 7 * trainable / moments, link)


def timetable(recipe: Recipe, found: list[Phase], mesh, machine: Machine, price: float) -> dict[str, dict]:
    """{stage: {"phases", "floor" and "expected" seconds of a step, an epoch and the stage, "steps", "cost", ...}}.

    Args:
        price: of one GPU for an hour; 0: no cost is told.
    """
    flops_rate = matmul_rate(machine.gpu, recipe.model.dtype)
    share, table = Efficiency(), {}
    for name, need in needs(recipe, found, mesh).items():
        stage, phase = name.split("/")
        entry = table.setdefault(stage, {"phases": {}})
        floor, expected = need.floor(flops_rate, machine), need.expected(flops_rate, machine, share)
        entry["phases"][phase] = {"floor": floor, "expected": expected}
    for stage, entry in table.items():
        entry["floor"] = sum(times["floor"] for times in entry["phases"].values())
        entry["expected"] = sum(times["expected"] for times in entry["phases"].values())
        config = getattr(recipe, stage)
        rows = training_rows(recipe.data, stage)
        size = config.rollout_batch_size if stage == "ppo" else config.batch_size
        steps = rows // size if rows else None  # of one epoch
        entry |= {"rows": rows, "steps_per_epoch": steps, "steps": config.steps or (steps and config.epochs * steps)}
        for kind in ("floor", "expected"):
            entry[f"{kind}_epoch"] = steps and entry[kind] * steps
            entry[f"{kind}_stage"] = entry["steps"] and entry[kind] * entry["steps"]
        rate = price * machine.count / 3600
        entry["cost_of_step"] = rate * entry["expected"] if price else None
        entry["cost"] = rate * entry["expected_stage"] if price and entry["steps"] else None
    return table


def training_rows(data: DataConfig, stage: str) -> int | None:
    """Rows of a stage before any is dropped for its length; None where a source would have to be downloaded."""
    if any(source.path != BUILTIN and not Path(source.path).is_file() for source in data.sources):
        return None
    return len(load_examples(data, stage, held_out=False))


def assumptions(recipe: Recipe) -> list[str]:
    """What the expected seconds rest on."""
    share = Efficiency()
    offloaded = ["offloaded moments cross to host memory and back in every update: that time is not counted"]
    return [
        f"expected seconds assume {share.matmul:.0%} of the GPU's matrix FLOP/s, {share.memory:.0%} of its memory "
        f"bandwidth and {share.link:.0%} of its links, transfers not hidden; none of this was measured",
        f"every prompt fills its {recipe.data.max_prompt_length} tokens and every answer its "
        f"{recipe.ppo.sample.max_new_tokens}; rows of SFT and reward model fill {recipe.data.max_length}",
        "a floor is the data sheet's speed with transfers hidden behind the work",
        "links: NVLink or PCIe inside a node, the network that NVIDIA sells with it between nodes",
        *(offloaded if recipe.model.offload_optimizer else []),
    ]
