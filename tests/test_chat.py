"""The chat in the terminal: its commands, its history, and the text shown while an answer is generated."""

import dataclasses
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_recipe

import rlhf_jax
import rlhf_jax.chat
from rlhf_jax.answering import Answering, Token
from rlhf_jax.chat import COMMANDS, ChatModel, Columns, chat, read_questions
from rlhf_jax.cli import main
from rlhf_jax.data.chat_template import encode_prompt
from rlhf_jax.data.dialogues import parse_messages
from rlhf_jax.sampling import SampleConfig

GREEDY = SampleConfig(max_new_tokens=12, temperature=0.0)
SAMPLED = SampleConfig(max_new_tokens=12)
QUESTION = (("user", "What is 3 + 4?"),)


@pytest.fixture
def folder(tmp_path_factory):
    return tiny_recipe.finished_run(tmp_path_factory) / "sft/export"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return rlhf_jax.from_pretrained(tiny_recipe.finished_run(tmp_path_factory) / "sft/export")


def talk(patch, folder, text: str, *options: str) -> int:
    patch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", str(folder), "--max-new-tokens", "12", "--temperature", "0", *options])


def patch_answers(patch, *answers: str) -> list:
    """Make the model give these answers in pieces of three letters; returns the list of dialogues it receives."""
    asked, left = [], iter(answers)

    def answer(self, turns, sample, seed):
        asked.append(turns)
        text = next(left)
        yield from (text[i : i + 3] for i in range(0, len(text), 3))

    patch.setattr(ChatModel, "answer", answer)
    return asked


def patch_tokens(patch, ids: list[int]) -> None:
    """Make the model choose these tokens in order, the last of which ends the answer."""
    left = list(ids)

    def step(self):
        owner, id = self.owners[0], left.pop(0)
        if not left:
            self.stop(owner)
        return [Token(owner, id, 0.0, (), not left)]

    patch.setattr(Answering, "step", step)


def test_the_second_question_includes_the_first_exchange(folder, monkeypatch, capsys):
    asked = patch_answers(monkeypatch, "Paris it is.", "So did I.")
    assert talk(monkeypatch, folder, "Where?\n\n  I thought so. \n") == 0
    assert asked == [
        (("user", "Where?"),),
        (("user", "Where?"), ("assistant", "Paris it is."), ("user", "I thought so.")),
    ]
    assert capsys.readouterr().out.splitlines()[1:] == ["Paris it is.", "So did I."]


def test_clear_forgets_the_dialogue_and_quit_exits(folder, monkeypatch, capsys):
    asked = patch_answers(monkeypatch, "A.", "B.")
    assert talk(monkeypatch, folder, "one\n/clear\ntwo\n/quit\nthree\n") == 0
    assert asked == [(("user", "one"),), (("user", "two"),)]
    assert capsys.readouterr().out.splitlines()[1:] == ["A.", "(forgotten)", "B."]


def test_help_lists_every_command_and_an_unknown_one_is_not_sent_to_the_model(folder, monkeypatch, capsys):
    asked = patch_answers(monkeypatch)
    assert talk(monkeypatch, folder, "/help\n/nothing\n") == 0  # the end of the input exits
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].rstrip() for line in said[1:-1]] == list(COMMANDS)
    assert said[-1] == "unknown command /nothing: /help lists the commands" and asked == []


def test_a_system_text_comes_first_until_it_is_taken_back(folder, monkeypatch, capsys):
    asked = patch_answers(monkeypatch, "A.", "B.", "C.")
    assert talk(monkeypatch, folder, "/system Be brief.\none\n/clear\ntwo\n/system\nthree\n") == 0
    assert asked[:2] == [(("system", "Be brief."), ("user", q)) for q in ("one", "two")]
    assert asked[2] == (("user", "two"), ("assistant", "B."), ("user", "three"))


