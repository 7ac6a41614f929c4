"""The options of each command, and the texts of its help."""

from __future__ import annotations

import argparse

from rlhf_jax.models.dtypes import DTYPES, QUANTISED_KINDS
from rlhf_jax.stages.table import export_folders

CONFIG_HELP = """CONFIG is a TOML file of configs/ or of your own. Any key can be overridden after it:
  rlhf-jax train configs/demo.toml run.dir=runs/mine sft.steps=200 ppo.kl_coef=0.05
"""
PLAN_HELP = """CONFIG is the same as for `train`; of the models only config.json is read. Examples:
  rlhf-jax plan configs/opt-1.3b-single_gpu.toml --gpus A100-80GB
  rlhf-jax plan mine.toml mesh.tensor=8 --gpus 8xA100-80GB --price-per-gpu-hour 2.5 --json
  rlhf-jax plan mine.toml --gpus 4x8xH100-80GB
With JAX's CUDA plugin installed the programs are compiled for the GPUs named; no GPU is needed. Without it the answer
has bounds: it fits, does not fit (by what must be resident alone), or "cannot tell without the plugin".
Exit code: 0 fits, 1 does not fit, 2 error, 3 cannot tell.
"""
DATA_HELP = """CONFIG is the same as for `train`. Tokens with loss are bold green, or between brackets where
colours are not possible. Tokenized rows are cached for `train`. Examples:
  rlhf-jax data configs/demo.toml
  rlhf-jax data mine.toml data.max_bad_rows=10 --examples 5
"""
EVALUATE_HELP = f"""{CONFIG_HELP}
With --prompts: folders or hub ids instead of CONFIG, and key=value of its section [evaluate]. Win rates are over the
first model. A reward function is called as in TRL: function(prompts=, completions=, **columns) -> a list of numbers.
  rlhf-jax evaluate A B --prompts mine.jsonl --reward RUN/reward/export sample.temperature=0 prompts=100
  rlhf-jax evaluate A B --prompts '{{ path = "mine.csv", prompt = "question" }}' --reward judge.py:score
"""
SCORE_HELP = """FILE holds texts, dialogues or pairs, in any format that training reads; a row gives a line of JSON:
  rlhf-jax score runs/demo/reward/export pairs.jsonl
  rlhf-jax score runs/demo/reward/export '{ path = "mine.csv", prompt = "question" }' --output scores.jsonl
"""
SERVE_HELP = """The API is that of OpenAI (/v1/chat/completions, /v1/completions, /v1/models), with /v1/score for reward
models, /health and /metrics; a web chat is at /. A model is named by its folder: RUN/ppo/export is "ppo". Examples:
  rlhf-jax serve runs/demo/ppo/export
  rlhf-jax serve runs/demo/ppo/export runs/demo/reward/export --port 8080
  rlhf-jax serve before=runs/demo/sft/export after=runs/demo/ppo/export --votes votes.jsonl
  RLHF_JAX_API_KEY=secret rlhf-jax serve before=runs/demo/sft/export after=runs/demo/ppo/export --host 0.0.0.0
"""
IMPORT_HELP = """Examples:
  rlhf-jax import meta-llama/Llama-3.2-1B llama --adapter my-adapter --dtype bfloat16
  rlhf-jax export runs/mine assistant --dtype bfloat16
  rlhf-jax export runs/mine assistant-adapter --adapter
  rlhf-jax export runs/mine assistant --container google/gemma-3-4b-it
"""
ROLLOUTS_HELP = """On a terminal in a pager, elsewhere as plain lines. Examples:
  rlhf-jax rollouts runs/demo --sort=-score --limit 20
  rlhf-jax rollouts runs/demo --step 40-50 --search Rome --finish length
  rlhf-jax rollouts runs/demo --json | jq .score
"""
REPORT_HELP = """One page that opens from disk: curves, machine, throughput, evaluation, rollouts, settings. Examples:
  rlhf-jax report runs/demo
  rlhf-jax report runs/demo runs/demo-1 --output both.html
"""
ADAPTER_HELP = "a PEFT folder, whose LoRA adapter is added to the model"


def log_options() -> argparse.ArgumentParser:
    """The options that are accepted before and after the command."""
    options = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    options.add_argument("--quiet", action="store_true", help="only warnings and errors")
    text = "messages as JSON, one object per line: time, level, logger, message"
    options.add_argument("--json-logs", action="store_true", help=text)
    return options


def add_plan_options(command: argparse.ArgumentParser) -> None:
    machine = "8xNAME, or nodes x GPUs as 4x8xNAME; an unknown NAME lists the known ones (default: this machine's "
    machine += "GPUs, or without any those of CONFIG's header)"
    command.add_argument("--gpus", metavar="8xA100-80GB", help=machine)
    command.add_argument("--price-per-gpu-hour", type=float, default=0.0, metavar="PRICE", help="for the cost")
    command.add_argument("--json", action="store_true", help="everything, in bytes and seconds, as one JSON object")


def add_evaluate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompts", metavar="FILE", help="a file, folder or hub id, or an item of data.sources")
    command.add_argument("--reward", metavar="JUDGE", default="", help="a reward model's folder, or FILE.py:FUNCTION")
    command.add_argument("--output", metavar="FOLDER", help="writes evaluate.json and evaluate.jsonl there")
    command.add_argument("--dtype", default="float32", choices=DTYPES, help="of the models (default: %(default)s)")


