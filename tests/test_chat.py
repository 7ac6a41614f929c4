"""The chat in the terminal: its commands, its history, and the text shown while an answer is generated."""

import dataclasses
import io
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_recipe

import rlhf_jax
import rlhf_jax.chat
from rlhf_jax.chat import ChatModel, chat
from rlhf_jax.cli import main
from rlhf_jax.data.chat_template import encode_prompt
from rlhf_jax.sampling import SampleConfig

GREEDY = SampleConfig(max_new_tokens=12, temperature=0.0)
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
    """Make the speaker give these answers in pieces of three letters; returns the list of dialogues it receives."""
    asked, left = [], iter(answers)

    def answer(self, turns, key):
        asked.append(turns)
        text = next(left)
        yield from (text[i : i + 3] for i in range(0, len(text), 3))

    patch.setattr(ChatModel, "answer", answer)
    return asked


def patch_tokens(patch, ids: list[int]) -> None:
    """Make the model choose these tokens in order."""
    left = iter(ids)
    patch.setattr(rlhf_jax.chat, "sample_next", lambda *args: (jnp.array([next(left)], jnp.int32), None))


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


def test_an_unknown_command_lists_the_commands_and_is_not_sent_to_the_model(folder, monkeypatch, capsys):
    asked = patch_answers(monkeypatch)
    assert talk(monkeypatch, folder, "/help\n") == 0  # the end of the input exits
    assert asked == []
    assert "unknown command /help: /clear forgets the dialogue, /quit leaves" in capsys.readouterr().out


def test_ctrl_c_stops_the_answer_and_not_the_conversation(folder, monkeypatch, capsys):
    asked = []

    def answer(self, turns, key):
        asked.append(turns)
        yield "I was"
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ChatModel, "answer", answer)
    assert talk(monkeypatch, folder, "one\ntwo\n") == 0
    assert asked[1] == (("user", "one"), ("assistant", "I was"), ("user", "two"))
    assert "I was (stopped)\nI was\n" in capsys.readouterr().out


def test_ctrl_c_at_the_prompt_exits_without_a_message_about_checkpoints(folder, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(rlhf_jax.chat, "read_questions", interrupt)
    assert main(["chat", str(folder)]) == 130
    assert capsys.readouterr().err == "rlhf-jax: interrupted\n"


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
    chosen = []
    choose = rlhf_jax.chat.sample_next

    def record_and_sample(*args):
        result = choose(*args)
        chosen.append(int(result[0][0]))
        return result

    monkeypatch.setattr(rlhf_jax.chat, "sample_next", record_and_sample)
    pieces = list(ChatModel(model, GREEDY).answer(QUESTION, jax.random.key(7)))
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
    kernels = {path: leaf for path, leaf in speaker.weights.items() if "kernel" in path}
    assert len(kernels) >= 7 and all(x.unsafe_buffer_pointer() in here for x in jax.tree.leaves(kernels))
    said = capsys.readouterr().out.split("\n", 1)[1]
    same = rlhf_jax.from_pretrained(folder, dtype=dtype)
    assert said == "".join(ChatModel(same, GREEDY).answer(QUESTION, jax.random.key(0))) + "\n"


def test_the_same_seed_samples_the_same_answer_and_another_seed_another(model):
    speaker = ChatModel(model, SampleConfig(max_new_tokens=12))
    one, again, other = ("".join(speaker.answer(QUESTION, jax.random.key(seed))) for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("text", ["Sure! 3 + 4 = 7.", "  naïve 😀 Straße\n\n東京 ", "e\N{COMBINING ACUTE ACCENT}"])
def test_pieces_are_whole_characters_that_join_to_the_text(model, monkeypatch, text):
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    patch_tokens(monkeypatch, [*ids, model.tokenizer.eos_token_id])
    speaker = ChatModel(model, SampleConfig(max_new_tokens=64))
    pieces = list(speaker.answer(QUESTION, jax.random.key(0)))
    assert "".join(pieces) == text.lstrip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1  # it streams


def test_an_incomplete_character_at_the_end_is_never_shown(model, monkeypatch):
    ids = model.tokenizer("ab😀", add_special_tokens=False).input_ids
    patch_tokens(monkeypatch, [*ids[:-1], model.tokenizer.eos_token_id])
    assert "".join(ChatModel(model, SampleConfig(max_new_tokens=64)).answer(QUESTION, jax.random.key(0))) == "ab"


def test_a_dialogue_that_is_too_long_loses_its_oldest_exchange_with_a_message(folder, model, monkeypatch, capsys):
    text, count = "three and four", 1  # 160 positions minus 12 for the answer
    exchange = (("user", text), ("assistant", text))
    while len(encode_prompt(model.tokenizer, exchange * (count - 1) + exchange[:1])) <= 148:
        count += 1
    asked = patch_answers(monkeypatch, *[text] * count)
    assert talk(monkeypatch, folder, f"{text}\n" * count) == 0
    assert [len(turns) for turns in asked] == [*range(1, 2 * count - 1, 2), 2 * count - 3]
    assert all(len(encode_prompt(model.tokenizer, turns)) <= 148 for turns in asked)
    assert "(the oldest 1 exchange(s) no longer fit the model's positions and are forgotten)" in capsys.readouterr().err


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
    assert capsys.readouterr().out == f"{folder}: /clear forgets the dialogue, /quit leaves\n"