def test_retry_samples_another_answer_to_the_same_message(folder, monkeypatch, capsys):
    seeds, first = [], rlhf_jax.chat.ChatModel.answer

    def answer(self, turns, sample, seed):
        seeds.append((turns, seed))
        return first(self, turns, sample, seed)

    monkeypatch.setattr(ChatModel, "answer", answer)
    assert talk(monkeypatch, folder, "/retry\none\n/retry\n/set seed=0\n/retry\n", "--temperature", "1.5") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "(nothing to answer yet)"
    assert seeds == [((("user", "one"),), seed) for seed in (0, 1, 0)]


def test_settings_are_shown_changed_and_checked(folder, monkeypatch, capsys):
    used = []

    def answer(self, turns, sample, seed):
        used.append((sample.temperature, sample.top_p, self.longest(sample), seed))
        yield "A."

    monkeypatch.setattr(ChatModel, "answer", answer)
    lines = ["/set", "/set temperature=0.5", "/set top_p = 0.9", "/set max_new_tokens=500", "/set seed=7", "hello"]
    lines += ["/set top_p=2", "/set temperature=hot", "/set colour=red", "again"]
    assert talk(monkeypatch, folder, "\n".join(lines) + "\n") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "(temperature=0.0, top_p=1.0, max_new_tokens=12, seed=0)"
    assert "(the model has 160 positions: answers are cut at 80 tokens, the rest is for the dialogue)" in said
    assert used == [(0.5, 0.9, 80, 7), (0.5, 0.9, 80, 8)]
    refused = said[said.index("A.") + 1 : -1]
    assert "top_p=2.0: above 0" in refused[0] and "could not convert" in refused[1]
    assert refused[2] == "('colour' is none of temperature, top_p, max_new_tokens, seed)"


def test_a_saved_dialogue_is_a_row_that_training_reads(folder, tmp_path, monkeypatch, capsys):
    patch_answers(monkeypatch, "A.", "Café.")
    file = tmp_path / "said.jsonl"
    lines = [f"/save {file}", "/system Be brief.", "one", "two", f"/save {file}", "/save", f"/save {tmp_path}"]
    assert talk(monkeypatch, folder, "\n".join(lines) + "\n") == 0
    (row,) = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    roles, texts = ("system", "user", "assistant", "user", "assistant"), ("Be brief.", "one", "A.", "two", "Café.")
    assert parse_messages(row["messages"]) == tuple(zip(roles, texts, strict=True))
    said = capsys.readouterr().out
    assert "(nothing to save yet)" in said and "(name a file)" in said and "Is a directory" in said


def test_two_models_answer_side_by_side_and_each_continues_its_own_dialogue(folder, monkeypatch, capsys):
    asked = patch_answers(monkeypatch, "One two three four.", "Short.\n\nAnd lines.", "C.", "D.")
    monkeypatch.setenv("COLUMNS", "25")
    assert talk(monkeypatch, folder, "one\ntwo\n", "--versus", str(folder)) == 0
    assert asked[2:] == [
        (("user", "one"), ("assistant", "One two three four."), ("user", "two")),
        (("user", "one"), ("assistant", "Short.\n\nAnd lines."), ("user", "two")),
    ]
    said = capsys.readouterr().out.splitlines()
    assert said[2:5] == ["One two     | Short.", "three four. |", "            | And lines."]
    assert said[-1] == "C.          | D."


def test_columns_are_printed_line_by_line_as_both_are_full(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "23")
    show = Columns(["a", "b"])
    capsys.readouterr()
    show(0, "one two three")
    assert capsys.readouterr().out == ""
    show(1, "four five six")
    assert capsys.readouterr().out == "one two    | four five\n"
    show(None, "")
    assert capsys.readouterr().out == "three      | six\n"


def test_ctrl_c_stops_the_answer_and_not_the_conversation(folder, monkeypatch, capsys):
    asked = []

    def answer(self, turns, sample, seed):
        asked.append(turns)
        yield "I was"
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ChatModel, "answer", answer)
    assert talk(monkeypatch, folder, "one\ntwo\n") == 0
    assert asked[1] == (("user", "one"), ("assistant", "I was"), ("user", "two"))
    assert "I was (stopped)\nI was\n" in capsys.readouterr().out


