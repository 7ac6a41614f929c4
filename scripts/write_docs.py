"""Fill the generated parts of README.md and docs/*.md: measurements, configuration keys, model families, modules.

    python scripts/write_docs.py

The text between `<!-- NAME -->` and `<!-- /NAME -->` is written by BLOCKS[NAME]: from benchmarks/results/NAME.json
for a measurement, from the package's source for the rest.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import itertools
import json
import re
import textwrap
import tokenize
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rlhf_jax.models.families import FAMILIES
from rlhf_jax.plan.temporaries import ESTIMATE_ERROR
from rlhf_jax.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PHASES = ("publish", "generate", "score", "actor", "critic")
TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}
MODELS = {
    "opt": "OPT, all sizes",
    "gpt2": "GPT-2",
    "gpt_neo": "GPT-Neo",
    "gptj": "GPT-J",
    "gpt_neox": "GPT-NeoX, Pythia",
    "codegen": "CodeGen",
    "bloom": "BLOOM, BLOOMZ",
    "falcon": "Falcon (7B, 40B, RW)",
    "phi": "Phi-1, 1.5, 2",
    "llama": "LLaMA 1, 2, 3",
    "mistral": "Mistral 7B",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "phi3": "Phi-3",
    "olmo2": "OLMo 2",
    "stablelm": "StableLM",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3, mixture of experts",
}


def main() -> None:
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            path.write_text(filled, encoding="utf-8")
            print(path.relative_to(ROOT))


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fill(text: str) -> str:
    """The text with its generated parts filled in.

    Raises:
        KeyError: no block has the name in a mark.
    """
    marks = re.compile(r"^<!-- (\w+) -->\n.*?^<!-- /\1 -->$", re.DOTALL | re.MULTILINE)
    return marks.sub(lambda found: f"<!-- {found[1]} -->\n{BLOCKS[found[1]]()}\n<!-- /{found[1]} -->", text)


# --- measurements


def runs_of(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table_of_runs(name: str, head: list[str], row: Callable[[dict], list[str]]) -> str:
    """A table with one row per run, followed by the origin of the runs."""
    runs = runs_of(name)
    return f"{table(head, [row(run['result']) for run in runs])}\n\n{origin(runs)}"


def transposed_table(name: str, head: list[str], rows: dict[str, Callable[[dict], str]]) -> str:
    """A table with one column per run, followed by the origin of the runs."""
    runs = runs_of(name)
    cells = [[label, *(show(run["result"]) for run in runs)] for label, show in rows.items()]
    return f"{table(head, cells)}\n\n{origin(runs)}"


def origin(runs: list[dict[str, Any]]) -> str:
    """Command, commit, date and machine of the runs; if they differ, with the rows of each."""
    groups: dict[str, list[str]] = {}
    for number, run in enumerate(runs, 1):
        note = f" ({run['note']})" if "note" in run else ""
        text = f"`{run['command']}`, commit {run['commit']}, {run['date']}, {run['machine']}{note}"
        groups.setdefault(text, []).append(str(number))
    texts = list(groups)
    if len(groups) > 1:
        texts = [f"{'rows' if len(which) > 1 else 'row'} {', '.join(which)}: {text}" for text, which in groups.items()]
    return textwrap.fill(f"Source: {'; '.join(texts)}.", 116, break_long_words=False, break_on_hyphens=False)


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def demo() -> str:
    """The table of the demo over its seeds: a row per method, with means and the lowest and highest seed."""
    runs = runs_of("demo")
    results = [run["result"] for run in runs]
    before = {result["seed"]: result["greedy"]["good"] for result in results if result["method"] == "sft"}

    def spread(values: list[float], show: Callable[[float], str]) -> str:
        low, mean, high = map(show, (min(values), sum(values) / len(values), max(values)))
        return mean if low == high else f"{mean} ({low} to {high})"

    def row(method: str) -> list[str]:
        own = [result for result in results if result["method"] == method]
        shares = [spread([result[how]["good"] for result in own], percent) for how in ("sampled", "greedy")]
        change = min(result["greedy"]["good"] - before[result["seed"]] for result in own)
        timed = [result["seconds"].values() for result in own if all(result["seconds"].values())]  # 0: was resumed
        minutes = min(map(sum, timed)) / 60  # what else ran on the machine only adds to it
        is_sft = method == "sft"
        kl = spread([result["kl"] for result in own], "{:.1f}".format)
        least, trained = "" if is_sft else f"{100 * change:+.1f} points", DEMO_METHODS[method]
        return [trained, str(len(own)), *shares, least, "" if is_sft else kl, f"{minutes:.1f} min"]

    rows = [row(method) for method in DEMO_METHODS if any(result["method"] == method for result in results)]
    head = ["model", "seeds", "sampled", "greedy", "greedy against SFT, worst seed", "KL per answer"]
    head += ["fastest training"]
    content = [result["content"] for result in results if "content" in result]
    accuracy, sums = (spread([each[name] for each in content], percent) for name in ("accuracy", "sums"))
    text = f"The reward model orders {accuracy} of the held-out pairs that differ only in content; of sums, {sums}."
    source = origin(runs)
    if "; row" in source:  # the rows are those of the table of every seed
        source = "Source: that of every seed is in [docs/measurements.md](docs/measurements.md)."
    return "\n\n".join([table(head, rows), textwrap.fill(text, 116), source])


DEMO_METHODS = {"sft": "SFT, and reward model", "ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "dpo": "DPO"}


def demo_seeds() -> str:
    def row(result: dict) -> list[str]:
        cells = [str(result["seed"]), DEMO_METHODS[result["method"]].partition(",")[0]]
        for how in ("sampled", "greedy"):
            low, high = result[how]["interval"]
            cells.append(f"{percent(result[how]['good'])} ({percent(low)} to {percent(high)})")
        wrong, sums = result["greedy"]["faults"].get("wrong", 0), result["greedy"]["wrong_sums"]
        seconds = f"{sum(result['seconds'].values()):.0f}" if all(result["seconds"].values()) else "resumed"
        return [*cells, f"{wrong} ({sums})", f"{result['kl']:.2f}", seconds]

    head = ["seed", "model", "sampled", "greedy", "greedy: wrong (sums)", "KL per answer", "seconds"]
    return table_of_runs("demo", head, row)


def fit() -> str:
    def row(result: dict) -> list[str]:
        how = f"{result['trains']}, {result['rollouts']} rollouts, {result['micro_batch']} at a time"
        ours = f"{result['model']}, {how} (`configs/{result['config']}.toml`)"
        sizes = [*(result["peaks"][phase] for phase in PHASES), result["headroom"]]
        return [result["card"], result["deepspeed_chat"], ours, *(f"{size / 2**30:.1f}" for size in sizes)]

    return table_of_runs("fit", ["card", "DeepSpeed-Chat's largest", "here", *PHASES, "headroom"], row)


def plan() -> str:
    def row(result: dict) -> list[str]:
        compiled = f"{result['compiled']:.1f}"  # GiB, from the configuration's header
        bounds = " to ".join(f"{size / 2**30:.1f}" for size in result["bounds"])
        took = f"{result['seconds']:.1f} ({result['cpu_seconds']:.1f} CPU)"
        return [
            f"`{result['config']}`",
            result["card"],
            f"{result['usable'] / 2**30:.1f}",
            compiled,
            bounds,
            result["verdict"],
            took,
        ]

    results = [run["result"] for run in runs_of("plan")]
    shares = [[each[key] for each in results if each[key] is not None] for key in ("least_share", "largest_share")]
    least, largest = min(shares[0]), max(shares[1])
    count, share = sum(each["programs"] for each in results), f"{percent(least, 0)} to {percent(largest, 0)}"
    text = (
        f"{count} compiled programs had {share} of the estimated temporaries, not counting 64 MiB of each, which the "
        f"upper bound adds; it also adds {percent(ESTIMATE_ERROR, 0)} to the estimate. GiB on one GPU:"
    )
    head = ["configuration", "card", "usable", "compiled peak", "bounds", "without the plugin", "seconds"]
    return f"{textwrap.fill(text, 116)}\n\n{table_of_runs('plan', head, row)}"


def import_export() -> str:
    def megabytes(key: str) -> Callable[[dict], str]:
        return lambda result: f"{result[key] / 1e6:,.0f}"

    rows = {
        "parameters on the devices, MB": megabytes("devices"),
        "largest tensor of the files, MB": megabytes("largest"),
        "peak resident memory of the import above that before it, MB": megabytes("resident"),
        "the same without pages of files, MB": megabytes("anonymous"),
        "peak within parameters + 1.5 x largest tensor": lambda result: "yes" if result["within"] else "no",
        "peak resident memory of the export above that before it, MB": megabytes("exporting"),
        "import, MB/s of the files read": megabytes("import"),
        "export, MB/s of the files written": megabytes("export"),
        "plain copy of the files read, MB/s": megabytes("copy"),
    }
    return transposed_table("import_export", ["", *(run["result"]["dtype"] for run in runs_of("import_export"))], rows)


def megabytes(key: str) -> Callable[[dict], str]:
    return lambda result: f"{result[key] / 1e6:,.0f}"


def process_memory() -> str:
    rows = {
        "parameters, MB": megabytes("parameter_bytes"),
        "shards of this process, MB": megabytes("shard_bytes"),
        "largest tensor, MB": megabytes("largest_tensor_bytes"),
        "peak resident memory above that before, MB": megabytes("peak_bytes"),
        "the peak above the shards, in largest tensors": lambda r: f"{r['largest_tensors_above_shards']:.2f}",
    }
    heads = (f"process {run['result']['process']}" for run in runs_of("process_memory"))
    return transposed_table("process_memory", ["", *heads], rows)


def pickle_memory() -> str:
    rows = {
        "parameters, MB": megabytes("parameter_bytes"),
        "largest tensor, MB": megabytes("largest_tensor_bytes"),
        "peak resident memory above that before reading, MB": megabytes("peak_bytes"),
        "the peak above the parameters, in largest tensors": lambda r: f"{r['largest_tensors_above_parameters']:.2f}",
    }
    return transposed_table("pickle_memory", ["", *(run["result"]["dtype"] for run in runs_of("pickle_memory"))], rows)


def data() -> str:
    rows = {
        "dialogues; tokens; bytes of text": lambda r: f"{r['rows']:,}; {r['tokens']:,}; {r['text_bytes'] / 1e9:.2f} GB",
        "rows per second, from the file to what is stored": lambda r: f"{r['rows_per_second']:,.0f}",
        "the tokenizers library alone, rows per second": lambda r: f"{r['tokenizers_rows_per_second']:,.0f}",
        "share of that speed": lambda r: percent(r["share_of_tokenizers"], 0),
        "peak resident memory meanwhile": lambda r: f"{r['build_rss_bytes'] / 1e6:,.0f} MB",
        "stored on disk": lambda r: f"{r['store_bytes'] / 1e6:,.0f} MB",
        "a second run: imports and tokenizer, then the first batch": lambda r: (
            f"{r['imports_seconds']:.1f} s, then {r['first_batch_seconds']:.1f} s"
        ),
        "batches of 64, rows per second": lambda r: f"{r['served_rows_per_second']:,.0f}",
        "that, over what SFT of the demo's model consumes": lambda r: f"{r['served_over_consumed']:,.0f} times",
        "peak resident memory meanwhile; growth after a fifth of the epoch": lambda r: (
            f"{r['serving_rss_bytes'] / 1e6:,.0f} MB; {r['serving_rss_growth_after_a_fifth'] / 1e6:.0f} MB"
        ),
    }
    return transposed_table("data", ["", "measured"], rows)


def chaos() -> str:
    runs = runs_of("chaos")

    def counts(kinds: dict[str, int]) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))

    def row(result: dict) -> list[str]:
        numbers = [str(result[key]) for key in ("processes", "kills", "runs", "equal_files")]
        others = f"{result['seconds_until_others_end']:.0f} s" if result["processes"] > 1 else ""
        return [*numbers, counts(result["moments"]), counts(result["stages"]), others]

    head = ["processes", "kills", "runs", "equal files of each", "kills by moment aimed at", "kills by stage"]
    head += ["the others end within"]
    return f"{table(head, [row(run['result']) for run in runs])}\n\n{origin(runs)}"


def skip_cost() -> str:
    rows = {
        "CPU seconds of a step, with the choice and without": lambda r: (
            f"{r['checked']['cpu_seconds']:.2f}, {r['unchecked']['cpu_seconds']:.2f}"
        ),
        "ratio": lambda r: f"{r['cpu_seconds_ratio']:.3f}",
        "ratio of the bytes that the compiled programs access": lambda r: f"{r['bytes_accessed_ratio']:.3f}",
    }
    return transposed_table("skip_cost", ["", "the demo's SFT"], rows)


def save_cost() -> str:
    rows = {
        "parameters": lambda r: f"{r['parameters'] / 1e6:.1f} million",
        "rows x tokens of a step": lambda r: f"{r['batch'][0]} x {r['batch'][1]}",
        "seconds of a step": lambda r: f"{r['seconds_step']:.2f}",
        "`run.save_every`": lambda r: str(r["save_every"]),
        "seconds that the loop waits for a save": lambda r: f"{r['seconds_wait']:.3f}",
        "seconds of the whole save, with checksums": lambda r: f"{r['seconds_save']:.2f}",
        "share of the steps' time, waiting alone": lambda r: percent(r["share_least"], 3),
        "share, if nothing overlapped": lambda r: percent(r["share_most"], 2),
        "checkpoint": lambda r: f"{r['bytes'] / 1e6:.1f} MB",
        "seconds of comparing checksums": lambda r: f"{r['seconds_checksums']:.2f}",
        "seconds of resuming, checksums included": lambda r: f"{r['seconds_resume']:.2f}",
    }
    names = {"demo": "demo", "125m": "OPT-125M"}
    return transposed_table("save_cost", ["", *(names[run["result"]["model"]] for run in runs_of("save_cost"))], rows)


def quantised_errors() -> str:
    runs = [run for run in runs_of("quantised") if run["result"]["error"]]
    rows = [
        [
            *(str(run["result"]["seed"]), str(run["result"]["steps"]), kind),
            *(percent(error["kernels"], 2), percent(error["logits"]), percent(error["same_argmax"])),
            f"{error['bits_per_weight']:.2f}",
        ]
        for run in runs
        for kind, error in run["result"]["error"].items()
    ]
    head = ["seed", "LoRA steps of the run", "base", "error of kernels", "error of logits", "same likeliest token"]
    return table([*head, "bits per weight"], rows)


def quantised() -> str:
    def row(result: dict) -> list[str]:
        cells = [str(result["seed"]), str(result["steps"])]
        for kind in ("float32", "nf4", "int8"):
            entry = result["lora"].get(kind)
            cells.append(
                f"{entry['held_out_loss_before']:.3f}, {entry['held_out_loss_after']:.4f}" if entry else "not run"
            )
        over = {kind: entry["over_float32"] for kind, entry in result["lora"].items() if kind != "float32"}
        return [*cells, ", ".join(f"{kind} {share:+.2%}" for kind, share in over.items())]

    return table_of_runs("quantised", ["seed", "steps", "float32", "NF4", "int8", "after, over float32"], row)


def slot_refill() -> str:
    def row(result: dict) -> list[str]:
        ways = {"batches": "batches, each waiting for its slowest answer", "refilled": "decode slots, refilled"}
        sizes = [f"{ways[result['way']]}", str(result["prompts"]), str(result["rows"]), f"{result['steps']:,}"]
        return [*sizes, f"{result['seconds']:.2f}", f"{result['tokens_per_second']:,.0f}"]

    return table_of_runs(
        "slot_refill", ["", "prompts", "at a time", "decode steps", "seconds", "tokens per second"], row
    )


def serving() -> str:
    def row(result: dict) -> list[str]:
        names = {"rlhf_jax": "`rlhf-jax serve`", "transformers": "`transformers serve`"}
        kind = "greedy" if result["temperature"] == 0 else f"temperature {result['temperature']:g}"
        first = [f"{result[f'first_token_{part}']:.2f} s" for part in ("p50", "p95")]
        model = f"{result['layers']} x {result['hidden']}, {result['tokens']} tokens"
        return [
            names[result["server"]],
            model,
            str(result["streams"]),
            kind,
            f"{result['tokens_per_second']:,.1f}",
            *first,
        ]

    head = [
        "server",
        "layers x width, answers of",
        "streams",
        "sampled",
        "tokens per second",
        "time to first token, median",
        "95%",
    ]
    return table_of_runs("serve", head, row)


WORK = {
    "ppo_iteration": "PPO iteration",
    "grpo_iteration": "GRPO iteration",
    "generate": "generation",
    "train_step": "SFT step",
    "score": "scoring",
}
SPEED_SIZES = {"A": "A", "opt-125m": "OPT-125M", "qwen3": "Qwen3"}


def speed(name: str = "compare") -> str:
    """A row per peer: seconds in the fastest dtype of each side, their ratio, and that of the peak memory."""

    def row(result: dict) -> list[str]:
        own, other = (f"{result[side]['seconds']:.3f} ({result[side]['dtype']})" for side in ("own", "other"))
        ratios = [f"{result['ratio']:.2f}", f"{result['wanted']:g}", f"{result['memory_ratio']:.2f}"]
        return [WORK[result["subject"]], SPEED_SIZES[result["size"]], own, result["peer"], other, *ratios]

    head = ["", "size", "here, seconds", "peer", "its seconds", "ratio", "aimed at", "peak memory over the peer's"]
    return table_of_runs(name, head, row)


def speed_amx() -> str:
    """`speed` of a processor with matrix instructions."""
    return speed("compare_amx")


def speed_float32() -> str:
    """`speed` of a processor that does not multiply in bfloat16."""
    return speed("compare_float32")


def speed_phases() -> str:
    """A row per side of the PPO iterations: the seconds of each phase, and the shares of the machine's ceilings."""
    runs = [run["result"] for run in runs_of("compare") if run["result"]["subject"] == "ppo_iteration"]
    rows = []
    for size in dict.fromkeys(result["size"] for result in runs):
        same = [result for result in runs if result["size"] == size]
        sides = {"here": same[0]["own"]} | {result["peer"]: result["other"] for result in same}
        for name, side in sides.items():
            seconds = [f"{side['phases'][phase]:.2f}" if phase in side["phases"] else "" for phase in PHASES]
            shares = [percent(side[f"{kind}_share"], 0) for kind in ("flops", "bytes")]
            rows.append([SPEED_SIZES[size], name, *seconds, *shares, f"{side['peak_bytes'] / 2**30:.2f}"])
    return table(["size", "", *PHASES, "of the products' ceiling", "of the memory's", "peak, GiB"], rows)


