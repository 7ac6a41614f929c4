"""A plan as text."""

from __future__ import annotations

from typing import Any

from rlhf_jax.hardware import GIB

MIB = 2**20
COLUMNS = ("resident", "arguments", "temporaries", "cache", "peak", "headroom")
BOUNDS = ("resident", "cache", "least", "peak", "headroom")


def format_plan(plan: dict[str, Any]) -> str:
    """The tables that `rlhf-jax plan` prints."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    # MiB for small models, whose sizes in GiB would all be 0.00.
    unit, name = (GIB, "GiB") if max(row["peak"] for row in plan["phases"]) >= GIB else (MIB, "MiB")
    source, columns = f"by programs compiled for {plan['compiled_for']}; temporaries include the cache", COLUMNS
    if plan["compiled_for"] is None:
        source, columns = "by arithmetic: at least and, with temporaries and their error, at most (peak)", BOUNDS
    lines = [
        f"plan for {plan['gpus']}, mesh {mesh}: a GPU has {plan['memory'] / GIB:.1f} GiB, usable are "
        f"{plan['usable'] / GIB:.1f}",
        f"{name} on one GPU, {source}",
        "",
        _row("phase", columns),
    ]
    for row in plan["phases"]:
        cells = [f"{row[column] / unit:.2f}" for column in columns]
        reported = ["does not fit" if row["least"] > plan["usable"] else "may not fit"] * (row["headroom"] < 0)
        reported += ["compiled without Triton"] * row.get("cublas_only", False)
        lines.append("  ".join([_row(f"{row['stage']} {row['phase']}", cells), *reported]))
    lines += [""] + [f"chosen: {text}" for text in plan["chosen"]] if plan["chosen"] else []
    worst = max(plan["phases"], key=lambda row: row["peak"])
    held = sorted(worst["live"].items(), key=lambda item: -item[1])
    listed = ", ".join(f"{what} {size / unit:.2f}" for what, size in held if size >= unit / 200)
    lines += ["", f"peak in {worst['stage']} {worst['phase']}, where the GPU holds {listed}"]
    if most := max(row["host"] for row in plan["phases"]):
        lines.append(f"in pinned host memory for each GPU: {most / unit:.2f}")
    lines += [": ".join([plan["verdict"], *["; or ".join(plan["suggestions"])] * (not plan["fits"])])]
    lines.append("")
    for stage, found in plan["micro_batch"].items():
        compiled = f"{found['compilations']} sizes compiled, bisecting those that divide"
        how = compiled if found["compilations"] else "by its upper bound"
        largest = f"largest micro-batch that fits: {found['largest'] or 'none'}"
        lines.append(f"{stage}: {largest} (asked for: {found['asked']}; {how})")
    lines += ["", _row("seconds", ("floor", "expected"))]
    for stage, entry in plan["seconds"].items():
        for phase, times in entry["phases"].items():
            lines.append(_row(f"{stage} {phase}", [f"{times[kind]:.3g}" for kind in ("floor", "expected")]))
        lines.append(_stage_line(stage, entry))
    if plan["cost"] is not None:
        lines.append(f"cost at {plan['price_per_gpu_hour']:g} per GPU and hour, all stages: {plan['cost']:,.2f}")
    lines += [""] + [f"assumed: {text}" for text in plan["assumptions"]] + [f"note: {text}" for text in plan["notes"]]
    return "\n".join(lines)


def _row(name: str, cells) -> str:
    return f"{name:<18}" + "".join(f"{cell:>13}" for cell in cells)


def _stage_line(stage: str, entry: dict[str, Any]) -> str:
    step = "iteration" if "generate" in entry["phases"] else "step"
    text = f"  {stage}: {entry['floor']:.3g} to {entry['expected']:.3g} s for one {step}"
    if entry["steps_per_epoch"]:
        epoch = f"{entry['floor_epoch'] / 3600:.2f} to {entry['expected_epoch'] / 3600:.2f} h per epoch"
        text += f", {epoch} of {entry['steps_per_epoch']} {step}s"
    else:
        text += ", rows of an epoch not known without the data"
    if entry["steps"]:
        text += f"; {entry['steps']} {step}s in all: {entry['expected_stage'] / 3600:.2f} h expected"
    if entry["cost_of_step"] is not None:
        text += f"; costs {entry['cost_of_step']:.2g} per {step}"
    return text + (f", {entry['cost']:,.2f} in all" if entry["cost"] is not None else "")
