"""Configuration of all tests: eight simulated CPU devices, no network, compiled programs cached between runs."""

import gc
import importlib.util
import json
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
LONG = tomllib.loads((Path(__file__).parent / "long.toml").read_text(encoding="utf-8"))
# Started first, so that at the end no process still runs one of them alone.
LONGEST = ("parity/test_family_parity", "test_train_step", "test_engine", "parity/test_peft", "test_train")
LONGEST += ("test_plan", "test_quantised", "test_slots", "test_decode", "test_unstacked", "test_configs")
COLLECTED = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    assert "jax" not in sys.modules, "the environment of jax must be set before its first import"
    # On a busy machine any example may be slow, so there is no deadline.
    hypothesis.settings.register_profile("here", deadline=None, max_examples=50)
    hypothesis.settings.load_profile("here")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Tokenised data are cached for the duration of the test session.
    caches = tempfile.TemporaryDirectory(prefix="rlhf_jax-tests-")
    os.environ["XDG_CACHE_HOME"] = caches.name
    config.add_cleanup(caches.cleanup)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if config.option.markexpr == "cuda":  # compiles for GPUs and runs everything else on the CPU
        os.environ["JAX_PLATFORMS"] = "cpu"
        return  # cached programs lack the text that these tests read
    if config.option.markexpr != "gpu":  # `pytest -m gpu` runs on the machine's devices
        os.environ["JAX_PLATFORMS"] = "cpu"
        # Many tiny programs: compiling costs more than running, so compile with the least effort.
        flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
        # The older fusion emitters compile in a quarter of the time, and one LLVM module per program saves a third.
        flags += " --xla_cpu_parallel_codegen_split_count=1"
        if sys.version_info < (3, 12):  # jax 0.12 has no other emitters, and refuses the flag
            flags += " --xla_cpu_use_fusion_emitters=false"
        # In XLA's order for many operations at once, devices that run a cached program may wait for each other forever.
        flags += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
        # Eight devices on a busy machine of two cores may wait for each other longer than the 40 s that XLA allows.
        flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600 --xla_cpu_collective_timeout_seconds=600"
        # Collectives may start in a different order on each device, and each waiting one occupies a thread.
        os.environ.setdefault("PJRT_NPROC", "64")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    if hasattr(config, "cache"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


def is_form(form: str, patterns: Iterable[str]) -> bool:
    """Whether the bracketed part of a test's id matches one of the patterns, in which "*" is any text."""
    return any(re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), form) for pattern in patterns)


def is_long(nodeid: str) -> bool:
    """Whether long.toml lists the test of this id."""
    file, _, test = nodeid.partition("::")
    name, _, form = test.removesuffix("]").partition("[")
    entry = LONG.get(file, {}).get(name)
    return entry is not None and is_form(form, entry.get("forms", ["*"])) and not is_form(form, entry.get("but", []))


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = {item.nodeid for item in items}
    order = [f"tests/{name}.py" for name in LONGEST]
    place = {file: order.index(file) if file in order else len(order) for file in (item.location[0] for item in items)}
    items.sort(key=lambda item: place[item.location[0]])
    for item in items:
        if is_long(item.nodeid):
            item.add_marker(pytest.mark.long)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("parity") and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch: pip install -e '.[parity]'")
    if item.get_closest_marker("cuda") and not any(map(importlib.util.find_spec, CUDA_PLUGINS)):
        pytest.skip("needs JAX's CUDA plugin, and no GPU: pip install -e '.[cuda13]'")
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip("needs a GPU: run pytest -m gpu on a machine that has one")


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Clears compiled programs after each test file: thousands of programs exceed the memory maps of a process."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Headless Chromium, of playwright's synchronous interface."""
    import tiny_browser

    with tiny_browser.running() as found:
        yield found


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """`write_jsonl(rows, name="rows.jsonl")` writes one JSON object per line and returns the path."""

    def write(rows: Iterable[dict], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