def start_up() -> str:
    rows = {
        "`import rlhf_jax`, seconds": lambda r: f"{r['seconds']['import']:.2f}",
        "`rlhf-jax --help`": lambda r: f"{r['seconds']['help']:.2f}",
        "`rlhf-jax plan configs/opt-175b-multi_node.toml`": lambda r: f"{r['seconds']['plan']:.1f}",
        "first PPO iteration of a run, compilation included": lambda r: f"{r['first_steps'][0]:.1f}",
        "the same of a second run": lambda r: f"{r['first_steps'][1]:.1f}",
    }
    return transposed_table("compile", ["", *(run["result"]["size"] for run in runs_of("compile"))], rows)


def host_time() -> str:
    def row(result: dict) -> list[str]:
        sizes = [SPEED_SIZES[result["size"]], result["dtype"], str(result["iterations"])]
        return [*sizes, f"{result['seconds']:.2f}", percent(result["share"])]

    return table_of_runs("host_time", ["size", "dtype", "iterations", "seconds of one", "no program executes"], row)


def packing() -> str:
    def row(result: dict) -> list[str]:
        counts = [f"{result['documents']:,} {result['kind']}s", str(result["length"]), f"{result['packed_rows']:,}"]
        forms = ("one_length", "few_lengths", "packed")
        return [result["file"], *counts, *(percent(result["padding"][form]) for form in forms)]

    lengths = max(run["result"]["lengths"] for run in runs_of("packing"))
    forms = ("one length", f"up to {lengths} lengths", "packed")
    head = ["file", "rows", "tokens", "packed rows", *(f"padding, {form}" for form in forms)]
    return table_of_runs("packing", head, row)