def test_a_second_ctrl_c_at_the_prompt_exits_without_a_message_about_checkpoints(folder, monkeypatch, capsys):
    asked = patch_answers(monkeypatch, "A.")
    typed = iter([KeyboardInterrupt, "one\n", KeyboardInterrupt, KeyboardInterrupt])

    def readline():
        if isinstance(each := next(typed), str):
            return each
        raise each

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=readline, isatty=lambda: False))
    assert main(["chat", str(folder)]) == 130
    assert len(asked) == 1
    captured = capsys.readouterr()
    assert captured.err == "rlhf-jax: interrupted\n"
    assert captured.out.count("a second Ctrl-C") == 2


def test_a_stopped_answer_frees_the_row_of_the_model(model):
    speaker = ChatModel(model, SampleConfig(max_new_tokens=12))
    stream = speaker.answer(QUESTION, SampleConfig(max_new_tokens=12), 0)
    next(stream)
    stream.close()
    assert speaker.answering.free == 1
    one = "".join(speaker.answer(QUESTION, SampleConfig(max_new_tokens=12), 0))
    assert one == "".join(ChatModel(model, SAMPLED).answer(QUESTION, SAMPLED, 0))


def test_after_ctrl_c_within_a_step_the_model_answers_as_before(model):
    speaker = ChatModel(model, SAMPLED)
    step, one = speaker.answering._step, "".join(speaker.answer(QUESTION, SAMPLED, 0))

    def step_then_signal(*arguments):
        rows = speaker.answering.rows
        step(*arguments)
        speaker.answering.rows = rows  # its arrays are donated: they are gone
        raise KeyboardInterrupt

    speaker.answering._step = step_then_signal
    with pytest.raises(KeyboardInterrupt):
        list(speaker.answer(QUESTION, SAMPLED, 0))
    speaker.answering._step = step
    assert one == "".join(speaker.answer(QUESTION, SAMPLED, 0))


def test_the_greedy_answer_equals_that_of_generate(model, tmp_path, monkeypatch, capsys):
    # A slightly trained model answers only blanks; a random model with large layer weights gives varied answers.
    rng = np.random.default_rng(0)
    loud = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in model.params.items()}
    params = {path: jnp.asarray(loud[path]) if path.endswith("kernel") else leaf for path, leaf in model.params.items()}
    folder, model = tmp_path / "model", dataclasses.replace(model, params=params)
    rlhf_jax.save_pretrained(model, folder)
    ids = encode_prompt(model.tokenizer, QUESTION)
    rollout = rlhf_jax.generate(model, [ids], np.ones((1, len(ids))), GREEDY, jax.random.key(0))
    ours = np.asarray(rollout.tokens[0])[np.asarray(rollout.mask[0])]
    whole = model.tokenizer.decode(ours, skip_special_tokens=True)
    assert len(set(ours)) > 1 and whole.strip()
    chosen, step = [], Answering.step

    def record_and_step(self):
        found = step(self)
        chosen.extend(token.id for token in found)
        return found

    monkeypatch.setattr(Answering, "step", record_and_step)
    pieces = list(ChatModel(model, GREEDY).answer(QUESTION, GREEDY, 7))
    assert chosen == ours.tolist()
    assert "".join(pieces) == whole.rstrip("\N{REPLACEMENT CHARACTER}").lstrip()
    assert talk(monkeypatch, folder, QUESTION[0][1] + "\n") == 0
    assert capsys.readouterr().out.split("\n", 1)[1] == "".join(pieces) + "\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "nf4"])
