"""What every benchmark of speed shares: sizes, the work that they need, timed iterations, and the JSON line.

Neither JAX nor torch is imported, so that the peers use it in environments of their own. An iteration has phases; a
program prints one JSON line last, see `report`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

POSITIONS = 2048  # of every model


@dataclass(frozen=True)
class Sizes:
    """A model, and the batch of one iteration: `samples` answers to each prompt, all of full length."""

    family: str  # "opt" or "qwen3"
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    prompts: int
    samples: int
    prompt: int  # tokens
    answer: int  # tokens
    embed: int = 0  # size of the embedding, as OPT-350M has, which also normalises after its layers; 0: `hidden`

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def length(self) -> int:
        """Tokens of a prompt with its answer."""
        return self.prompt + self.answer

    @property
    def tokens(self) -> int:
        """Tokens of an iteration."""
        return self.rows * self.length

    @property
    def linear(self) -> int:
        """Weights of the linears of all layers."""
        attention = 2 * self.hidden * self.hidden * (1 + self.kv_heads / self.heads)
        return self.layers * int(attention + (3 if self.family == "qwen3" else 2) * self.hidden * self.mlp)

    @property
    def hf_config(self) -> dict[str, Any]:
        """The config.json of such a model, without dropout."""
        shared = {"model_type": self.family, "vocab_size": self.vocab, "hidden_size": self.hidden}
        shared |= {"num_hidden_layers": self.layers, "num_attention_heads": self.heads}
        shared |= {"max_position_embeddings": POSITIONS, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
        if self.family == "opt":
            own = {"ffn_dim": self.mlp, "word_embed_proj_dim": self.embed or self.hidden, "dropout": 0.0}
            return shared | own | {"do_layer_norm_before": not self.embed}
        sizes = {"num_key_value_heads": self.kv_heads, "head_dim": self.hidden // self.heads}
        return shared | sizes | {"intermediate_size": self.mlp, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


SIZES = {
    "A": Sizes("opt", 512, 8, 8, 8, 2048, 8192, 8, 1, 64, 64),
    "opt-125m": Sizes("opt", 768, 12, 12, 12, 3072, 50272, 8, 1, 128, 128),
    "qwen3": Sizes("qwen3", 256, 4, 4, 2, 768, 4096, 4, 4, 64, 64),
    # For GPUs, and a toy that tries their programs elsewhere.
    "opt-350m": Sizes("opt", 1024, 24, 16, 16, 4096, 50272, 8, 1, 256, 256, 512),
    "opt-1.3b": Sizes("opt", 2048, 24, 32, 32, 8192, 50272, 8, 1, 256, 256),
    "qwen3-8b": Sizes("qwen3", 4096, 36, 32, 8, 12288, 151936, 8, 1, 1024, 1024),
    "toy": Sizes("opt", 64, 2, 4, 4, 128, 512, 8, 1, 32, 16),
}


class Work(NamedTuple):
    """What a phase must do at least: products count two operations, and every weight is read once a pass."""

    flops: float
    bytes: float


def forward_work(sizes: Sizes, length: int, heads: int, itemsize: int) -> Work:
    """Of a forward pass over rows of `length` tokens, with the logits of `heads` of them; 0: a scalar head."""
    attended = length * length / 2 * sizes.layers * 4 * sizes.hidden
    flops = 2 * sizes.linear * length + 2 * sizes.hidden * sizes.vocab * heads + attended
    read = sizes.linear + (sizes.hidden * sizes.vocab if heads else 0)
    return Work(sizes.rows * flops, itemsize * read)


def generate_work(sizes: Sizes, itemsize: int) -> Work:
    """Prefill and decoding: each step reads the weights, and the keys and values so far."""
    whole = forward_work(sizes, sizes.length - 1, sizes.answer, itemsize)
    kept = 2 * sizes.layers * sizes.hidden * sizes.kv_heads / sizes.heads * itemsize
    cache = sizes.rows * kept * sum(range(sizes.prompt, sizes.length - 1))
    return Work(whole.flops, whole.bytes * sizes.answer + cache)


def update_work(sizes: Sizes, heads: int, itemsize: int) -> Work:
    """Forward, a backward pass of twice its products, and AdamW in float32: it reads four arrays and writes three."""
    forward = forward_work(sizes, sizes.length, heads, itemsize)
    return Work(3 * forward.flops, 3 * forward.bytes + 4 * 8 * (sizes.linear + sizes.hidden * sizes.vocab))


def adapter_work(sizes: Sizes, itemsize: int) -> Work:
    """Forward and the gradients of activations alone; the products of the adapters are not counted."""
    return Work(*(2 * each for each in forward_work(sizes, sizes.length, sizes.length - 1, itemsize)))


def score_work(sizes: Sizes, itemsize: int) -> Work:
    """Actor and reference with logits, critic and reward model without."""
    each = [forward_work(sizes, sizes.length, heads, itemsize) for heads in (sizes.answer, 0)]
    return Work(*(2 * sum(values) for values in zip(*each, strict=True)))


def publish_work(sizes: Sizes, itemsize: int) -> Work:
    return Work(0.0, (4 + itemsize) * (sizes.linear + sizes.hidden * sizes.vocab))


# The work of each phase of a program, from the sizes and the bytes of a number in products.
WORK: dict[str, Callable[[Sizes, int], dict[str, Work]]] = {
    "publish": lambda *of: {"publish": publish_work(*of)},
    "generate": lambda *of: {"generate": generate_work(*of)},
    "score": lambda *of: {"score": score_work(*of)},
    "train_step": lambda sizes, itemsize: {"update": update_work(sizes, sizes.length - 1, itemsize)},
    "adapter_step": lambda *of: {"update": adapter_work(*of)},
    "ppo_iteration": lambda sizes, itemsize: {
        "publish": publish_work(sizes, itemsize),
        "generate": generate_work(sizes, itemsize),
        "score": score_work(sizes, itemsize),
        "actor": update_work(sizes, sizes.answer, itemsize),
        "critic": update_work(sizes, 0, itemsize),
    },
    "grpo_iteration": lambda sizes, itemsize: {
        "publish": publish_work(sizes, itemsize),
        "generate": generate_work(sizes, itemsize),
        "score": forward_work(sizes, sizes.length, sizes.answer, itemsize),  # by the reference
        "update": update_work(sizes, sizes.answer, itemsize),
    },
}


def make_parser(doc: str, size: str = "A", dtypes: Sequence[str] = ("float32", "bfloat16")) -> argparse.ArgumentParser:
    """The arguments of every program: --size NAME, and each of its numbers by itself."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default=size, help="(default: %(default)s)")
    for field in dataclasses.fields(Sizes)[1:]:
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="in place of that of --size")
    parser.add_argument("--dtype", choices=dtypes, default=dtypes[0], help="(default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=5, help="that are timed (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="iterations before (default: %(default)s)")
    return parser


def sizes_of(args: argparse.Namespace) -> Sizes:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Sizes)[1:]}
    return dataclasses.replace(SIZES[args.size], **{name: value for name, value in given.items() if value is not None})


