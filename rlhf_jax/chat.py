"""A conversation in the terminal with an exported model, or with two side by side, streamed as tokens come."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from rlhf_jax.answering import Answering, Request, policy_tokenizer
from rlhf_jax.data.chat_template import encode_prompt
from rlhf_jax.data.splits import Turns
from rlhf_jax.detokenise import INCOMPLETE, TextStream
from rlhf_jax.models.pretrained import Pretrained, from_pretrained
from rlhf_jax.sampling import SampleConfig, check_sample

LOGGER = logging.getLogger(__name__)
COMMANDS = {
    "/help": "lists the commands",
    "/clear": "forgets the dialogue, not the system text",
    "/system TEXT": "says how to answer, in the template's system turn; without TEXT no longer",
    "/set NAME=VALUE": "changes temperature, top_p, max_new_tokens or seed; without NAME shows them",
    "/retry": "samples another answer to the last message",
    "/save FILE": "writes the dialogue as a line of JSON, as training reads it",
    "/quit": "leaves, as Ctrl-D does; Ctrl-C stops an answer",
}
SETTINGS = {"temperature": float, "top_p": float, "max_new_tokens": int, "seed": int}
HISTORY_LINES = 1000


def chat(
    folder: str,
    sample: SampleConfig,
    seed: int,
    dtype: str = "float32",
    adapter: str | None = None,
    versus: str | None = None,
) -> None:
    """Read questions from stdin until /quit or end of file, and print the model's answers while they are sampled.

    `adapter` is a PEFT folder, kept separate from the model and not merged; `dtype` is as in `from_pretrained`;
    `versus` is the folder of a second model, which answers the same messages.
    """
    check_sample(sample)
    folders = [folder] if versus is None else [folder, versus]
    for each in folders:
        if not (Path(each) / "config.json").exists() and Path(each).is_dir():
            raise ValueError(
                f"{each} is no Hugging Face folder (no config.json): name RUN/ppo/export or RUN/sft/export"
            )
    adapters = [adapter, None]
    loaded = [from_pretrained(*each, dtype=dtype, one_copy=True) for each in zip(folders, adapters, strict=False)]
    talk = Conversation([ChatModel(model, sample) for model in loaded], folders, sample, seed)
    print(f"{' and '.join(folders)}: /help lists the commands", flush=True)
    talk.report_lengths()
    for said in read_questions():
        talk.receive(said)


def read_questions() -> Iterator[str]:
    """The lines that the user types, until /quit or end of file; Ctrl-C twice in a row raises KeyboardInterrupt."""
    is_stopped = False
    with line_editing() as ask:
        while True:
            try:
                line = ask()
            except EOFError:
                return
            except KeyboardInterrupt:
                if is_stopped:
                    raise
                print("\n(/quit or Ctrl-D leaves, and so does a second Ctrl-C)", flush=True)
                is_stopped = True
                continue
            is_stopped = False
            if line.strip() == "/quit":
                return
            if line.strip():
                # A terminal that is not UTF-8 gives surrogates, which no tokenizer accepts.
                yield line.strip().encode("utf-8", "replace").decode()


@contextlib.contextmanager
def line_editing():
    """A function that reads a line. In a terminal lines can be edited, and those of earlier chats are remembered."""

    def read() -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    if not sys.stdin.isatty():
        yield read
        return
    try:
        import readline
    except ImportError:  # Windows has none
        yield lambda: input("> ")
        return
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf_jax" / "chat_history"
    with remembered_lines(kept, readline):
        yield lambda: input("> ")


@contextlib.contextmanager
def remembered_lines(kept: Path, readline: ModuleType) -> Iterator[None]:
    """Reads the lines of earlier chats from `kept`, and at the end writes all there; a warning where that fails."""

    def warn(error: OSError) -> None:
        LOGGER.warning(f"chat: lines are not remembered, as {kept} cannot be used: {error.strerror or error}")

    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        if kept.exists():
            readline.read_history_file(kept)
    except OSError as error:
        warn(error)
        yield  # and nothing is written to what could not be read
        return
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        try:
            readline.write_history_file(kept)
        except OSError as error:
            warn(error)


class Conversation:
    """One or two models, the turns of each, and the settings of their answers."""

    def __init__(self, models: Sequence[ChatModel], names: Sequence[str], sample: SampleConfig, seed: int):
        self.models, self.names, self.sample, self.seed = models, names, sample, seed
        self.system = ""
        self.count = 0  # answers since the seed was set: each has the next seed
        self.turns: list[Turns] = [()] * len(models)  # without the system text
        self.is_cut = False  # whether it was said that turns are forgotten

    def receive(self, said: str) -> None:
        """Answer a message, or do what a command says."""
        if not said.startswith("/"):
            self.answer([(*turns, ("user", said)) for turns in self.turns])
            return
        name, _, argument = said.partition(" ")
        known = {each.split()[0] for each in COMMANDS}
        if name in known:
            getattr(self, "do_" + name[1:])(argument.strip())
        else:
            print(f"unknown command {name}: /help lists the commands", flush=True)

    def do_help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        print("\n".join(f"{name:{width}}  {text}" for name, text in COMMANDS.items()), flush=True)

    def do_clear(self, _: str) -> None:
        self.turns, self.is_cut = [()] * len(self.models), False
        print("(forgotten)", flush=True)

    def do_system(self, text: str) -> None:
        self.system = text
        print("(system text set)" if text else "(no system text)", flush=True)

    def do_set(self, text: str) -> None:
        name, _, value = (part.strip() for part in text.partition("="))
        try:
            if text:
                if name not in SETTINGS:
                    raise ValueError(f"{name!r} is none of {', '.join(SETTINGS)}")
                self.change(name, SETTINGS[name](value))
            shown = {key: self.seed if key == "seed" else getattr(self.sample, key) for key in SETTINGS}
            print("(" + ", ".join(f"{key}={value}" for key, value in shown.items()) + ")", flush=True)
            self.report_lengths()
        except ValueError as error:
            print(f"({error})", flush=True)

    def change(self, name: str, value: float) -> None:
        """Change one setting. ValueError for values that define no distribution."""
        if name == "seed":
            self.seed, self.count = int(value), 0
            return
        changed = dataclasses.replace(self.sample, **{name: value})
        check_sample(changed)
        self.sample = changed

    def do_retry(self, _: str) -> None:
        if not self.turns[0]:
            print("(nothing to answer yet)", flush=True)
            return
        self.answer([turns[:-1] for turns in self.turns])

    def do_save(self, path: str) -> None:
        try:
            if not path or not self.turns[0]:
                raise ValueError("name a file" if not path else "nothing to save yet")
            with open(Path(path).expanduser(), "a", encoding="utf-8") as out:
                for turns in self.turns:
                    messages = [{"role": role, "content": text} for role, text in self.with_system(turns)]
                    out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            print(f"(written to the end of {path})", flush=True)
        except (OSError, ValueError) as error:
            print(f"({error})", flush=True)

    def report_lengths(self) -> None:
        """Say where answers are shorter than the setting."""
        for model in self.models:
            if model.longest(self.sample) < self.sample.max_new_tokens:
                print(
                    f"(the model has {model.answering.context} positions: answers are cut at "
                    f"{model.longest(self.sample)} tokens, the rest is for the dialogue)",
                    flush=True,
                )

    def with_system(self, turns: Turns) -> Turns:
        return ((("system", self.system),) if self.system else ()) + turns

    def answer(self, asked: list[Turns]) -> None:
        """Print the answers to dialogues that end with the user's turn, which become the conversation."""
        try:
            asked = [self.fit(*each) for each in zip(self.models, asked, strict=True)]
        except ValueError as error:  # caused by this message alone: the conversation continues
            print(f"({error})", flush=True)
            return
        seed, self.count = self.seed + self.count, self.count + 1
        said = [""] * len(asked)
        streams = [
            model.answer(self.with_system(turns), self.sample, seed)
            for model, turns in zip(self.models, asked, strict=True)
        ]
        show = print_stream if len(streams) == 1 else Columns(self.names)
        try:
            for index, piece in interleave(streams):
                said[index] += piece
                show(index, piece)
        except KeyboardInterrupt:
            show(0, " (stopped)")
        finally:
            for stream in streams:
                stream.close()
        show(None, "")
        self.turns = [(*turns, ("assistant", text)) for turns, text in zip(asked, said, strict=True)]

    def fit(self, model: ChatModel, turns: Turns) -> Turns:
        """The dialogue without its oldest exchanges, if all of it does not fit the model; that is said once.

        Raises:
            ValueError: the last message alone does not fit, or the template rejects the dialogue.
        """
        room, first = model.answering.context - model.longest(self.sample), 0
        while (size := len(encode_prompt(model.tokenizer, self.with_system(turns[first:])))) > room:
            if first + 1 == len(turns):
                raise ValueError(
                    f"this message has {size} tokens, and with {model.longest(self.sample)} for the answer the "
                    f"model has room for {room}: shorten it, or lower --max-new-tokens"
                )
            first += 2
        if first and not self.is_cut:
            print("(the oldest turns no longer fit the model's positions and are forgotten, from now on)", flush=True)
            self.is_cut = True
        return turns[first:]


