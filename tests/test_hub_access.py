"""Without a network: the hub is asked once per process, without retries, and every command says so in one line."""

import os
import socket
import time

import huggingface_hub
import pytest
import tiny_recipe
from huggingface_hub import constants

from rlhf_jax.cli import main
from rlhf_jax.hub_access import hub_obstacle
from rlhf_jax.models.hub import config_json, local_folder


@pytest.fixture
def hub_requests(monkeypatch, tmp_path):
    """The requests to a hub at a port where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    requests, session = [], huggingface_hub.get_session()

    def head(url, **options):
        requests.append(url)
        return session.head(url, **options)

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: type("Session", (), {"head": staticmethod(head)}))
    hub_obstacle.cache_clear()
    yield requests
    hub_obstacle.cache_clear()


def test_an_unreachable_hub_is_asked_once_and_reported_within_seconds(hub_requests, caplog):
    started = time.monotonic()
    for read in (config_json, local_folder, config_json):
        with pytest.raises(ValueError, match=r"the hub is not reachable: http://127\.0\.0\.1:\d+: .*refused"):
            read("someone/model")
    assert time.monotonic() - started < 5, "the hub's own retries take 23 seconds for each file"
    assert hub_requests == [constants.ENDPOINT]
    assert [record.message.count("not reachable") for record in caplog.records] == [1]
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1", "the clients of the hub use their caches"


def test_a_hub_that_answers_anything_is_used(hub_requests, monkeypatch):
    answer = type("Session", (), {"head": staticmethod(lambda url, timeout: "503 Service Unavailable")})
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: answer)
    assert hub_obstacle() == "" and not constants.HF_HUB_OFFLINE


def test_offline_mode_that_the_user_has_set_is_named_and_nothing_is_asked(hub_requests, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        config_json("someone/model")
    assert hub_requests == []


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["sft", "model.actor=someone/model"], "someone/model"),
        (["sft", 'data.sources=[{path="someone/pairs"}]'], "someone/pairs"),
        (["data", "model.actor=someone/model"], "someone/model"),
        (["plan", "model.actor=someone/model", "--gpus", "A100-80GB"], "someone/model"),
    ],
    ids=["model", "data", "tokenizer", "plan"],
)
def test_every_command_ends_without_the_hub_in_one_line_that_names_it(command, named, hub_requests, tmp_path, capsys):
    name, *rest = command
    started = time.monotonic()
    assert main([name, str(tiny_recipe.write_recipe(tmp_path)), *rest, f"run.dir={tmp_path}/run"]) == 2
    assert time.monotonic() - started < 15
    said = capsys.readouterr().err.splitlines()
    assert sum("only what is in its cache here is used" in line for line in said) == 1
    assert said[-1].startswith("rlhf-jax: ") and named in said[-1] and "the hub is not reachable" in said[-1]
    assert not any("Retrying" in line for line in said)
