"""Headless Chromium for the tests of pages, and what they ask of every page."""

import contextlib
import os
import re
import shutil
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install -e '.[browser]', and Chromium")
HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"> \u202egnp.exe"


@contextlib.contextmanager
def running():
    """The browser, while the block runs."""
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        own = os.path.exists(playwright.chromium.executable_path)  # that of `playwright install chromium`
        if not (system or own):
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        options = dict(executable_path=None if own else system, args=["--no-sandbox"])
        with contextlib.closing(playwright.chromium.launch(**options)) as found:
            yield found


def check_fits(page, width: int, scheme: str) -> None:
    """The page is not wider than the screen, and its colours are those of the scheme."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back, text = (
        sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))[:3]))
        for name in ("backgroundColor", "color")
    )
    assert (back > 700 and text < 150) if scheme == "light" else (back < 150 and text > 600)


def picture(page, name: str) -> None:
    """A screenshot, where PAGE_PICTURES names a folder for them."""
    if folder := os.environ.get("PAGE_PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png")
