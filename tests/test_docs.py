"""README.md and docs/: generated parts agree with their sources; commands, configurations and links work."""

import contextlib
import datetime
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from benchmarks import demo, provenance
from rlhf_jax import cli
from rlhf_jax.config import load_config, parse_config
from rlhf_jax.recipe import Recipe
from rlhf_jax.stages.table import STAGES

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
# Numbers with a unit that are not measurements: constants of the code, tolerances of tests, sizes of downloads.
STATED = {"95%", "2%", "5 GB"}
MEASURED = re.compile(r"(?<![\w.])\d[\d,.]*(?:%| (?:s|ms|min|MB|GB|GiB|MB/s|GB/s)\b)")
PARTS = re.compile(r"^<!-- (\w+) -->$.*?^<!-- /\1 -->$", re.DOTALL | re.MULTILINE)
FENCES = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def load_script(name: str):
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITE = load_script("write_docs")
DOCUMENTS = WRITE.documents()
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
EACH = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)


def prose(path: Path) -> str:
    """A document without its generated parts and its code."""
    return FENCES.sub("", PARTS.sub("", TEXTS[path]))


def help_text(*command: str) -> str:
    """What `rlhf-jax COMMAND --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as left:
        cli.main([*command, "--help"])
    assert left.value.code == 0
    return out.getvalue()


NAMES = re.findall(r"^    ([a-z]+) ", help_text(), re.MULTILINE)


def example_of(path: Path) -> dict:
    """The configuration mine.toml of a document, or that of the README."""
    codes = [code for each in (path, ROOT / "README.md") for language, code in FENCES.findall(TEXTS[each])]
    return tomllib.loads(next(code for code in codes if code.startswith("# mine.toml")))


def code_lines() -> list[tuple[Path, list[str]]]:
    """(document, words) of every command line in the documents."""
    codes = [(path, code) for path, text in TEXTS.items() for kind, code in FENCES.findall(text) if kind == "bash"]
    lines = [(path, shlex.split(line, comments=True)) for path, code in codes for line in code.splitlines()]
    return [(path, words) for path, words in lines if words]


def commands() -> list[tuple[Path, list[str]]]:
    """(document, arguments) of every command line of `rlhf-jax` in the documents and the help texts, once each."""
    found = [(path, words[1:]) for path, words in code_lines() if words[0].endswith("rlhf-jax")]
    helps = [line for name in NAMES for line in re.findall(r"^  (?:\w+=\S+ )?rlhf-jax (.*)$", help_text(name), re.M)]
    found += [(ROOT / "README.md", shlex.split(line.partition(" | ")[0])) for line in helps]
    return list({(path.stem, *words): (path, words) for path, words in found}.values())


@EACH
def test_the_generated_parts_of_a_document_agree_with_their_sources(path):
    assert WRITE.fill(TEXTS[path]) == TEXTS[path], "run `python scripts/write_docs.py`"


def test_every_generated_part_is_in_some_document():
    assert {name for text in TEXTS.values() for name in PARTS.findall(text)} == WRITE.BLOCKS.keys()


@EACH
def test_no_number_with_a_unit_is_outside_the_generated_parts(path):
    assert set(MEASURED.findall(prose(path))) <= STATED


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_results_file_names_the_command_commit_date_and_machine_of_every_run(path):
    for run in json.loads(path.read_text(encoding="utf-8")):
        assert {"command", "commit", "date", "machine", "result"} <= run.keys() <= {*run.keys(), "note"}
        assert re.fullmatch(r"[0-9a-f]{7,40}", run["commit"]), "measure a committed tree"
        assert datetime.date.fromisoformat(run["date"]) and run["machine"].strip() and run["command"].strip()
        assert not re.search(r"(?:^|[\s=])[/~]", run["command"]), (
            "a path of one machine: name it relative to the project"
        )


def test_the_readme_has_at_most_220_lines_of_at_most_120_characters():
    lines = TEXTS[ROOT / "README.md"].splitlines()
    assert len(lines) <= 220
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


@EACH
def test_every_relative_link_resolves(path):
    links = re.findall(r"\]\(([^)#]+)", TEXTS[path])
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


@EACH
def test_every_file_named_by_its_path_exists(path):
    names = re.findall(r"\b(?:configs|scripts|tests|benchmarks|docs)/[\w./-]+\.(?:toml|sh|py|md)\b", TEXTS[path])
    assert [name for name in names if not (ROOT / name).exists()] == []
    modules = re.findall(r"-m (benchmarks\.[a-z_]+)", TEXTS[path])
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").exists()] == []


def test_every_command_explains_itself_and_all_but_chat_have_examples():
    assert len(NAMES) == 16 and {"train", *STAGES, "evaluate", "chat", "serve", "report", "rollouts"} < {*NAMES}
    texts = {name: help_text(name) for name in NAMES}
    assert all(text.startswith(f"usage: rlhf-jax {name}") for name, text in texts.items())
    assert [name for name, text in texts.items() if "\n  rlhf-jax " not in text] == ["chat"]


@pytest.mark.parametrize(
    ("path", "arguments"), commands(), ids=lambda each: each.stem if isinstance(each, Path) else " ".join(each)
)
def test_a_command_parses_and_its_configuration_loads_with_its_overrides(path, arguments, tmp_path):
    args = cli.parse_args(arguments)
    config = getattr(args, "config", None)
    if config is None or getattr(args, "prompts", None) is not None:  # models, of which there is no configuration
        return
    if not config.startswith("configs/"):
        assert config == "mine.toml"
        (tmp_path / config).write_text(tomli_w.dumps(example_of(path)))
    assert load_config((ROOT if config.startswith("configs/") else tmp_path) / config, args.overrides, Recipe)


def test_other_command_lines_name_scripts_modules_options_and_extras_that_exist(monkeypatch):
    others = [words for _, words in code_lines() if not words[0].endswith("rlhf-jax")]
    inline = re.findall(r"`([^`]*python -m benchmarks\.[a-z][^`]*)`", "\n".join(map(prose, DOCUMENTS)))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in (*others, *map(shlex.split, inline)):
        if "-m" in words and words[words.index("-m") + 1].startswith("benchmarks."):
            module = words[words.index("-m") + 1]
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []
        elif words[0].startswith("scripts/"):
            subprocess.run(["bash", "-n", words[0]], cwd=ROOT, check=True)
        elif "scripts/train.py" in words:
            script = load_script("train")
            monkeypatch.setattr(script, "rlhf_jax", lambda argv: bool(load_config(argv[1], argv[2:], Recipe)))
            assert script.main(words[2:]) is True
        elif "pip" in words[0]:
            assert {each for word in words for each in re.findall(r"\[(\w+)\]", word)} <= extras.keys()
        else:
            assert words[:3] == ["python3", "-m", "venv"], words


def test_the_reward_function_of_the_documents_runs():
    (code,) = [code for language, code in FENCES.findall(TEXTS[ROOT / "docs/methods.md"]) if language == "python"]
    exec(code, names := {})
    assert names["is_correct"](["1 + 1?"] * 2, ["It is 2.", "3"], [{"answer": "2"}] * 2) == [1.0, 0.0]


def test_every_example_configuration_loads():
    examples = [code for text in TEXTS.values() for language, code in FENCES.findall(text) if language == "toml"]
    assert len(examples) >= 2
    for code in examples:
        assert parse_config(Recipe, tomllib.loads(code), "the example")


@EACH
def test_every_configuration_key_in_the_text_exists(path):
    known = {
        f"{place}.{row[0].strip('`')}"
        for schema, places in WRITE.sections().items()
        for place, _, _ in places
        for row in WRITE.key_rows(schema, places)
    }
    sections = "|".join({key.split(".")[0] for key in known})
    named = re.findall(rf"`((?:{sections})\.[a-z_.]+)(?:`| = |=)", PARTS.sub("", TEXTS[path]))
    assert [name for name in named if name not in known and not (ROOT / "rlhf_jax" / name).exists()] == []


def test_a_key_without_a_comment_is_rejected(tmp_path, monkeypatch):
    (tmp_path / "schemas.py").write_text(
        "import dataclasses\n\n\n@dataclasses.dataclass(frozen=True)\nclass Given:\n"
        "    # what a\n    # does\n    a: int = 1\n    b: str = 'x#y'  # what b does\n    c: float = 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from schemas import Given

    assert WRITE.meanings(Given) == {"a": "what a does", "b": "what b does", "c": ""}
    with pytest.raises(ValueError, match=r"Given\.c has no comment"):
        list(WRITE.key_rows(Given, [("given", Given(), False)]))


def test_a_generated_part_without_a_source_is_rejected():
    with pytest.raises(KeyError, match="nothing_like_it"):
        WRITE.fill("<!-- nothing_like_it -->\n<!-- /nothing_like_it -->\n")


def test_a_result_replaces_the_run_with_the_same_keys_and_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    for seed, value in ((0, 1.5), (1, 2.5), (0, 3.5)):
        provenance.record("made", {"seed": seed, "value": value}, "seed")
    runs = json.loads((tmp_path / "made.json").read_text())
    assert [run["result"] for run in runs] == [{"seed": 0, "value": 3.5}, {"seed": 1, "value": 2.5}]
    assert all(run.keys() == {"command", "commit", "date", "machine", "result"} for run in runs)
    provenance.record("made", {"other": 1})
    assert [run["result"] for run in json.loads((tmp_path / "made.json").read_text())] == [{"other": 1}]


def test_the_demo_benchmark_continues_and_its_tables_have_a_row_per_method_and_one_per_seed_and_method(
    tmp_path, monkeypatch
):
    ran = []

    def run(stage, config, *words):
        settings = dict(word.split("=", 1) for word in words)
        ran.append((stage, settings))
        (Path(settings["run.dir"]) / stage / "export").mkdir(parents=True)
        (Path(settings["run.dir"]) / "base").mkdir(exist_ok=True)

    def numbers(export, base, settings):
        seed = int(base.parent.name)
        greedy = {"sft": 0.75, "ppo": 0.875 - 0.25 * (seed == 2)}.get(export.parent.name, 0.5)
        part = {"length": 8.0, "interval": [0.25, 0.75], "faults": {"wrong": 3}, "wrong_sums": 2}
        return {"prompts": 8, "kl": 0.5 + seed, "sampled": part | {"good": 0.5}, "greedy": part | {"good": greedy}}

    monkeypatch.setattr(demo, "run_command", run)
    monkeypatch.setattr(demo, "judge_policy", numbers)
    monkeypatch.setattr(demo, "content_accuracy", lambda run, settings: {"pairs": 8, "accuracy": 0.625, "sums": 0.5})
    monkeypatch.setattr(demo, "use_cache", lambda folder: None)
    monkeypatch.setattr(demo, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    monkeypatch.setattr(WRITE, "RESULTS", tmp_path)
    demo.main(["--seeds", "0", "2", "--", "sft.steps=2"])
    assert [stage for stage, _ in ran] == ["sft", "reward", "ppo", "grpo", "grpo", "dpo"] * 2
    assert all(found["sft.steps"] == "2" and found["run.seed"] == f"{2 * (i > 5)}" for i, (_, found) in enumerate(ran))
    rows = [line for line in WRITE.demo_seeds().splitlines() if line.startswith("| ")][2:]
    starts = [
        f"| {seed} | {name} | 50.0% (25.0% to 75.0%)" for seed in (0, 2) for name in "SFT PPO GRPO RLOO DPO".split()
    ]
    assert [row[: len(start)] for row, start in zip(rows, starts, strict=True)] == starts
    assert rows[6].startswith(f"{starts[6]} | 62.5% (25.0% to 75.0%) | 3 (2) | 2.50 | ")
    table = [line for line in WRITE.demo().splitlines() if line.startswith("| ")][2:]
    assert table[1].startswith("| PPO | 2 | 50.0% | 75.0% (62.5% to 87.5%) | -12.5 points | 1.5 (0.5 to 2.5) | ")
    assert "orders 62.5% of the held-out pairs" in WRITE.demo()
    demo.main(["--seeds", "2", "--", "sft.steps=2"])
    assert len(ran) == 12 and len(json.loads((tmp_path / "demo.json").read_text())) == 10