def interleave(streams: Sequence[Iterator[str]]) -> Iterator[tuple[int, str]]:
    """(number of the stream, piece), one of each stream in turn, until all have ended."""
    pieces = [zip(itertools.repeat(i), stream, strict=False) for i, stream in enumerate(streams)]
    return (each for row in itertools.zip_longest(*pieces) for each in row if each is not None)


def print_stream(index: int | None, piece: str) -> None:
    """Print a piece; None: the end of the answer."""
    print(piece, end="\n" if index is None else "", flush=True)


class Columns:
    """Two answers side by side: a line is printed when it is full in both, or when an answer has ended."""

    def __init__(self, names: Sequence[str]):
        self.width = max(10, (shutil.get_terminal_size().columns - 3) // 2)
        self.texts, self.printed = ["", ""], 0
        self._print([name[-self.width :] for name in names])

    def __call__(self, index: int | None, piece: str) -> None:
        if index is not None:
            self.texts[index] += piece
        lines = [self._wrap(text) for text in self.texts]
        full = max(map(len, lines)) if index is None else min(map(len, lines)) - 1
        for i in range(self.printed, full):
            self._print([each[i] if i < len(each) else "" for each in lines])
        self.printed = max(self.printed, full)

    def _wrap(self, text: str) -> list[str]:
        return [line for part in text.split("\n") for line in textwrap.wrap(part, self.width) or [""]]

    def _print(self, cells: Sequence[str]) -> None:
        print(f"{cells[0]:{self.width}} | {cells[1]}".rstrip(), flush=True)


class ChatModel:
    """A published model that answers one conversation at a time."""

    def __init__(self, model: Pretrained, sample: SampleConfig):
        """Publish the model.

        Raises:
            ValueError: a model without a tokenizer or EOS, or settings that a conversation does not have.
        """
        allowed = SampleConfig(sample.max_new_tokens, sample.temperature, top_p=sample.top_p)
        if sample != allowed:
            raise ValueError("a conversation is sampled by max_new_tokens, temperature and top_p: leave out the others")
        self.tokenizer = policy_tokenizer(model)
        self.answering = Answering(model, rows=1)

    def longest(self, sample: SampleConfig) -> int:
        """Largest number of tokens of an answer: at least half of the positions are left for the dialogue."""
        return max(1, min(sample.max_new_tokens, self.answering.context // 2))

    def answer(self, turns: Turns, sample: SampleConfig, seed: int) -> Iterator[str]:
        """The answer in pieces, each as soon as it is text that no later token changes."""
        ids, stream = encode_prompt(self.tokenizer, turns), TextStream(self.tokenizer, strip=True)
        request = Request(ids, self.longest(sample), sample.temperature, sample.top_p, seed)
        self.answering.add(stream, request)
        try:
            while not self.answering.free:
                for token in self.answering.step():
                    is_end = token.is_last and token.id in self.answering.decoding.eos_ids
                    if piece := "" if is_end else stream.push(token.id):
                        yield piece
            if piece := stream.finish().rstrip(INCOMPLETE):  # a character that was cut
                yield piece
        except KeyboardInterrupt:  # in a step, perhaps after it took the old state and before it gave the new one
            self.answering.reset()
            raise
        finally:
            self.answering.stop(stream)
