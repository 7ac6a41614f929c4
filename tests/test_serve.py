"""The server by the official openai client and by raw requests: answers, streams, limits, clients that misbehave."""

import concurrent.futures
import dataclasses
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest

import rlhf_jax

openai = pytest.importorskip("openai", reason="needs the server and its client: pip install -e '.[serve,test]'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the server: pip install -e '.[serve]'")

import tiny  # noqa: E402
import tiny_server  # noqa: E402

from rlhf_jax.answering import policy_tokenizer  # noqa: E402
from rlhf_jax.cli import main  # noqa: E402
from rlhf_jax.data.chat_template import encode_prompt  # noqa: E402
from rlhf_jax.detokenise import decode_ids  # noqa: E402
from rlhf_jax.sampling import SampleConfig  # noqa: E402
from rlhf_jax.serve import models  # noqa: E402
from rlhf_jax.serve.app import make_app  # noqa: E402
from rlhf_jax.serve.run import DrainingServer  # noqa: E402

QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]
KEY = "correct horse"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [tiny_server.write_model(folder / "policy"), tiny_server.write_model(folder / "judge", scalar=True)]


@pytest.fixture(scope="module")
def server(folders):
    with tiny_server.running(folders, key=KEY) as (url, service):
        yield url, service


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model(folders):
    found = rlhf_jax.from_pretrained(folders[0])
    policy_tokenizer(found)
    return found


def ask(server, *request, **headers):
    """`tiny_server.ask` with the key."""
    return tiny_server.ask(server[0], *request, **({"Authorization": f"Bearer {KEY}"} | headers))


def alone(model, ids, seed, new, temperature=1.0, **options):
    """The text of `generate` for one prompt, its number of tokens, and whether it ended."""
    sample = SampleConfig(new, temperature, **options)
    rollout = rlhf_jax.generate(model, np.array([ids]), np.ones((1, len(ids))), sample, jax.random.key(seed))
    tokens = np.asarray(rollout.tokens[0])[np.asarray(rollout.mask[0])].tolist()
    ended = bool(rollout.ended[0])
    return decode_ids(model.tokenizer, tokens[:-1] if ended else tokens), len(tokens), ended


def idle(service):
    """Wait until no row is in use."""
    worker = service.policies["policy"].worker
    for _ in range(1000):
        if not worker.running and not worker.waiting and not worker.gone and not service.active:
            return
        time.sleep(0.01)
    raise AssertionError("a row is in use though no one waits for its answer")


def test_a_chat_completion_is_the_text_of_generate_with_its_seed(client, model):
    ids = encode_prompt(model.tokenizer, (("user", QUESTION[0]["content"]),))
    found = client.chat.completions.create(model="policy", messages=QUESTION, max_tokens=20, seed=7, temperature=0.8)
    text, count, ended = alone(model, ids, 7, 20, 0.8)
    (choice,) = found.choices
    assert choice.message.content == text.lstrip() and text.strip()
    assert choice.finish_reason == ("stop" if ended else "length")
    assert found.usage.prompt_tokens == len(ids) and found.usage.completion_tokens == count
    assert found.usage.total_tokens == len(ids) + count and found.model == "policy"