def test_the_speaker_uses_the_loaded_kernels_without_a_copy(folder, monkeypatch, capsys, dtype):
    speakers, Original = [], rlhf_jax.chat.ChatModel

    class Watched(Original):
        def __init__(self, model, sample):
            super().__init__(model, sample)
            speakers.append((model, self))

    monkeypatch.setattr(rlhf_jax.chat, "ChatModel", Watched)
    assert talk(monkeypatch, folder, QUESTION[0][1] + "\n", "--dtype", dtype) == 0
    ((model, speaker),) = speakers
    here = {x.unsafe_buffer_pointer() for path, leaf in model.params.items() for x in jax.tree.leaves(leaf)}
    kernels = {path: leaf for path, leaf in speaker.answering.weights.items() if "kernel" in path}
    assert len(kernels) >= 7 and all(x.unsafe_buffer_pointer() in here for x in jax.tree.leaves(kernels))
    said = capsys.readouterr().out.split("\n", 1)[1]
    same = rlhf_jax.from_pretrained(folder, dtype=dtype)
    assert said == "".join(ChatModel(same, GREEDY).answer(QUESTION, GREEDY, 0)) + "\n"


def test_the_same_seed_samples_the_same_answer_and_another_seed_another(model):
    speaker = ChatModel(model, SAMPLED)
    one, again, other = ("".join(speaker.answer(QUESTION, SAMPLED, seed)) for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("text", ["Sure! 3 + 4 = 7.", "  naïve 😀 Straße\n\n東京 ", "e\N{COMBINING ACUTE ACCENT}"])
def test_pieces_are_whole_characters_that_join_to_the_text(model, monkeypatch, text):
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    patch_tokens(monkeypatch, [*ids, model.tokenizer.eos_token_id])
    pieces = list(ChatModel(model, SampleConfig(64)).answer(QUESTION, SampleConfig(64), 0))
    assert "".join(pieces) == text.lstrip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1  # it streams


def test_an_incomplete_character_at_the_end_is_never_shown(model, monkeypatch):
    ids = model.tokenizer("ab😀", add_special_tokens=False).input_ids
    patch_tokens(monkeypatch, [*ids[:-1], model.tokenizer.eos_token_id])
    assert "".join(ChatModel(model, SampleConfig(64)).answer(QUESTION, SampleConfig(64), 0)) == "ab"


def test_a_dialogue_that_is_too_long_loses_its_oldest_exchanges_which_is_said_once(folder, model, monkeypatch, capsys):
    text, count = "three and four", 1  # 160 positions minus 12 for the answer
    exchange = (("user", text), ("assistant", text))
    while len(encode_prompt(model.tokenizer, exchange * (count - 1) + exchange[:1])) <= 148:
        count += 1
    asked = patch_answers(monkeypatch, *[text] * (count + 1))
    assert talk(monkeypatch, folder, f"{text}\n" * (count + 1)) == 0
    assert [len(turns) for turns in asked] == [*range(1, 2 * count - 1, 2), 2 * count - 3, 2 * count - 3]
    assert all(len(encode_prompt(model.tokenizer, turns)) <= 148 for turns in asked)
    assert capsys.readouterr().out.count("the oldest turns no longer fit") == 1


def test_a_message_that_is_too_long_is_rejected_and_the_conversation_continues(folder, monkeypatch, capsys):
    asked = patch_answers(monkeypatch, "A.", "B.")
    assert talk(monkeypatch, folder, "one\n" + "7 " * 160 + "\ntwo\n") == 0
    assert asked == [(("user", "one"),), (("user", "one"), ("assistant", "A."), ("user", "two"))]
    reported = capsys.readouterr().out
    assert "the model has room for 148: shorten it, or lower --max-new-tokens)" in reported
    assert reported.endswith("B.\n")


def test_answers_take_at_most_half_of_the_positions_and_chat_says_so(folder, monkeypatch, capsys):
    asked = patch_answers(monkeypatch, "A.")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    assert main(["chat", str(folder)]) == 0  # 256 tokens by default, for a model with 160 positions
    assert asked == [(("user", "one"),)]
    assert "(the model has 160 positions: answers are cut at 80 tokens" in capsys.readouterr().out


def test_bytes_that_are_not_utf_8_become_question_marks(folder, monkeypatch):
    asked = patch_answers(monkeypatch, "A.")
    assert talk(monkeypatch, folder, "caf\udce9\n") == 0
    assert asked == [(("user", "caf?"),)]


def test_an_answer_that_fills_all_positions_ends(folder, model, monkeypatch, capsys):
    said = "7 " * 60
    size = len(encode_prompt(model.tokenizer, (("user", said.strip()),)))
    assert 100 < size < 160
    assert talk(monkeypatch, folder, said + "\n", "--max-new-tokens", str(160 - size)) == 0
    assert "(" not in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        (["--temperature", "-1"], "temperature=-1.0: at least 0, and 0 is greedy"),
        (["--top-p", "0"], "top_p=0.0: above 0 and at most 1"),
        (["--max-new-tokens", "0"], "max_new_tokens=0: at least 1"),
    ],
)
def test_options_that_define_no_distribution_are_rejected(folder, capsys, options, reported):
    assert main(["chat", str(folder), *options]) == 2
    assert reported in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_or_eos_is_rejected(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["chat", str(bare)]) == 2
    assert "no tokenizer" in capsys.readouterr().err
    endless = tmp_path / "endless"
    shutil.copytree(folder, endless, ignore=shutil.ignore_patterns("generation_config.json"))
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((endless / name).read_text())
        for key in ("eos_token_id", "eos_token"):
            content.pop(key, None)
        (endless / name).write_text(json.dumps(content))
    assert main(["chat", str(endless)]) == 2
    assert "no EOS" in capsys.readouterr().err