def real_data() -> str:
    (run,) = runs_of("real_data")
    found = run["result"]
    before, after = (percent(found[f"reward_held_out_accuracy_{when}"]) for when in ("before", "after"))
    losses = (f"{found[f'sft_held_out_loss_{when}']:.2f}" for when in ("before", "after"))
    rows = [
        ["SFT: held-out loss, 60 steps", *losses],
        [
            "reward model: held-out accuracy, 60 steps",
            before,
            f"{after} (always the longer answer: {percent(found['reward_longer_is_chosen'])})",
        ],
        [
            "PPO: mean score of the first and last five of 30 iterations",
            *(f"{found[f'ppo_score_{which}_five']:.2f}" for which in ("first", "last")),
        ],
    ]
    parity = (
        f"The export in torch transformers: logits differ by {found['logits_relative_error']:.0e} relative, and "
        f"{percent(found['greedy_answers_identical'], 0)} of eight greedy answers are identical."
    )
    return f"{table(['', 'before', 'after'], rows)}\n\n{parity}\n\n{origin([run])}"


def alpaca_pairs() -> str:
    """A row for all pairs, and one for each quarter of them by the difference of lengths."""
    run = next(run for run in runs_of("recipes") if run["result"]["recipe"] == "alpaca_pairs")
    found = run["result"]["reward_pairs"]

    def row(label: str, part: dict[str, Any]) -> list[str]:
        def cell(name: str) -> str:
            low, high = part[f"{name}_interval"]
            return f"{percent(part[name])} ({percent(low)} to {percent(high)})"

        return [label, f"{part['pairs']:,}", cell("accuracy"), cell("longer")]

    rows = [row("all", found)]
    rows += [row(f"chosen longer by {part['from']} to {part['to']} tokens", part) for part in found["by_length"]]
    head = ["held-out pairs", "number", "reward model", "always the longer answer"]
    return f"{table(head, rows)}\n\n{origin([run])}"


