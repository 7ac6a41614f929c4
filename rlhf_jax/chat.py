"""A conversation in the terminal with an exported model, streamed token by token."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.data.chat_template import encode_prompt, prepare_tokenizer
from rlhf_jax.data.splits import Turns
from rlhf_jax.decode import NewTokens, bucket_length, decode_step, prefill
from rlhf_jax.hardware import RUN_OPTIONS
from rlhf_jax.mesh import GENERATE, Layout
from rlhf_jax.models.inference import Inference
from rlhf_jax.models.pretrained import Pretrained, from_pretrained
from rlhf_jax.rollout import eos_ids, make_publish
from rlhf_jax.sampling import SampleConfig, check_sample, draw, penalise_logits
from rlhf_jax.stages.run_folder import date_of_export

LOGGER = logging.getLogger(__name__)
HELP = "/clear forgets the dialogue, /quit leaves"


def chat(folder: str, sample: SampleConfig, seed: int, dtype: str = "float32", adapter: str | None = None) -> None:
    """Read questions from stdin until /quit or end of file, and print the model's answers while they are sampled.

    `adapter` is a PEFT folder, kept separate from the model and not merged; `dtype` is as in `from_pretrained`.
    """
    check_sample(sample)
    if not (Path(folder) / "config.json").exists() and Path(folder).is_dir():
        raise ValueError(f"{folder} is no Hugging Face folder (no config.json): name RUN/ppo/export or RUN/sft/export")
    speaker = ChatModel(from_pretrained(folder, adapter, dtype=dtype, one_copy=True), sample)
    print(f"{folder}: {HELP}", flush=True)
    if speaker.sample != sample:
        print(
            f"(the model has {speaker.model.config.max_positions} positions: answers are cut at "
            f"{speaker.sample.max_new_tokens} tokens, the rest is for the dialogue)",
            flush=True,
        )
    turns: Turns = ()
    key = jax.random.key(seed)
    for said in read_questions():
        if said == "/clear":
            turns = ()
            print("(forgotten)", flush=True)
            continue
        if said.startswith("/"):
            print(f"unknown command {said}: {HELP}", flush=True)
            continue
        try:
            turns = speaker.trim_history((*turns, ("user", said)))
        except ValueError as error:  # caused by this message alone: the conversation continues
            print(f"({error})", flush=True)
            continue
        key, now = jax.random.split(key)
        answer = ""
        try:
            for piece in speaker.answer(turns, now):
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print(flush=True)
        turns = (*turns, ("assistant", answer))


def read_questions() -> Iterator[str]:
    """The lines that the user types, until /quit or end of file."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            # A terminal that is not UTF-8 gives surrogates, which no tokenizer accepts.
            yield line.strip().encode("utf-8", "replace").decode()


class ChatModel:
    """A published model that answers one conversation at a time; lengths are bucketed, so few are compiled."""

    def __init__(self, model: Pretrained, sample: SampleConfig):
        """Publish the model; `max_new_tokens` is cut to half of its positions.

        Raises:
            ValueError: a model without a tokenizer or EOS, or several samples.
        """
        if sample.num_samples != 1:
            raise ValueError(f"num_samples={sample.num_samples}: a conversation goes on from one answer; set 1")
        if model.tokenizer is None:
            raise ValueError("the folder has no tokenizer: save one into it (tokenizer.save_pretrained)")
        # At least half of the positions are left for the dialogue.
        longest = max(1, min(sample.max_new_tokens, model.config.max_positions // 2))
        least = min(sample.min_new_tokens, longest)
        self.sample = dataclasses.replace(sample, max_new_tokens=longest, min_new_tokens=least)
        self.tokenizer = prepare_tokenizer(model.tokenizer, date=date_of_export(model.folder))
        self.eos = eos_ids(model)
        dtype, mesh = model.params["embed/tokens"].dtype, model.layout.mesh
        self.model = Inference(model.config, Layout(mesh, GENERATE), dtype)
        self.weights = make_publish(model.config, mesh, dtype)(model.params)

    def trim_history(self, turns: Turns) -> Turns:
        """The dialogue without its oldest exchanges if all of it does not fit the model's positions, which is logged.

        Raises:
            ValueError: the last message alone does not fit.
        """
        room, dropped = self.model.config.max_positions - self.sample.max_new_tokens, 0
        while (size := len(encode_prompt(self.tokenizer, turns))) > room and len(turns) > 1:
            turns, dropped = turns[2:], dropped + 1
        if size > room:
            raise ValueError(
                f"this message has {size} tokens, and with {self.sample.max_new_tokens} for the answer the "
                f"model has room for {room}: shorten it, or lower --max-new-tokens"
            )
        if dropped:
            LOGGER.info(f"(the oldest {dropped} exchange(s) no longer fit the model's positions and are forgotten)")
        return turns

    def answer(self, turns: Turns, key: jax.Array) -> Iterator[str]:
        """The answer in pieces, each as soon as it is decodable text."""
        ids = encode_prompt(self.tokenizer, turns)
        width = bucket_length(len(ids))
        tokens = np.zeros((1, width), np.int32)
        tokens[0, width - len(ids) :] = ids
        mask = np.arange(width)[None] >= width - len(ids)
        logits, cache = _prefill(self.model, self.weights, tokens, mask, self.sample.max_new_tokens)
        seen = np.zeros((1, self.model.config.padded_vocab), bool)
        seen[0, ids] = True
        answer: list[int] = []
        shown, real = "", np.ones(1, bool)
        for t in range(self.sample.max_new_tokens):
            drawn = np.array([t], np.int32)
            token, _ = sample_next(self.sample, self.eos, logits, seen, drawn, jax.random.fold_in(key, t)[None])
            answer.append(int(token[0]))
            seen[0, answer[-1]] = True
            if answer[-1] in self.eos:
                break
            text = self.tokenizer.decode(answer, skip_special_tokens=True).lstrip()
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # part of a character of several bytes
                yield text[len(shown) :]
                shown = text
            new = NewTokens(token, real, len(ids) + drawn)
            logits, cache = _decode(self.model, self.weights, new, cache, jnp.int32(width + t))


_prefill = jax.jit(prefill, static_argnums=(0, 4), compiler_options=RUN_OPTIONS)
_decode = jax.jit(decode_step, static_argnums=0, donate_argnames="cache", compiler_options=RUN_OPTIONS)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample_next(
    sample: SampleConfig, eos: tuple[int, ...], logits: jax.Array, seen: jax.Array, drawn: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return draw(penalise_logits(logits, sample, seen, drawn, eos), keys, sample)