def add_score_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", help="a reward model's folder, for example RUN/reward/export")
    command.add_argument("file", metavar="FILE", help="a file, folder or hub id, or an item of data.sources")
    command.add_argument("--output", metavar="FILE", help="where the lines are written (default: stdout)")
    command.add_argument("--dtype", default="float32", choices=DTYPES, help="of the model (default: %(default)s)")
    command.add_argument("--adapter", metavar="FOLDER", help=ADAPTER_HELP)


def add_rollouts_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", help="the run.dir of a training")
    command.add_argument("--stage", default="", help="that sampled them (default: all)")
    command.add_argument("--step", default="", metavar="N", help="one, or a range: 3-9, 3-, -9 (default: all)")
    sorts = "score, kl, length, reward or step: the least first; after a minus the greatest, --sort=-score"
    command.add_argument("--sort", default="", metavar="[-]NAME", help=f"{sorts} (default: as written)")
    command.add_argument("--search", default="", metavar="TEXT", help="in prompt or response, in any case of letters")
    command.add_argument("--finish", default="", choices=("eos", "length"), help="how the response ended")
    command.add_argument("--limit", type=int, default=0, metavar="N", help="at most N (default: all)")
    command.add_argument("--json", action="store_true", help="the records of the files, one JSON object per line")


def add_chat_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="FOLDER", help="a Hugging Face folder, for example RUN/ppo/export")
    longest = "longest answer, in tokens (default: 256; never more than half of the model's positions)"
    command.add_argument("--max-new-tokens", type=int, default=256, help=longest)
    command.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1.0)")
    command.add_argument("--top-p", type=float, default=1.0, help="nucleus to sample from (default: 1.0, everything)")
    add_model_dtype(command)
    command.add_argument("--seed", type=int, default=0, help="sampling seed (default: 0)")
    command.add_argument("--adapter", metavar="FOLDER", help=ADAPTER_HELP)
    text = "a second model, which answers the same messages side by side"
    command.add_argument("--versus", metavar="FOLDER", help=text)


def add_serve_options(command: argparse.ArgumentParser) -> None:
    text = "a Hugging Face folder, for example RUN/ppo/export, or NAME=FOLDER"
    command.add_argument("folders", metavar="FOLDER", nargs="+", help=text)
    text = "the address to listen on (default: %(default)s, which only this machine reaches)"
    command.add_argument("--host", default="127.0.0.1", help=text)
    command.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    text = "what clients must send as Authorization: Bearer KEY (default: that of RLHF_JAX_API_KEY; without it nothing)"
    command.add_argument("--api-key", metavar="KEY", default="", help=text)
    text = "JSON lines that votes of the web page are appended to, as `reward` and `dpo` read them (default: not kept)"
    command.add_argument("--votes", metavar="FILE", default="", help=text)
    text = "answers of a model that are decoded at once (default: %(default)s)"
    command.add_argument("--rows", type=int, default=32, help=text)
    text = "tokens of a prompt and its answer (default: the positions of the model, at most 4096)"
    command.add_argument("--context", type=int, default=0, metavar="TOKENS", help=text)
    text = "answers that may wait for a row; more get status 429 (default: %(default)s)"
    command.add_argument("--queue", type=int, default=256, metavar="ANSWERS", help=text)
    text = "texts that one request has scored; more get status 400 (default: %(default)s)"
    command.add_argument("--inputs", type=int, default=1024, metavar="TEXTS", help=text)
    text = "bytes of a request; more get status 413 (default: %(default)s)"
    command.add_argument("--body", type=int, default=4_000_000, metavar="BYTES", help=text)
    text = "seconds until an answer or all scores of a request are there; more get status 504 (default: %(default)s)"
    command.add_argument("--seconds", type=float, default=600.0, help=text)
    add_model_dtype(command)


def add_model_dtype(command: argparse.ArgumentParser) -> None:
    widths = "of weights, activations and cache; int8, nf4: kernels in 8.25 or 4.13 bits per weight, the rest bfloat16"
    kinds = (*DTYPES, *QUANTISED_KINDS)
    command.add_argument("--dtype", default="float32", choices=kinds, help=f"{widths} (default: %(default)s)")


def add_folder_options(reads: argparse.ArgumentParser, writes: argparse.ArgumentParser) -> None:
    """The options of `import` and `export`."""
    reads.add_argument("source", metavar="SRC", help="a folder with safetensors, or a hub id")
    writes.add_argument("source", metavar="RUN", help="the run.dir of a training")
    for command in (reads, writes):
        command.add_argument("destination", metavar="DST", help="the folder to write, which does not exist or is empty")
        text = "write this multimodal folder (or hub id) with the model as its text model, in its dtype, all else kept"
        command.add_argument("--container", metavar="FOLDER", help=text)
    reads.add_argument("--adapter", metavar="FOLDER", help=ADAPTER_HELP)
    reads.add_argument("--dtype", choices=DTYPES, help="default: that of SRC")
    writes.add_argument("--stage", choices=export_folders(), default="", help="default: the last policy of the run")
    writes.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, as PEFT loads it")
    writes.add_argument("--dtype", choices=DTYPES, help="of a whole model (default: that of the run's export)")