def ablations() -> str:
    """A row per change of the demo's PPO and seed."""

    def row(result: dict[str, Any]) -> list[str]:
        shares = [percent(result[how]["good"]) for how in ("sampled", "greedy")]
        numbers = (f"{result[name]:.2f}" for name in ("kl", "explained_variance", "actor_entropy"))
        return [result["change"], *shares, *numbers, f"{1000 * result['seconds_update']:.0f}"]

    seeds = {run["result"]["seed"] for run in runs_of("ablations")}
    assert len(seeds) == 1, "a table of several seeds needs a column for them"
    shown = ["sampled", "greedy", "KL per answer", "explained variance", "entropy", "ms per update"]
    return table_of_runs("ablations", [f"PPO of seed {seeds.pop()}", *shown], row)


def gsm8k() -> str:
    """The rewards of the first and last iterations, and the form of held-out answers before and after."""
    run = next(run for run in runs_of("recipes") if run["result"]["recipe"] == "gsm8k")
    found = run["result"]

    def row(label: str, name: str, show: Callable[[float], str]) -> list[str]:
        return [label, *(show(found[name][when]) for when in ("first", "last"))]

    rows = [
        row("answers in the form that is rewarded", "reward/is_formatted", percent),
        row("answers with the right number", "reward/is_correct", percent),
        row("answers that end by themselves", "ended_by_eos", percent),
        row("tokens per answer", "response_length", "{:.0f}".format),
    ]
    head = ["", "first five iterations", f"last five of {found['iterations']}"]
    held = found["held_out"]
    shares = " before and ".join(percent(held[f"{name}_score"]) for name in ("sft", "grpo"))
    text = (
        f"Of the sampled answers to {held['prompts']} held-out questions, {shares} after GRPO have that form; the KL "
    )
    text += (
        f"to the SFT model is {held['grpo_kl']:.1f} per answer, since they are shorter: {held['sft_length']:.0f} and "
    )
    text += f"{held['grpo_length']:.0f} tokens."
    return "\n\n".join([table(head, rows), textwrap.fill(text, 116), origin([run])])


