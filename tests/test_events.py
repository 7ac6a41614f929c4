"""RUN/events.jsonl: starts, warnings and ends of the commands of a run."""

import json
import logging

import pytest
import tiny_recipe

from rlhf_jax.events import describe_machine, record_events
from rlhf_jax.mesh import MeshConfig, make_mesh


def events(folder):
    return [
        {name: value for name, value in each.items() if name != "time"}
        for each in tiny_recipe.records(folder / "events.jsonl")
    ]


def test_start_warnings_and_end_are_recorded_and_nothing_after_it(tmp_path):
    logger = logging.getLogger("rlhf_jax.some.module")
    with record_events(tmp_path, {"stages": ["sft"]}):
        logger.info("not a warning")
        logger.warning("the rate é is high")
        logging.getLogger("another.package").warning("not of this package")
    logger.warning("after the end")
    assert events(tmp_path) == [
        {"event": "start", "stages": ["sft"]},
        {"event": "warning", "message": "the rate é is high"},
        {"event": "end", "outcome": "finished"},
    ]


@pytest.mark.parametrize("error", [ValueError("a\nb"), KeyboardInterrupt()])
def test_a_command_that_fails_records_with_what(tmp_path, error):
    with pytest.raises(type(error)), record_events(tmp_path, {}):
        raise error
    with record_events(tmp_path, {}):
        pass
    outcomes = [each.get("outcome") for each in events(tmp_path)]
    assert outcomes == [None, f"{type(error).__name__}: {error}", None, "finished"]


def test_an_error_is_raised_as_it_is_where_its_end_cannot_be_written(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(ValueError, match="the first error"), record_events(folder, {}):
        (folder / "events.jsonl").unlink()
        folder.rmdir()
        raise ValueError("the first error")


def test_a_machine_is_described_by_values_of_json():
    machine = describe_machine(make_mesh(MeshConfig()))
    assert json.loads(json.dumps(machine)) == machine
    assert machine["devices"] == "8 x cpu" and machine["mesh"] == "data 1 x fsdp 8 x tensor 1"
    assert machine["memory"] > 2**28 and machine["cores"] >= 1
