"""What a run has left: its report, an HTML page, and its rollouts."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from rlhf_jax.report.run_data import METRICS, read_run
from rlhf_jax.report.sample_rollouts import read_sample


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write one HTML page on these runs, drawn over each other; it loads nothing from elsewhere.

    Args:
        output: the file; None: report.html in the first folder.
    Returns:
        The file.
    Raises:
        ValueError: a folder holds no run, or the same is named twice.
    """
    folders = [Path(folder) for folder in folders]
    if len({folder.absolute() for folder in folders}) < len(folders):
        raise ValueError(f"{' '.join(map(str, folders))}: name each run once")
    path = Path(output) if output else folders[0] / "report.html"
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(make_page(read_runs(folders)), encoding="utf-8", newline="\n")
    unfinished.replace(path)
    return path


def read_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Everything that the page shows."""
    runs = []
    for folder in folders:
        run = read_run(folder, 1 / len(folders))
        runs.append(run | {"rollouts": read_sample(folder, 1 / len(folders), run["faults"])})
    names = [run["name"] for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run["name"]) > 1:  # such as runs/a/demo and runs/b/demo
            run["name"] = str(folder)
    version = metadata.version("rlhf_jax")
    return {"written": time.strftime("%Y-%m-%d %H:%M %z"), "version": version, "metrics": METRICS, "runs": runs}


def make_page(data: dict[str, Any]) -> str:
    """The HTML page that shows these values; of scripts and styles only the page's own are allowed to run."""
    page, css, elements, js = map(_read, ("report/page.html", "report/page.css", "elements.js", "report/page.js"))
    parts = {"css": css, "js": elements + js}
    text = json.dumps(_plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Text of models may hold "</script>" and "<!--".
    parts["data"] = re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)
    hashes = {name: base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode() for name in ("css", "js")}
    allowed = f"style-src 'sha256-{hashes['css']}'; script-src 'sha256-{hashes['js']}'"
    parts["policy"] = f"default-src 'none'; img-src data:; {allowed}"
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def _read(name: str) -> str:
    """A file of the package."""
    return resources.files("rlhf_jax").joinpath(name).read_text("utf-8")


def _plain(value: Any) -> Any:
    """The value for JSON: numbers that are not finite as text, lone surrogates replaced."""
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