Lap = Callable[[str], None]  # ends the phase of this name


def measure(
    step: Callable[[Lap], None], args: argparse.Namespace, wait: Callable[[], None] = lambda: None
) -> list[dict[str, float]]:
    """Seconds of each phase of every iteration, warm-up included.

    Args:
        step: calls its argument where a phase has ended.
        wait: returns once the device has finished what `step` has started.
    """
    iterations = []
    for _ in range(args.warm_up + args.iterations):
        seconds: dict[str, float] = {}
        last = time.perf_counter()

        def lap(phase: str, seconds=seconds) -> None:
            nonlocal last
            wait()
            now = time.perf_counter()
            seconds[phase] = seconds.get(phase, 0.0) + now - last
            last = now

        step(lap)
        iterations.append(seconds)
    return iterations


def between(times: Sequence[float]) -> list[dict[str, float]]:
    """Iterations of one phase, from the times at which each and the one after the last began."""
    return [{"iteration": end - start} for start, end in itertools.pairwise(times)]


def peak_memory() -> int:
    """Bytes of the largest resident set of this process so far (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def report(
    subject: str,
    side: str,
    args: argparse.Namespace,
    iterations: list[dict[str, float]],
    measure_ceilings: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    """Print the JSON line, and return it.

    timings: the seconds of every timed iteration, and seconds, their median; first: those of the first, with
    compilation; phases: the median of each; tokens_per_second, of prompts and answers; flops, bytes: of an iteration at
    least; flops_share, bytes_share: of the ceilings, which are per second, measured in this process, the one of
    products being the larger of both dtypes'; peak_bytes: resident memory of the process before that, or of a GPU what
    was allocated.
    """
    peak, sizes, timed = peak_memory(), sizes_of(args), iterations[args.warm_up :]
    timings = [sum(each.values()) for each in timed]
    seconds, found = statistics.median(timings), measure_ceilings()
    peak = found.pop("peak_bytes", peak)
    work = WORK[subject](sizes, 4 if args.dtype == "float32" else 2)
    flops, moved = (sum(each) for each in zip(*work.values(), strict=True))
    result = {
        "subject": subject,
        "side": side,
        "dtype": args.dtype,
        "sizes": dataclasses.asdict(sizes),
        "seconds": seconds,
        "timings": timings,
        "first": sum(iterations[0].values()),
        "phases": {phase: statistics.median(each[phase] for each in timed) for phase in timed[0]},
        "tokens_per_second": sizes.tokens / seconds,
        "flops": flops,
        "bytes": moved,
        "ceilings": found,
        "flops_share": flops / seconds / max(found[each] for each in ("float32", "bfloat16") if each in found),
        "bytes_share": moved / seconds / found["memory"],
        "peak_bytes": peak,
    }
    print(json.dumps(result), flush=True)
    return result
