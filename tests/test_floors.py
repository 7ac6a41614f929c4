"""The floors of the package: a module imports only from lower floors or from its own folder."""

import ast
import re
from pathlib import Path

import pytest

from rlhf_jax.stages.table import STAGES

PACKAGE = Path(__file__).parents[1] / "rlhf_jax"
FLOORS = [
    ["redact", "trees", "products", "hub_access", "hosts", "checkpoint_files"],
    ["config"],
    ["trackers"],
    ["mesh", "hardware", "loss_scale", "collectives", "metrics", "events", "objectives", "sampling"],
    ["models", "data", "optim", "skipping", "detokenise"],
    ["train_step", "decode", "checkpoint", "reward_functions"],
    ["slots"],
    ["rollout", "policy"],
    ["engine", "library"],
    ["stages"],
    ["scoring", "answering"],
    ["likelihood"],
    ["evaluate"],
    ["recipe"],
    ["plan", "show_data", "chat", "compare", "import_export", "serve", "report", "options"],
    ["train"],
    [""],  # the package's own __init__, its public face
    ["cli"],
    ["__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LEARNERS = [
    "stages",
    "engine",
    "policy",
    "rollout",
    "train_step",
    "decode",
    "sampling",
    "objectives",
    "models",
    "optim",
]
JUDGE = "data.builtin_judge"


def name_of(path: Path, package: Path) -> str:
    """The dotted name inside the package; "" is the package itself."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, package: Path, modules: set[str]) -> set[str]:
    """The modules of the package that `path` names in any import or as "module:function", anywhere in the file."""
    here = name_of(path, package).split(".") if name_of(path, package) else []
    folder = here if path.name == "__init__.py" else here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["rlhf_jax", *folder[: len(folder) + 1 - node.level]] if node.level else []
            base = above + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"rlhf_jax[\w.]*:\w+", str(node.value)):
            names = [re.split("[.:]", node.value)]
        else:
            continue
        for name in names:
            if name[0] == "rlhf_jax":
                inside = name[1:]
                # `from rlhf_jax.data.batches import Batch` names a thing in a module: the longest module wins.
                while ".".join(inside) not in modules and inside:
                    inside = inside[:-1]
                found.add(".".join(inside))
    return found


def graph_of(package: Path) -> dict[str, set[str]]:
    paths = {name_of(path, package): path for path in sorted(package.rglob("*.py"))}
    return {name: imports_of(path, package, set(paths)) for name, path in paths.items()}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up or to a neighbour, as "chat imports stages.sft"."""
    room = {name: name.split(".")[0] for name in graph}
    return [
        f"{name or '__init__'} imports {target or '__init__'}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if room[name] != room[target] and FLOOR[room[target]] >= FLOOR[room[name]]
    ]


def reach(graph: dict[str, set[str]], name: str) -> set[str]:
    """All modules that importing `name` executes: its imports, theirs, and the __init__ of all parent folders."""
    seen, todo = set(), [name]
    while todo:
        module = todo.pop()
        # The package's own __init__ is left out: it runs before everything and names everything.
        parents = [folder for folder in [module.rpartition(".")[0]] if folder]
        if module and module not in seen:
            seen.add(module)
            todo += [*graph[module], *parents]
    return seen


GRAPH = graph_of(PACKAGE)


def test_every_module_has_a_floor():
    assert sorted({name.split(".")[0] for name in GRAPH} - set(FLOOR)) == []


def test_no_module_imports_from_its_own_or_a_higher_floor():
    assert violations(GRAPH) == []


def test_no_training_module_imports_the_judge_of_the_builtin_data():
    learners = [name for name in GRAPH if name.split(".")[0] in LEARNERS]
    assert [name for name in learners if JUDGE in reach(GRAPH, name)] == []


def test_the_data_folder_uses_only_record_of_jax():
    for path in sorted((PACKAGE / "data").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                tops = {(node.module or "").split(".")[0]}
            else:
                continue
            assert not tops & {"jax", "flax", "optax", "orbax", "torch"}, f"{path.name}:{node.lineno} imports {tops}"


def test_few_files_name_a_stage():
    def constants(tree: ast.AST) -> set[str]:
        return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}

    named = [
        path.name for path in sorted(PACKAGE.rglob("*.py")) if constants(ast.parse(path.read_text())) & set(STAGES)
    ]
    assert len(named) <= 6 and "table.py" in named, named


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("chat.py", "from rlhf_jax.stages import sft", []),
        ("chat.py", "import rlhf_jax.cli", ["chat imports cli"]),
        ("chat.py", "from . import report", ["chat imports report"]),
        ("chat.py", "from rlhf_jax import apply", ["chat imports __init__"]),
        ("engine.py", "def f():\n    from rlhf_jax.stages.sft import run", ["engine imports stages.sft"]),
        ("engine.py", "RUN = 'rlhf_jax.stages.sft:run'", ["engine imports stages.sft"]),
        ("models/decoder.py", "from ..data.batches import Batch", ["models.decoder imports data.batches"]),
        ("models/decoder.py", "from . import families\nfrom .families import x\nfrom ..trees import record", []),
        ("__init__.py", "from .cli import main", ["__init__ imports cli"]),
        ("cli.py", "from rlhf_jax import apply, chat, config\nimport json, jax", []),
    ],
)
def test_every_form_of_import_is_checked(tmp_path, file, text, expected):
    package = tmp_path / "rlhf_jax"
    for name in [
        *("__init__", "chat", "cli", "config", "engine", "report", "trees"),
        *("stages/sft", "stages/__init__", "data/batches", "data/__init__"),
        *("models/decoder", "models/families", "models/__init__"),
    ]:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("")
    (package / file).write_text(text)
    assert violations(graph_of(package)) == expected


def test_the_judge_is_found_through_a_chain_of_imports():
    graph = {"stages.sft": {"data.batches"}, "data.batches": {"data.builtin"}, "data.builtin": {JUDGE}}
    assert JUDGE in reach(graph | {JUDGE: set(), "data": set(), "stages": set()}, "stages.sft")
