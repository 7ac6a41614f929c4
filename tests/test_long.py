"""The list of the tests that the default run skips."""

from pathlib import Path

import conftest
import pytest


def test_every_line_of_the_list_matches_existing_tests(request):
    if any("::" in argument for argument in request.config.args):
        pytest.skip("whole files are needed")
    collected = request.config.stash[conftest.COLLECTED]
    files, unknown = {test.partition("::")[0] for test in collected}, []
    for file, tests in conftest.LONG.items():
        assert (Path(conftest.__file__).parents[1] / file).exists(), f"{file} of tests/long.toml does not exist"
        for name, entry in tests.items() if file in files else ():
            assert entry.keys() <= {"seconds", "forms", "but"} and entry["seconds"] >= 0, f"{name} in tests/long.toml"
            ids = [test for test in collected if test.partition("[")[0] == f"{file}::{name}"]
            forms = [test.removesuffix("]").partition("[")[2] for test in ids]
            for pattern in entry.get("forms", ["*"]) + entry.get("but", []):
                if not any(conftest.is_form(form, [pattern]) for form in forms):
                    unknown.append(f"{file}::{name}[{pattern}]")
    assert unknown == [], "tests/long.toml lists tests that do not exist: correct or delete these lines"


@pytest.mark.parametrize(
    ("form", "patterns", "expected"),
    [
        ("opt-0-True", ["opt-0-*"], True),
        ("llama-opt-0-True", ["opt-0-*"], False),
        ("32-2.5", ["32-2.5"], True),
        ("32-285", ["32-2.5"], False),
        ("", ["*"], True),
        ("a", [], False),
    ],
)
def test_a_pattern_matches_whole_forms(form, patterns, expected):
    assert conftest.is_form(form, patterns) is expected
