"""The plan's arithmetic against programs compiled for GPUs that need not be attached: peaks, and bytes over links."""

import re
from collections import Counter
from pathlib import Path

import pytest

from rlhf_jax.config import load_config
from rlhf_jax.hardware import COMPILE_OPTIONS, compile_only_devices, parse_machine
from rlhf_jax.mesh import make_mesh
from rlhf_jax.plan.abstract import abstract_mesh
from rlhf_jax.plan.compile import measure
from rlhf_jax.plan.phases import phases
from rlhf_jax.plan.roofline import work_of_phases
from rlhf_jax.plan.temporaries import find_bounds
from rlhf_jax.recipe import Recipe

pytestmark = pytest.mark.cuda
CONFIGS = Path(__file__).parents[1] / "configs"
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1, "u32": 4}
HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
MOVES = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter)(-start)?\(")


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines}, the entry's name) of a compiled program's text."""
    found, current, entry = {}, "", ""
    for line in text.splitlines():
        if (head := HEAD.match(line)) and not line.startswith(" "):
            current = head[2]
            found[current], entry = [], current if head[1] else entry
        elif current:
            found[current].append(line)
    return found, entry


def count_bytes(text: str, count: int) -> Counter:
    """{collective: bytes that one of `count` devices receives}, multiplied by the trip counts of enclosing loops."""
    found, entry = computations(text)
    total: Counter = Counter()

    def walk(name: str, times: int) -> None:
        for line in found[name]:
            if loop := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                walk(loop[1], times * (int(turns[1]) if turns else 1))
            elif move := MOVES.search(line):
                shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", re.sub(r"\{[^{}]*\}|/\*.*?\*/", "", move[1]))
                if move[3] and move[2] != "all-reduce":  # asynchronous starts list operands before results
                    shapes = shapes[len(shapes) // 2 :]
                for dtype, dims in shapes:
                    size = BYTES[dtype]
                    for part in dims.split(",") if dims else ():
                        size *= int(part)
                    share = {
                        "all-gather": 1 - 1 / count,
                        "all-reduce": 2 * (1 - 1 / count),
                        "reduce-scatter": count - 1,
                    }
                    total[move[2]] += times * size * share[move[2]]

    walk(entry, 1)
    return total


@pytest.mark.parametrize("remat", ["layers", "none"])
def test_bytes_over_the_links_agree_with_the_compiled_program_within_a_tenth(remat):
    overrides = ["mesh.tensor=1", f"model.remat={remat}", "ppo.rollout_batch_size=128", "ppo.micro_batch_size=64"]
    recipe = load_config(CONFIGS / "opt-1.3b-single_node.toml", overrides, Recipe)
    mesh = make_mesh(recipe.mesh, compile_only_devices("8xA100-80GB"))
    found = phases(recipe, mesh, ("ppo",))
    reported = work_of_phases(recipe, found, mesh)
    for phase in found:
        if phase.name in ("publish", "score", "actor"):
            text = phase.program.lower(*phase.args).compile(COMPILE_OPTIONS).as_text()
            moved = sum(count_bytes(text, 8).values())
            assert moved == pytest.approx(reported[f"ppo/{phase.name}"].link, rel=0.1), phase.name


@pytest.mark.parametrize("name", ["opt-1.3b-single_gpu", "opt-6.7b-single_node"])
def test_peaks_of_the_compiler_are_within_the_bounds_by_arithmetic(name):
    recipe = load_config(CONFIGS / f"{name}.toml", [], Recipe)
    where = {"opt-1.3b-single_gpu": "A100-80GB", "opt-6.7b-single_node": "8xA100-80GB"}[name]
    mesh, plain = (
        make_mesh(recipe.mesh, compile_only_devices(where)),
        abstract_mesh(recipe.mesh, parse_machine(where).count),
    )
    for real, phase in zip(phases(recipe, mesh, ("ppo",)), phases(recipe, plain, ("ppo",)), strict=True):
        least, most = find_bounds(recipe, phase, plain)
        assert least <= measure(real).peak(real) <= most, (phase.stage, phase.name)


def test_a_loop_in_the_compiled_text_counts_with_its_trip_count():
    text = """
%body (x: f32[8]) -> f32[8] {
  %g = bf16[64,32]{1,0} all-gather(bf16[8,32]{1,0} %x), dimensions={0}
  %s = f32[8,4]{1,0} reduce-scatter(f32[64,4]{1,0} %y), dimensions={0}
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = f32[8] while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %r = (f32[10]{0}, f32[6]{0}) all-reduce-start(f32[10]{0} %a, f32[6]{0} %b)
}
"""
    moved = count_bytes(text, 8)
    assert moved == {"all-gather": 24 * 64 * 32 * 2 * 7 / 8, "reduce-scatter": 24 * 32 * 4 * 7, "all-reduce": 112}
