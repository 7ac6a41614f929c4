"""The measurements of one device as Markdown."""

from __future__ import annotations

from rlhf_jax.hardware import GPUS, Gpu

MIB = 2**20
PHASES = ("publish", "generate", "score", "actor", "critic")
# Rollouts per second of PPO of OPT-1.3B with a critic of 350M, 256 + 256 tokens, on one A100-80GB: DeepSpeed-Chat's
# table of step 3, 11.7 hours for 264,292 rollouts.
DEEPSPEED_CHAT = 264_292 / (11.7 * 3600)
ADAPTER_TOKENS = 12_000  # per second of one H100, training adapters of 8 billion parameters


def render(result: dict) -> str:
    """The Markdown text of `benchmarks/results/*.md`."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    what = f"{result['count']} x {result['device']}" + " (toy size: says nothing about speed)" * result["small"]
    about = f"{result['date']}, commit {result['commit']}, {versions}, {' '.join(result['platform'].split())}"
    lines = [f"# {what}", "", f"{about}; {result['seconds']:.0f} s in all.", ""]
    for name, part in result["parts"].items():
        if part["error"]:
            lines += [f"- **{name} failed**: {part['error']}"]
    parts = {name: part["result"] for name, part in result["parts"].items()}
    lines += goals(parts, result["device"], result["count"])
    lines += parity(parts.get("parity", {})) + decode(parts.get("decode", {}))
    lines += memory([part for name, part in parts.items() if name.startswith("memory")])
    lines += phases(parts.get("phases", {}))
    return "\n".join(lines) + "\n"


def table(title: str, head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    if not rows:
        return ["", f"## {title}", "", "nothing measured"]
    body = [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]
    return ["", f"## {title}", "", *body]


def goals(parts: dict[str, dict], device: str, count: int) -> list[str]:
    """What is wanted of a GPU, and what was measured; rates of other GPUs are scaled by the products that both can do.

    A goal without a measurement has no row, nor one of a GPU whose peak is not known.
    """
    gpu = next((each for each in GPUS.values() if each.title == device), None)
    decoding = parts.get("decode", {}).get("runs", [])[:1]
    steps = {name: line for name in ("training", "training adapters") for line in parts.get(name, {}).get("lines", [])}
    rows = [
        (f"memory bandwidth, decoding {run['batch']} answers", "65%", f"{run['share_of_bandwidth']:.0%}")
        for run in decoding
    ]
    if gpu and "training" in steps:
        step = steps["training"]
        rows.append(("MFU, training all weights", "50%", f"{step['flops'] / step['seconds'] / gpu.flops:.0%}"))
    if gpu and "training adapters" in steps:
        wanted, got = scale_rate(ADAPTER_TOKENS, gpu, "H100-80GB"), steps["training adapters"]["tokens_per_second"]
        rows.append(("tokens/s, training adapters of 8B", f"{wanted:,.0f}", f"{got:,.0f}"))
    seconds = parts.get("phases", {}).get("seconds", {})
    if gpu and count == 1 and all(seconds.get(phase) for phase in PHASES):
        got = parts["phases"]["tokens"]["rows"] / sum(min(seconds[phase]) for phase in PHASES)
        published = scale_rate(DEEPSPEED_CHAT, gpu, "A100-80GB")
        rows.append(("PPO rollouts/s, of those of DeepSpeed-Chat", "2.0", f"{got / published:.2f}"))
    for line in parts.get("peers", {}).get("lines", []):
        name = f"{line['subject']}/{line['size']}: seconds of {line['peer']}, of these"
        rows.append((name, f"{line['wanted']:.2f}", f"{line['ratio']:.2f}"))
    return table("Goals", ("what", "at least", "measured"), rows)


def scale_rate(rate: float, gpu: Gpu, published: str) -> float:
    """A rate of a published GPU at the products per second of this one."""
    return rate * gpu.flops / GPUS[published].flops


def parity(found: dict) -> list[str]:
    counts = [(kind, len(names)) for kind, names in found.items()]
    return table("Parity in bfloat16", ("tests", "number"), counts)


def decode(found: dict) -> list[str]:
    rows = [
        (
            *(run["variant"], run["batch"], f"{run['tokens_per_second']:,.0f}", f"{run['bytes_per_step'] / MIB:,.0f}"),
            *(f"{run['share_of_bandwidth']:.0%}", f"{run['ends at once']:.4f}", f"{run['never ends']:.4f}"),
        )
        for run in found.get("runs", [])
    ]
    title = "Decoding"
    if found:
        title += f", {found['prompt']} + {found['new']} tokens; measured bandwidth {found['bandwidth'] / 1e9:,.0f} GB/s"
    head = ("weights", "batch", "tokens/s", "MiB per step", "of the bandwidth", "prefill, s", "prefill and decode, s")
    return table(title, head, rows)


def memory(found: list[dict]) -> list[str]:
    rows = []
    for part in found:
        for phase, reported in part.get("phases", {}).items():
            planned, got, off = reported["planned"], reported["measured"], reported["off"]
            shown = ("not reported", "") if got is None else (f"{got / MIB:,.0f}", f"{off:+.1%}")
            rows.append((part["model"], phase, f"{planned / MIB:,.0f}", *shown))
    head = ("model", "up to", "planned, MiB", "measured, MiB", "off")
    return table("Peak memory of PPO, one GPU (goal: within 10%)", head, rows)


def phases(found: dict) -> list[str]:
    rows, plan = [], found.get("plan", {}).get("phases", {})
    for phase, seconds in found.get("seconds", {}).items():
        best, first = min(seconds, default=None), found["first"].get(phase)
        if best is None:
            continue
        planned = plan.get(phase)
        floor = (f"{planned['floor']:.4f}", f"{planned['expected']:.4f}") if planned else ("", "")
        share = f"{planned['floor'] / best:.0%}" if planned else ""
        rows.append((phase, f"{best:.4f}", *floor, share, f"{first:.1f}"))
    title = "Seconds of a PPO iteration"
    if found:
        tokens = found["tokens"]
        title += f", {tokens['rows']} x ({tokens['prompt']} + {tokens['new']}) tokens, plan for "
        title += found["plan"]["gpus"] or "no known GPU"
    head = ("phase", "measured", "floor", "expected", "floor / measured", "first call, with compilation")
    return table(title, head, rows)
