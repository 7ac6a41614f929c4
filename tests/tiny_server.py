"""Folders of small models with random weights, and a server of them in a thread of the test's process."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import threading
import urllib.parse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tiny_tokenizer
import uvicorn

import rlhf_jax
from rlhf_jax.mesh import TRAIN, Layout, single_device_mesh
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.pretrained import Pretrained
from rlhf_jax.serve import Limits
from rlhf_jax.serve.app import Service, make_app
from rlhf_jax.serve.metrics import Counters
from rlhf_jax.serve.models import open_models

POSITIONS = 128
LIMITS = Limits(rows=8, queue=64, body=20_000, seconds=60.0)


def hf_config(vocab: int, positions: int = POSITIONS) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def write_model(
    folder: Path, tokenizer=None, *, scalar: bool = False, seed: int = 0, positions: int = POSITIONS
) -> Path:
    """A random model whose layers are strong enough that its answers vary."""
    tokenizer = tokenizer or tiny_tokenizer.gpt2_like()
    hf = hf_config(len(tokenizer), positions)
    config = decoder_config(hf, scalar_head=scalar)
    layout, rng = Layout(single_device_mesh(), TRAIN), np.random.default_rng(seed)
    params = {
        path: jnp.asarray(path.endswith("scale") + 0.3 * rng.standard_normal(leaf.shape), "float32")
        for path, leaf in abstract_params(config).items()
    }
    hf["pad_token_id"] = 1
    rlhf_jax.save_pretrained(Pretrained(config, params, tokenizer, hf, {}, layout), folder)
    return folder


@contextlib.contextmanager
def running(folders, limits: Limits = LIMITS, key: str = "", votes=None, **changes):
    """The address of a server, and its `Service`, while the block runs."""
    service = open_service(folders, dataclasses.replace(limits, **changes), key, votes)
    with listening(service) as url:
        yield url, service


def open_service(folders, limits: Limits = LIMITS, key: str = "", votes=None) -> Service:
    """What a server of these models shares, before it is started."""
    metrics = Counters()
    models = open_models([str(each) for each in folders], "float32", limits, metrics)
    return Service(*models, limits, metrics, key, votes)


@contextlib.contextmanager
def listening(service: Service):
    """The address at which a service answers, while the block runs."""
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def ask(url, body, path="/v1/chat/completions", **headers):
    """(status, JSON or text) of a raw request to a server; a body that is no bytes is sent as JSON, and None is GET."""
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=120)
    sent = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, sent, {"Content-Type": "application/json"} | headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(text) if is_json else text


def call_app(app, method: str, path: str, body=None, **headers):
    """(status, JSON or text) of a request to an application that is not started; a body is sent as JSON."""
    content = b"" if body is None else json.dumps(body).encode()
    given = {"content-type": "application/json"} | headers
    path, _, query = path.partition("?")
    scope = {"type": "http", "http_version": "1.1", "method": method, "path": path, "query_string": query.encode()}
    scope |= {"headers": [(name.encode(), value.encode()) for name, value in given.items()], "raw_path": path.encode()}
    sent = []

    async def receive():
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    text = b"".join(each.get("body", b"") for each in sent[1:]).decode()
    is_json = (b"content-type", b"application/json") in sent[0]["headers"]
    return sent[0]["status"], json.loads(text) if is_json else text
