"""Throughput and time to first token of `rlhf-jax serve`, of `transformers serve` too if TRANSFORMERS_PYTHON names a
Python with transformers[serving].

    TRANSFORMERS_PYTHON=.serving/bin/python python -m benchmarks.serve [--layers 8] [--hidden 512] [--tokens 64]

A random Llama model in float32, a vocabulary of 8192, prompts of 48 tokens, answers of up to 64, greedy
unless a temperature is named, streamed. Each server is a process of its own, and so is nothing else; every stream sends
its next request when its answer has ended. Before the measurement each number of streams runs once.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rlhf_jax
from benchmarks.provenance import record
from rlhf_jax.mesh import TRAIN, Layout, single_device_mesh
from rlhf_jax.models.decoder import abstract_params
from rlhf_jax.models.families import decoder_config
from rlhf_jax.models.pretrained import Pretrained

VOCAB, PROMPT = 8192, 48
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
ROUNDS = 2  # requests of each stream
LONE_REQUESTS = 6


def write_model(folder: Path, layers: int, hidden: int) -> None:
    """A random model; its tokenizer has a word for each id."""
    hf = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    words = {word: i for i, word in enumerate(["<s>", "</s>", *(f"w{i}" for i in range(2, VOCAB))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="w2", chat_template=TEMPLATE)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    config, rng = decoder_config(hf, scalar_head=False), np.random.default_rng(0)
    params = {
        path: jnp.asarray(path.endswith("scale") + rng.normal(0, 0.05, leaf.shape), "float32")
        for path, leaf in abstract_params(config).items()
    }
    layout = Layout(single_device_mesh(), TRAIN)
    rlhf_jax.save_pretrained(Pretrained(config, params, tokenizer, hf, {}, layout), folder)


def stream_answer(port: int, model: str, seed: int, tokens: int, temperature: float) -> tuple[float, int]:
    """(seconds to the first text, number of tokens) of one request."""
    words = np.random.default_rng(seed).integers(2, VOCAB, PROMPT)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": " ".join(f"w{i}" for i in words)}],
        "max_tokens": tokens,
        "temperature": temperature,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start, first, count = time.perf_counter(), 0.0, 0
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"status {response.status}: {response.read()[:500]}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if not first and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
            first = time.perf_counter() - start
        count = (chunk.get("usage") or {}).get("completion_tokens", count)
    connection.close()
    if not count:
        raise SystemExit("the server reported no usage")
    return first, count


def measure(port: int, model: str, streams: int, tokens: int, temperature: float) -> dict[str, float]:
    """Numbers of `streams` streams at once, of ROUNDS requests each; of one stream, LONE_REQUESTS."""
    rounds = ROUNDS if streams > 1 else LONE_REQUESTS

    def run(stream: int) -> list[tuple[float, int]]:
        seeds = (1000 * stream + i for i in range(rounds))
        return [stream_answer(port, model, seed, tokens, temperature) for seed in seeds]

    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        start = time.perf_counter()
        found = [each for answers in pool.map(run, range(streams)) for each in answers]
        seconds = time.perf_counter() - start
    first = np.array([each[0] for each in found])
    return {
        "requests": len(found),
        "tokens_per_second": sum(each[1] for each in found) / seconds,
        "first_token_p50": float(np.quantile(first, 0.5)),
        "first_token_p95": float(np.quantile(first, 0.95)),
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_server(command: list[str], port: int) -> subprocess.Popen:
    """The process of a server, once it answers /health."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return process
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{command[:4]} ended with code {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    other = os.environ.get("TRANSFORMERS_PYTHON")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "random"
        write_model(folder, args.layers, args.hidden)
        port = free_port()
        ours = [sys.executable, "-m", "rlhf_jax", "serve", str(folder), "--port", str(port), "--rows"]
        servers = [("rlhf_jax", [*ours, "32"], folder.name, [(1, 0.0), (16, 0.0), (32, 0.0), (32, 1.0)])]
        if other:
            call = [other, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
            call += ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
            servers.append(("transformers", call, str(folder), [(1, 0.0), (16, 0.0)]))
        for name, command, model, loads in servers:
            process = start_server(command, port)
            try:
                for streams, temperature in loads:
                    measure(port, model, streams, 4, temperature)
                    numbers = measure(port, model, streams, args.tokens, temperature)
                    numbers = {key: round(value, 4) for key, value in numbers.items()}
                    sizes = {"layers": args.layers, "hidden": args.hidden, "tokens": args.tokens}
                    result = {"server": name, "streams": streams, "temperature": temperature, **sizes, **numbers}
                    print(result, flush=True)
                    record("serve", result, "server", "streams", "temperature", "layers", "hidden", "tokens")
            finally:
                process.terminate()
                process.wait(60)


if __name__ == "__main__":
    main()