def consumers() -> str:
    """A row per exported model, a column per consumer."""
    runs = runs_of("consumers")
    outcomes = [run["result"]["outcomes"] for run in runs]
    rows = [[model, *(found[model].replace("|", "\\|") for found in outcomes)] for model in outcomes[0]]
    return f"{table(['model', *(run['result']['versions'] for run in runs)], rows)}\n\n{origin(runs)}"


def history() -> str:
    lines, group = [], ""
    for run in runs_of("history"):
        note = run["result"]
        if note["group"] != group:
            group = note["group"]
            lines += ["", f"### {group}", ""]
        how = "" if run["command"] == "by hand" else f"`{run['command']}`, "
        text = f"**{note['title']}.** {note['text']} ({how}commit {run['commit']}, {run['date']}, {run['machine']})"
        lines.append(textwrap.fill(text, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(lines[1:])


# --- the package


def families() -> str:
    """The table of model families; raises KeyError if a family has no name here."""
    exports = {name: FAMILIES[name].scalar for name in [*MODELS, *(FAMILIES.keys() - MODELS.keys())]}
    rows = [[MODELS[name], f"`{name}`", f"`{scalar}`" if scalar else "own folder"] for name, scalar in exports.items()]
    return table(["models", "`model_type`", "reward model, exported as"], rows)


def floors() -> str:
    """The floors of tests/test_floors.py, the lowest first."""
    tree = ast.parse((ROOT / "tests" / "test_floors.py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "FLOORS")
    lines = [", ".join(f"`{name or '__init__'}`" for name in floor) for floor in ast.literal_eval(found.value)]
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def modules() -> str:
    """Every module of the package with the first sentence of its docstring."""
    package, rows = ROOT / "rlhf_jax", []
    for path in sorted(package.rglob("*.py"), key=lambda path: (path.parent, path.name)):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        name = str(path.relative_to(package))
        if path.name == "__init__.py":
            name = f"{path.parent.relative_to(package.parent)}/"
        first = re.split(r"\.\s+(?=[A-Z])", " ".join(text.split("\n\n")[0].split()))[0].rstrip(".:")
        if first:
            rows.append([f"`{name}`", first.replace("|", "\\|")])
    return table(["module", "content"], rows)


def metrics() -> str:
    """Every metric, from the package's own table."""
    rows = [
        [", ".join(f"`{name}`" for name in each["names"]), each["unit"], each["stages"], each["meaning"]]
        for each in tomllib.loads((ROOT / "rlhf_jax" / "report" / "metrics.toml").read_text(encoding="utf-8"))["metric"]
    ]
    return table(["name", "unit", "stages", "meaning"], rows)


def configuration() -> str:
    """A table of keys for each section, and for each table within one."""
    lines = []
    for schema, places in sections().items():
        names = ", ".join(f"`[[{place}]]`" if is_array else f"`[{place}]`" for place, _, is_array in places)
        lines += ["", f"## {names}", ""]
        lines.append(table(["key", "type", "default", "meaning"], list(key_rows(schema, places))))
    return "\n".join(lines[1:])


def sections() -> dict[type, list[tuple[str, Any, bool]]]:
    """{dataclass: [(dotted name, the default there or MISSING, whether it is an array of tables)]}."""
    found: dict[type, list[tuple[str, Any, bool]]] = {}

    def visit(schema: type, default: Any, place: str) -> None:
        for field in dataclasses.fields(schema):
            kind = get_type_hints(schema)[field.name]
            inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
            if dataclasses.is_dataclass(inner):
                name, value = f"{place}.{field.name}".lstrip("."), default_of(field, default)
                is_array = inner is not kind
                found.setdefault(inner, []).append((name, dataclasses.MISSING if is_array else value, is_array))
                visit(inner, dataclasses.MISSING if is_array else value, name)

    visit(Recipe, dataclasses.MISSING, "")
    return found


def default_of(field: dataclasses.Field, parent: Any) -> Any:
    if parent is not dataclasses.MISSING:
        return getattr(parent, field.name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def key_rows(schema: type, places: list[tuple[str, Any, bool]]) -> Iterator[list[str]]:
    """[key, type, default, meaning] of each field.

    Raises:
        ValueError: a key has no meaning.
    """
    comments = meanings(schema)
    for field in dataclasses.fields(schema):
        if not comments.get(field.name):
            raise ValueError(f"{schema.__name__}.{field.name} has no comment that says what it means")
        kind = get_type_hints(schema)[field.name]
        defaults = {place: toml_value(default_of(field, value)) for place, value, _ in places}
        same = len(set(defaults.values())) == 1
        default = next(iter(defaults.values())) if same else ", ".join(f"{v} ({p})" for p, v in defaults.items())
        yield [f"`{field.name}`", type_name(kind), default, comments[field.name].replace("|", "\\|")]


def meanings(schema: type) -> dict[str, str]:
    """{field: its comment} of a dataclass and its bases: the one on its lines, or else the one above them."""
    found: dict[str, str] = {}
    for parent in reversed([parent for parent in schema.__mro__ if dataclasses.is_dataclass(parent)]):
        source = textwrap.dedent(inspect.getsource(parent))
        whole, trailing = comments_of(source)
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                inside = [trailing[line] for line in range(node.lineno, node.end_lineno + 1) if line in trailing]
                above = itertools.takewhile(whole.__contains__, range(node.lineno - 1, 0, -1))
                found[node.target.id] = " ".join(inside or [whole[line] for line in above][::-1])
    return found


def comments_of(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """{line: comment} of lines that are only a comment, and of the other lines."""
    whole, trailing = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (whole if alone else trailing)[token.start[0]] = token.string.lstrip("# ")
    return whole, trailing


def type_name(kind: Any) -> str:
    """A type in terms of TOML."""
    if dataclasses.is_dataclass(kind):
        return "table"
    if get_origin(kind) is Literal:
        return ", ".join(toml_value(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"array of {type_name(get_args(kind)[0])}s"
    if get_origin(kind) is dict:
        return f"table of {type_name(get_args(kind)[1])}s"
    if get_origin(kind) is types.UnionType:
        return " or ".join(map(type_name, get_args(kind)))
    return TYPES[kind]


def toml_value(value: Any) -> str:
    """A value in TOML syntax."""
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        return "below"
    return f"`{json.dumps(value)}`"


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block
    for block in (
        *(
            demo,
            demo_seeds,
            fit,
            plan,
            import_export,
            pickle_memory,
            process_memory,
            data,
            chaos,
            skip_cost,
            save_cost,
            quantised,
            quantised_errors,
            slot_refill,
            serving,
            speed,
            speed_amx,
            speed_float32,
            speed_phases,
            host_time,
            start_up,
            packing,
            real_data,
            alpaca_pairs,
            ablations,
            gsm8k,
            consumers,
        ),
        *(history, families, floors, modules, metrics, configuration),
    )
}

if __name__ == "__main__":
    main()
