"""No name, docstring, comment or message uses a word of glossary.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
GLOSSARY = tomllib.loads((ROOT / "tests/glossary.toml").read_text(encoding="utf-8"))
PATHS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").glob("*.toml")]
PATHS += [path for folder in ("rlhf_jax", "tests", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.*")]
SUFFIXES = (".py", ".sh", ".md", ".toml")
TEXTS = {
    path: path.read_text(encoding="utf-8") for path in PATHS if path.suffix in SUFFIXES and "glossary" not in path.name
}


def find_words(text: str) -> list[str]:
    """Every word of the glossary in a text, with its line and the replacement; identifiers are split into words."""
    defined = re.findall(r"def (\w+)", text)
    names = [
        f"{name}: {say}" for rule, say in GLOSSARY["functions"].items() for name in defined if re.search(rule, name)
    ]
    plain = re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", text)
    return names + [
        f"line {plain.count(chr(10), 0, match.start()) + 1}: {match[0].lower()!r}: {say}"
        for rule, say in GLOSSARY["words"].items()
        for match in re.finditer(rule, plain, re.IGNORECASE)
    ]


def test_no_text_contains_a_word_of_the_glossary():
    found = {str(path.relative_to(ROOT)): find_words(text) for path, text in TEXTS.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_word_is_found_in_a_sentence_and_in_names():
    assert find_words("What is told.") == find_words("mock_told = 1")[:1] == find_words("class WhatIsTold:") != []
    assert find_words("def packed(rows): ...") == ["packed: a verb, or the noun that it returns"]
    assert find_words("def is_packed(rows):\n    # ahead of time, which stands for it\n") == []
    assert find_words("def load_cached(path): ...") == []
