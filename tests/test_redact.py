"""Passwords, keys and tokens stay out of configurations and messages."""

import json
import logging

import pytest
from tiny_recipe import write_recipe

from rlhf_jax.cli import main
from rlhf_jax.events import record_events
from rlhf_jax.redact import find_secret, redact

SECRETS = {
    "https://me:hunter2@judge.example/v1": ("hunter2", "https://***@judge.example/v1"),
    "https://judge.example/v1?model=a&api_key=hunter2&n=1": ("hunter2", "https://judge.example/v1?model=a&***&n=1"),
    "https://s3.example/rows.jsonl?X-Amz-Signature=abc123": ("abc123", "https://s3.example/rows.jsonl?***"),
    "Bearer hf_" + "a1B2" * 8: ("a1B2", "Bearer ***"),
    "sk-proj-" + "a1B2" * 8: ("a1B2", "***"),
}
HARMLESS = [
    "https://host:8080/v1?page=2",
    "a@b.example",
    "runs/sk-1",
    "hf_mirror",
    "data/hf_preferences_cleaned.jsonl",
    "runs/sk-learn-baseline-of-march",
    "key=value",
    "data: 3:4@5",
    "",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_found_by_its_form_and_replaced(text):
    assert find_secret(text) and redact(text, {}) == SECRETS[text][1]


@pytest.mark.parametrize("text", HARMLESS)
def test_texts_without_secrets_stay_as_they_are(text):
    assert find_secret(text) == "" and redact(text, {}) == text


def test_values_of_the_environment_are_replaced_by_the_names_of_their_variables():
    environ = {"HF_TOKEN": "abcdefgh1", "OPENAI_API_KEY": "abcdefgh", "TOKENIZERS_PARALLELISM": "truetrue", "KEY": "8"}
    assert redact("abcdefgh1 abcdefgh truetrue 8", environ) == "*** *** truetrue 8"


@pytest.mark.parametrize("text", SECRETS)
def test_a_configuration_with_a_secret_is_refused_without_showing_it_and_writes_nothing(text, tmp_path, capsys):
    recipe, secret = write_recipe(tmp_path), SECRETS[text][0]
    options = [f"run.dir={tmp_path / 'run'}", f'data.sources=[{{ path = "{text}", answer = "answer" }}]']
    assert main(["train", str(recipe), *options]) == 2
    shown = capsys.readouterr()
    assert "'data.sources.0.path' holds a " in shown.err and "environment" in shown.err
    assert secret not in shown.err + shown.out and not (tmp_path / "run").exists()


def test_an_unknown_key_with_a_secret_and_messages_of_libraries_are_shown_without_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2hunter2")
    assert main(["train", str(write_recipe(tmp_path)), "ppo.judge=https://me:hunter2@judge.example"]) == 2
    logging.getLogger("httpx").warning("Authorization: hunter2hunter2")
    shown = capsys.readouterr().err
    assert "unknown key 'ppo.judge'" in shown and "Authorization: ***" in shown and "hunter2" not in shown


def test_warnings_and_errors_that_a_run_records_are_without_secrets(tmp_path):
    url = "https://me:hunter2@judge.example"
    with pytest.raises(OSError, match="hunter2"), record_events(tmp_path, {"machine": "a"}):
        logging.getLogger("rlhf_jax.judge").warning(f"{url} answers late")
        raise OSError(f"{url} has gone")
    text = (tmp_path / "events.jsonl").read_text()
    warning, end = [json.loads(line) for line in text.splitlines()][1:]
    assert warning["message"] == "https://***@judge.example answers late"
    assert end["outcome"] == "OSError: https://***@judge.example has gone"