def test_the_chat_command_calls_the_public_function(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    chat(str(folder), GREEDY, 0)
    assert capsys.readouterr().out == f"{folder}: /help lists the commands\n"


def test_in_a_terminal_lines_are_edited_remembered_and_ctrl_c_stops_only_the_answer(folder, tmp_path):
    command = [sys.executable, "-m", "rlhf_jax", "chat", str(folder), "--max-new-tokens", "80"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TERM": "xterm"}
    main_end, terminal = pty.openpty()
    streams = dict(stdin=terminal, stdout=terminal, stderr=terminal)
    process = subprocess.Popen(command, env=environment, close_fds=True, start_new_session=True, **streams)
    os.close(terminal)
    shown = b""

    def wait_for(text: bytes, count: int = 1) -> None:
        nonlocal shown
        while shown.count(text) < count:
            assert select.select([main_end], [], [], 120)[0], f"no {text!r} after {shown!r}"
            shown += os.read(main_end, 4096)

    wait_for(b"> ")
    os.write(main_end, b"wurst\x7f\x7f\x7f\x7f\x7fhello\n")  # five backspaces
    wait_for(b"> ", 2)
    os.write(main_end, b"\x1b[A\n")  # the line before
    wait_for(b"> ", 3)
    process.send_signal(signal.SIGINT)
    wait_for(b"a second Ctrl-C")
    wait_for(b"> ", 4)
    os.write(main_end, b"/quit\n")
    assert process.wait(60) == 0
    os.close(main_end)
    assert (tmp_path / "rlhf_jax/chat_history").read_text().splitlines() == ["hello", "/quit"]


@pytest.mark.parametrize("fault", ["no folder", "unreadable", "not writable"])
def test_a_history_that_cannot_be_used_is_one_warning_and_lines_are_read(fault, tmp_path, monkeypatch, caplog):
    kept = tmp_path / "rlhf_jax/chat_history"
    if fault == "no folder":
        (tmp_path / "rlhf_jax").write_text("")
    elif fault == "unreadable":
        kept.mkdir(parents=True)
    lines = iter(["hello"])

    def ask(prompt):
        if line := next(lines, ""):
            return line
        if fault == "not writable":
            kept.mkdir()
        raise EOFError

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", ask)
    assert list(read_questions()) == ["hello"]
    (message,) = caplog.messages
    assert message.startswith(f"chat: lines are not remembered, as {kept} cannot be used: ")