def test_a_stream_has_the_text_the_end_and_the_usage_of_the_whole_reply(client):
    options = dict(model="policy", messages=QUESTION, max_completion_tokens=25, seed=3, n=2)
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [each.choices[0] for each in chunks if each.choices and each.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        assert [each.finish_reason for each in own if each.finish_reason] == [choice.finish_reason]
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len(chunks) > 10
    assert whole.choices[0].message.content != whole.choices[1].message.content
    without = list(client.chat.completions.create(**options, stream=True))
    assert all(each.choices and each.usage is None for each in without)


def test_completions_answer_texts_and_ids_with_logprobs_and_offsets(client, model):
    text = "The capital of"
    ids = model.tokenizer(text).input_ids
    found = client.completions.create(model="policy", prompt=[text, "Human:"], max_tokens=6, seed=1, logprobs=3, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    first = found.choices[0]
    expected, count, _ = alone(model, ids, 1, 6)
    assert first.text == expected and len(first.logprobs.tokens) == count
    assert all(len(each) <= 3 for each in first.logprobs.top_logprobs)
    best = [max(each.values()) for each in first.logprobs.top_logprobs]
    assert all(own <= top + 1e-6 for own, top in zip(first.logprobs.token_logprobs, best, strict=True))
    assert first.logprobs.text_offset[0] == 0 and first.logprobs.text_offset == sorted(first.logprobs.text_offset)
    again = client.completions.create(model="policy", prompt=ids, max_tokens=6, seed=1)
    assert again.choices[0].text == expected and again.choices[0].logprobs is None
    prompts = len(ids) + len(model.tokenizer("Human:").input_ids)
    assert found.usage.prompt_tokens == prompts, "each prompt once"


def test_logprobs_of_a_chat_are_those_of_the_model_and_greedy_is_the_most_likely(client):
    found = client.chat.completions.create(
        model="policy", messages=QUESTION, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    for token in found.choices[0].logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert token.token == token.top_logprobs[0].token


def test_a_stop_string_ends_the_answer_before_it_and_frees_its_row(client, server):
    options = dict(model="policy", prompt="Human: What", max_tokens=40, seed=5)
    whole = client.completions.create(**options).choices[0].text
    stop = whole[12:15]
    cut = client.completions.create(**options, stop=[stop, "never said"], logprobs=0)
    assert cut.choices[0].text == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 40
    assert all(offset < len(cut.choices[0].text) for offset in cut.choices[0].logprobs.text_offset)
    pieces = [each.choices[0].text for each in client.completions.create(**options, stop=stop, stream=True)]
    assert "".join(pieces) == cut.choices[0].text
    idle(server[1])


def test_the_tools_are_given_to_the_template(client, server):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    status, found = ask(server, {"messages": QUESTION, "tools": tools, "max_tokens": 2})
    assert status == 400 and "the chat template does not write the tools" in found["error"]["message"]
    tokenizer = server[1].policies["policy"].tokenizer
    before = client.chat.completions.create(model="policy", messages=QUESTION, max_tokens=1).usage.prompt_tokens
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}" + template
    try:
        found = client.chat.completions.create(model="policy", messages=QUESTION, max_tokens=1, tools=tools)
    finally:
        tokenizer.chat_template = template
    assert found.usage.prompt_tokens > before


def test_models_are_listed_and_shown(client, server):
    assert [each.id for each in client.models.list()] == ["policy", "judge"]
    assert client.models.retrieve("judge").owned_by == "rlhf_jax"
    with pytest.raises(openai.NotFoundError, match="does not exist; this server has policy, judge"):
        client.models.retrieve("other")


def test_scores_are_those_of_score_texts(server, folders):
    scorer = rlhf_jax.reward_from_pretrained(folders[1])
    dialogue = [*QUESTION, {"role": "assistant", "content": "7"}]
    rows = ["A text.", dialogue, "Another, which is longer than the others."]
    status, found = ask(server, {"model": "judge", "input": rows}, "/v1/score")
    assert status == 200 and [each["index"] for each in found["data"]] == [0, 1, 2]
    np.testing.assert_allclose([each["score"] for each in found["data"]], rlhf_jax.score_texts(scorer, rows), atol=1e-5)
    status, single = ask(server, {"input": dialogue}, "/v1/score")
    assert single["data"][0]["score"] == pytest.approx(found["data"][1]["score"], abs=1e-5)


@pytest.fixture
def quick_limits(server, monkeypatch):
    """`server`, whose requests may take half a second; a step of scoring takes a fifth, and is counted."""
    counted = []

    def score_slowly(*arguments):
        counted.append(1)
        time.sleep(0.2)
        return rlhf_jax.score(*arguments)

    monkeypatch.setattr(server[1], "limits", dataclasses.replace(server[1].limits, seconds=0.5))
    monkeypatch.setattr(models, "score", score_slowly)
    return server, counted


def test_scores_that_take_too_long_get_504_and_what_is_left_of_them_is_not_computed(quick_limits):
    server, counted = quick_limits
    status, found = ask(server, {"input": ["a"] * 80}, "/v1/score")
    assert status == 504 and found["error"]["code"] == "timeout"
    assert ask(server, {"input": "a"}, "/v1/score")[0] == 200
    assert len(counted) < 6, "ten steps of eight texts, and that of the second request"


def test_scores_for_a_client_that_goes_away_are_not_computed(quick_limits):
    server, counted = quick_limits
    server[1].limits = dataclasses.replace(server[1].limits, seconds=60.0)
    send_request(server, "/v1/score", {"input": ["a"] * 80}).close()
    assert ask(server, {"input": "a"}, "/v1/score")[0] == 200
    assert len(counted) < 6


def test_too_many_texts_and_too_many_requests_for_scores_have_their_status(quick_limits, monkeypatch):
    server, _ = quick_limits
    status, found = ask(server, {"input": ["a"] * 1025}, "/v1/score")
    assert status == 400 and "1025 texts: at most 1024" in found["error"]["message"]
    monkeypatch.setitem(server[1].scorers, "judge", dataclasses.replace(server[1].scorers["judge"], most_waiting=0))
    first = send_request(server, "/v1/score", {"input": ["a"] * 80})
    while not server[1].scorers["judge"].waiting:
        time.sleep(0.01)
    status, found = ask(server, {"input": "a"}, "/v1/score")
    assert status == 429 and found["error"]["code"] == "queue_full"
    assert b" 504 " in first.recv(4096)
    first.close()


def test_a_prompt_whose_tokens_take_too_long_gets_504_and_the_next_is_answered(server, monkeypatch):
    encode = models.Policy._encode
    with monkeypatch.context() as patch:
        patch.setattr(server[1], "limits", dataclasses.replace(server[1].limits, seconds=0.2))
        patch.setattr(models.Policy, "_encode", lambda *arguments: (time.sleep(0.5), encode(*arguments))[1])
        for body in ({"messages": QUESTION}, {"messages": QUESTION, "stream": True}):
            status, found = ask(server, body)
            assert status == 504 and found["error"]["code"] == "timeout"
    assert ask(server, {"messages": QUESTION, "max_tokens": 1})[0] == 200


def test_two_models_answer_in_one_process_and_the_wrong_one_is_named(server):
    body = {"messages": QUESTION, "max_tokens": 1}
    assert ask(server, body)[0] == 200, "without a name the first that answers"
    status, found = ask(server, body | {"model": "judge"})
    assert status == 400 and "scores and gives no answers" in found["error"]["message"]
    status, found = ask(server, body | {"model": "gpt-4" + "x" * 5000})
    assert status == 404 and found["error"]["code"] == "model_not_found" and len(found["error"]["message"]) < 150
    status, found = ask(server, body | {"x" * 5000: 1})
    assert status == 400 and len(json.dumps(found)) < 300
    assert ask(server, {"model": "policy", "input": "a"}, "/v1/score")[0] == 400


def test_many_clients_at_once_get_the_answers_of_each_alone_and_nothing_is_compiled(client):
    def get(i, stream):
        options = dict(model="policy", prompt="Human: " + "x " * i, max_tokens=12, seed=i, temperature=(i % 3) / 2)
        found = client.completions.create(**options, stream=stream)
        return "".join(each.choices[0].text for each in found) if stream else found.choices[0].text

    count, found = 16, {}
    one_by_one = {i: get(i, False) for i in range(count)}

    def run(i):
        found[i] = get(i, i % 2 == 0)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    with tiny.compilations() as names:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == one_by_one and names == []


@pytest.mark.parametrize(
    ("change", "status", "code", "message"),
    [
        ({"foo": 1}, 400, "unknown_parameter", "Unrecognized request argument supplied: foo"),
        ({"messages": None}, 400, "invalid_value", "messages"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_value", "messages"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "7"}]}, 400, "invalid_value", "must end"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, 400, "context_length_exceeded", "128 tokens"),
        ({"max_tokens": 128}, 400, "context_length_exceeded", "an answer of up to 128"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens must be at least 1"),
        ({"temperature": 2.5}, 400, "invalid_value", "temperature must be from 0 to 2"),
        ({"temperature": float("nan")}, 400, "invalid_value", "temperature must be from 0 to 2"),
        ({"temperature": 10**400}, 400, "invalid_value", "temperature must be from 0 to 2"),
        ({"temperature": "1"}, 400, "invalid_type", "temperature must be a number"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"n": True}, 400, "invalid_type", "n must be an integer"),
        ({"n": 9}, 400, "invalid_value", "9 answers: at most 8"),
        ({"seed": 2**64}, 400, "invalid_value", "seed"),
        ({"stop": [""]}, 400, "invalid_value", "stop"),
        ({"stop": ["a"] * 17}, 400, "invalid_value", "at most 16"),
        ({"top_logprobs": 3}, 400, "invalid_value", "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "needs stream"),
        ({"frequency_penalty": 0.5}, 400, "unsupported_value", "frequency_penalty is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_value", "response_format"),
        ({"tool_choice": "required"}, 400, "unsupported_value", "tool_choice"),
    ],
)
def test_what_a_request_gets_wrong_is_named(server, change, status, code, message):
    got, found = ask(server, {"model": "policy", "messages": QUESTION} | change)
    assert (got, found["error"]["code"]) == (status, code)
    assert message in found["error"]["message"] and found["error"]["type"] == "invalid_request_error"


def test_neutral_and_informative_fields_are_accepted(server):
    fields = {"user": "me", "frequency_penalty": 0, "tool_choice": "none", "seed": -1, "logit_bias": None, "n": 1}
    assert ask(server, {"messages": QUESTION, "max_tokens": 1, **fields})[0] == 200


def test_bodies_keys_paths_and_methods_that_are_wrong_have_their_status(server):
    good = {"messages": QUESTION, "max_tokens": 1}
    for body in (b"{", b"[1]", b"\xff", b'{"\\ud800": 1}', b'{"messages":' + b"[" * 9000):
        got, found = ask(server, body)
        assert got == 400 and found["error"]["code"] == "invalid_json"
    assert ask(server, b"x" * 20_001)[0] == 413
    assert ask(server, good, **{"Content-Type": "text/plain"})[0] == 415
    for key in ("Bearer wrong", "Basic " + KEY, KEY, "Bearer ", "Bearer \xe9"):
        got, found = ask(server, good, Authorization=key)
        assert got == 401 and found["error"]["code"] == "invalid_api_key"
        assert ask(server, None, "/metrics", Authorization=key)[0] == 401
    assert ask(server, None, "/health", Authorization="")[0] == 200
    assert ask(server, good, "/v1/nothing")[0] == 404 and ask(server, None, "/v1/completions")[0] == 405
    assert ask(server, good)[0] == 200


@pytest.mark.parametrize(
    ("path", "key", "status", "name", "value"),
    [
        ("/v1/completions", KEY, 405, "Allow", "POST"),
        ("/v1/models", "wrong", 401, "WWW-Authenticate", "Bearer"),
    ],
)
def test_errors_have_the_headers_that_http_asks_for(server, path, key, status, name, value):
    request = urllib.request.Request(server[0] + path, headers={"Authorization": f"Bearer {key}"})
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(request, timeout=60)
    with found.value as response:
        assert response.code == status and response.headers[name] == value


def test_a_body_without_a_length_is_cut_at_the_limit(server):
    address = urllib.parse.urlsplit(server[0])
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    parts = (b" " * 10_000 for _ in range(3))
    connection.request("POST", "/v1/completions", parts, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def send_request(server, path, body):
    """The socket of a request that was sent."""
    address, content = urllib.parse.urlsplit(server[0]), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection((address.hostname, address.port))
    connection.sendall(head.encode() + content)
    return connection


def open_stream(server, **changes):
    """The socket of a stream that was asked for."""
    return send_request(server, "/v1/completions", {"prompt": "a", "max_tokens": 100, "stream": True, **changes})


def test_a_client_that_goes_away_in_mid_stream_frees_its_row(server):
    service = server[1]
    step, answering = service.policies["policy"].worker.answering.step, service.policies["policy"].worker.answering
    answering.step = lambda: (time.sleep(0.02), step())[1]
    try:
        connections = [open_stream(server, n=2, seed=i) for i in range(4)]
        for connection in connections:
            assert b"200 OK" in connection.recv(100)
            connection.close()
        idle(service)
    finally:
        answering.step = step
    counted = "".join(line for line in service.metrics.text().decode().splitlines(True) if 'status="499"' in line)
    assert 'path="/v1/completions"' in counted
    assert ask(server, {"messages": QUESTION, "max_tokens": 1})[0] == 200


def test_a_client_that_does_not_read_blocks_no_other(server):
    slow = [open_stream(server, n=8, logprobs=20) for _ in range(3)]
    start = time.monotonic()
    assert ask(server, {"messages": QUESTION, "max_tokens": 3})[0] == 200
    assert time.monotonic() - start < 30
    for connection in slow:
        connection.close()
    idle(server[1])


def test_metrics_count_requests_and_tokens(server, client):
    idle(server[1])

    def value(name):
        text = ask(server, None, "/metrics")[1]
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    name = 'rlhf_jax_requests_total{path="/v1/completions",status="200"}'
    names = [name, 'rlhf_jax_generated_tokens_total{model="policy"}', "rlhf_jax_time_to_first_token_seconds_count"]
    before = [value(each) for each in names]
    used = client.completions.create(model="policy", prompt="a", max_tokens=5).usage.completion_tokens
    assert [value(each) for each in names] == [before[0] + 1, before[1] + used, before[2] + 1]
    assert value("rlhf_jax_running{") == 0


def test_a_full_queue_and_a_slow_answer_have_their_status(folders):
    with tiny_server.running(folders[:1], rows=1, queue=1, seconds=0.5, key=KEY) as server:
        answering = server[1].policies["policy"].worker.answering
        step = answering.step
        answering.step = lambda: (time.sleep(0.1), step())[1]
        long = {"prompt": "a", "max_tokens": 100}
        streams = [open_stream(server), open_stream(server)]
        while len(server[1].policies["policy"].worker.running) + len(server[1].policies["policy"].worker.waiting) < 2:
            time.sleep(0.01)
        status, found = ask(server, long, "/v1/completions")
        assert status == 429 and found["error"]["code"] == "queue_full"
        text = b"".join(iter(lambda: streams[0].recv(4096), b""))
        assert b'"code":"timeout"' in text and b"[DONE]" not in text
        for stream in streams:
            stream.close()
        idle(server[1])
        status, found = ask(server, long, "/v1/completions")
        assert status == 504 and found["error"]["code"] == "timeout"
        idle(server[1])
        address = urllib.parse.urlsplit(server[0])
        with socket.create_connection((address.hostname, address.port)) as part:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            part.sendall(head.encode() + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in part.recv(4096)
        answering.step = step
        assert ask(server, {"prompt": "a", "max_tokens": 1}, "/v1/completions")[0] == 200


def test_a_failure_of_the_device_is_status_500_and_the_server_goes_on(server):
    answering = server[1].policies["policy"].worker.answering
    step, reset = answering.step, answering.reset

    def fail():
        raise RuntimeError("out of memory")

    answering.step = answering.reset = fail
    for _ in range(3):
        status, found = ask(server, {"messages": QUESTION, "max_tokens": 5})
        assert status == 500 and found["error"]["type"] == "server_error"
    answering.step, answering.reset = step, reset
    assert ask(server, {"messages": QUESTION, "max_tokens": 5})[0] == 200
    idle(server[1])


def test_models_are_named_by_their_folders():
    names = models.model_names(["runs/demo/ppo/export", "runs/demo/reward/export", "/data/llama/"])
    assert names == {"ppo": "runs/demo/ppo/export", "reward": "runs/demo/reward/export", "llama": "/data/llama"}
    assert list(models.model_names(["a/ppo/export", "b/ppo/export"])) == ["a/ppo", "b/ppo"]
    assert models.model_names(["one=a/x", "two=a/x"]) == {"one": "a/x", "two": "a/x"}
    with pytest.raises(ValueError, match="two models have one name"):
        models.model_names(["a/x", "a/x"])


def start_process(folder, *options):
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "rlhf_jax", "serve", f"policy={folder}", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "RLHF_JAX_API_KEY": KEY})
    return process, next(line.split()[-1] for line in process.stderr if "serve: policy at http" in line)


def resident_megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_the_commands_and_programs_of_the_page_on_serving_run(folders, tmp_path, capsys):
    text = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    shell = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    programs = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(shell) == len(programs) == 1
    with tiny_server.running([f"ppo={folders[0]}", f"reward={folders[1]}"]) as (url, _):
        here = [code.replace("http://127.0.0.1:8000", url) for code in (*shell, *programs)]
        run = subprocess.run(["bash", "-ec", here[0]], capture_output=True, text=True, timeout=60)
        assert run.returncode == 0 and run.stdout.count("data: ") > 5 and "data: [DONE]\n\n" in run.stdout
        assert json.loads(run.stdout.rpartition("\n\n")[2])["data"][0]["object"] == "score"
        exec(here[1], {})
    assert capsys.readouterr().out.strip()


def test_at_sigterm_running_answers_finish_new_requests_get_503_and_the_process_ends_with_0(folders):
    process, url = start_process(folders[0], "--rows", "2")
    try:
        # A stream that has ended before the signal comes shows the same, of an idle server.
        stream = open_stream((url,), n=2, max_tokens=120)
        received = stream.recv(4096)
        process.send_signal(signal.SIGTERM)
        assert "stopping after" in next(process.stderr)
        while part := stream.recv(4096):
            received += part
        assert b"data: [DONE]" in received and b"error" not in received
        stream.close()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_a_second_signal_ends_running_answers_at_once_and_leaves_no_thread_and_no_error(folders, caplog):
    service = tiny_server.open_service(folders[:1], key=KEY)
    server = DrainingServer(uvicorn.Config(make_app(service), port=0, log_config=None, lifespan="on"), service, "")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    worker = service.policies["policy"].worker
    step = worker.answering.step
    worker.answering.step = lambda: (time.sleep(0.05), step())[1]
    stream = open_stream((url,))
    assert b"200 OK" in stream.recv(100)
    for _ in range(2):
        server.handle_exit(signal.SIGTERM, None)
    thread.join(20)
    assert not thread.is_alive() and not worker.thread.is_alive()
    stream.close()
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_a_server_that_stops_refuses_new_requests(server):
    server[1].draining = True
    try:
        assert ask(server, None, "/health")[0] == 503
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/score"):
            status, found = ask(server, {"messages": QUESTION}, path)
            assert status == 503 and found["error"]["code"] == "shutting_down"
    finally:
        server[1].draining = False


def test_what_the_command_gets_wrong_is_one_line(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in (
            ([str(folders[0]), "--port", port], "cannot be listened on"),
            ([str(tmp_path / "empty"), "--port", "0"], "is no Hugging Face folder"),
            ([str(folders[0]), "--port", "0", "--rows", "0"], "rows"),
            ([str(folders[0]), "--port", "0", "--api-key", "schl\u00fcssel"], "holds only ASCII"),
            ([str(folders[0]), "--port", "0", "--api-key", "key\n"], "holds only ASCII"),
            ([str(folders[0]), "--port", "0", "--context", "129"], "from 2 to the 128"),
        ):
            assert main(["serve", *arguments]) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1


def test_thirty_two_clients_at_once_get_the_answers_of_each_alone(folders):
    with tiny_server.running(folders[:1], rows=32, key=KEY) as server:
        with openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0) as client:

            def get(i):
                content = "Human: " + "x" * i
                options = dict(model="policy", messages=[{"role": "user", "content": content}], seed=i, max_tokens=60)
                options |= dict(temperature=(i % 4) / 2, top_p=1 - (i % 3) / 4, stream=True)
                found = client.chat.completions.create(**options)
                return "".join(each.choices[0].delta.content or "" for each in found)

            alone = [get(i) for i in range(32)]
            with concurrent.futures.ThreadPoolExecutor(32) as pool:
                for _ in range(3):
                    assert list(pool.map(get, range(32))) == alone
        assert len(set(alone)) == 32


def test_after_a_thousand_requests_two_thousand_more_a_fifth_of_them_abusive_let_no_memory_grow(folders):
    process, url = start_process(folders[0], "--rows", "8", "--body", "20000", "--queue", "64")
    server, good = (url,), {"prompt": "Human: What", "max_tokens": 8, "seed": 1}

    def send(i):
        if i % 5:
            return ask(server, {**good, "stream": i % 2 == 0}, "/v1/completions")[0]
        kind = i // 5 % 6
        if kind == 0:
            connection = open_stream(server)
            connection.recv(10)
            connection.close()
            return 200
        bodies = {
            1: (b"x" * 30_000, {}),
            2: (b'{"prompt":', {}),
            3: (good, {"Authorization": "Bearer wrong"}),
            4: ({"prompt": "a " * 5000}, {}),
            5: ({**good, "temprature": 1}, {}),
        }
        return ask(server, bodies[kind][0], "/v1/completions", **bodies[kind][1])[0]

    try:
        sizes = []
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for part in range(6):
                numbers = range(part * 500, part * 500 + 500)
                expected = [200 if i % 5 else (200, 413, 400, 401, 400, 400)[i // 5 % 6] for i in numbers]
                assert list(pool.map(send, numbers)) == expected
                sizes.append(resident_megabytes(process.pid))
        # The first 1,000 fill allocators and caches; a leak of 2 kB for each of the next 2,000 would show.
        assert sizes[-1] - sizes[1] < 4, sizes
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
