"""`rlhf-jax data`: its numbers add up, colours mark the tokens with loss, and the output is short enough to read."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from tiny_tokenizer import chatml_like, gpt2_like, llama_like, opt_like

from rlhf_jax.cli import main
from rlhf_jax.data import stream
from rlhf_jax.data.config import BUILTIN, DataConfig, SourceConfig
from rlhf_jax.recipe import Recipe
from rlhf_jax.show_data import DIM, GREEN, PLAIN, short_names, show_data
from rlhf_jax.stages.dpo import DPOConfig
from rlhf_jax.stages.models import ModelConfig
from rlhf_jax.stages.ppo_config import PPOConfig
from rlhf_jax.stages.reward import RewardConfig
from rlhf_jax.stages.sft import SFTConfig

REAL = Path(__file__).parents[2] / "shared" / "data"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def recipe_of(
    folder: Path, *sources: SourceConfig, tokenizer=gpt2_like, sft: SFTConfig | None = None, **data
) -> Recipe:
    """A recipe with batches of four rows and a tokenizer in `folder`."""
    tokenizer().save_pretrained(folder / "model")
    options = {"split": "1,1,1", "held_out": 0.2, "max_prompt_length": 60, "max_length": 90}
    return Recipe(
        data=DataConfig(sources, **{**options, **data}),
        model=ModelConfig(actor=str(folder / "model")),
        sft=sft or SFTConfig(batch_size=4),
        reward=RewardConfig(batch_size=4),
        ppo=PPOConfig(rollout_batch_size=4, batch_size=4),
    )


def printed_text(recipe: Recipe, examples: int = 0, out: io.StringIO | None = None) -> str:
    out = out or io.StringIO()
    show_data(recipe, examples, out)
    return out.getvalue()


def pairs(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(start, start + count)]


def tables(text: str) -> dict[tuple[str, str, str], list[str]]:
    """{(stage, "training" or "held out", source): the columns}."""
    found, stage, side = {}, "", ""
    for line in text.splitlines():
        if opening := re.match(r"(sft|reward|ppo): a row", line):
            stage = opening[1]
        elif line in ("  training", "  held out"):
            side = line.strip()
        elif columns := re.match(r"  (\d+ \S.*?|all) +(\d.*)", line):
            if len(columns[2].split()) == 8:
                found[stage, side, columns[1]] = columns[2].replace(",", "").split()
    return found


# Numbers.


def test_every_row_is_counted_once_over_the_stages_and_the_held_out_rows(tmp_path, write_jsonl):
    rows = pairs(300)
    for i in range(20):
        rows[i]["prompt"] += "x" * 100  # too long in every stage
    rows[50]["chosen"] = rows[51]["chosen"] = "good " * 80
    recipe = recipe_of(tmp_path, SourceConfig(str(write_jsonl(rows))))
    found = tables(printed_text(recipe))
    assert len(found) == 6
    shares = {key[:2]: int(columns[0]) for key, columns in found.items()}
    held = {shares[stage, "held out"] for stage in ("sft", "reward", "ppo")}
    assert len(held) == 1
    assert sum(shares[stage, "training"] for stage in ("sft", "reward", "ppo")) + held.pop() == 300
    dropped = [int(columns[1]) for (_, side, _), columns in found.items() if side == "training"]
    held_out = {int(columns[1]) for (_, side, _), columns in found.items() if side == "held out"}
    assert sum(dropped) + held_out.pop() == 20 and not held_out
    for share, lost, used, *_ in found.values():
        assert int(share) == int(lost) + int(used)


def test_lengths_and_truncations_equal_those_counted_by_hand(tmp_path, write_jsonl):
    # One byte per token: "\n\nHuman: " + prompt + "\n\nAssistant:" + " " + answer + EOS, except for merges.
    rows = [{"prompt": "%" * n, "chosen": "#" * 3, "rejected": "!"} for n in (1, 2, 3, 4)]
    rows.append({"prompt": "?", "chosen": "#" * 200, "rejected": "!"})
    recipe = recipe_of(tmp_path, SourceConfig(str(write_jsonl(rows))), split="1,0,0", held_out=0.0)
    text = printed_text(recipe)
    ((_, columns),) = ((key, columns) for key, columns in tables(text).items() if key[0] == "sft")
    tokenizer = gpt2_like()
    whole = [len(tokenizer(f"\n\nHuman: {r['prompt']}\n\nAssistant: {r['chosen']}</s>").input_ids) for r in rows]
    lengths = sorted(min(length, 90) for length in whole)
    assert columns == ["5", "0", "5", "1", str(lengths[2]), "90", "90", str(sum(lengths))]
    assert "1 step of 4 rows, padded to 96 tokens: " in text
    assert "reward: there are no rows to train on (0 rows)" in text and "sft: there are no held-out rows" in text


def test_a_truncated_training_row_is_not_counted_as_held_out(tmp_path, write_jsonl):
    held = write_jsonl(pairs(3, 100), "held.jsonl")
    rows = [row | {"chosen": "good " * 80} for row in pairs(6)]
    source = SourceConfig(str(write_jsonl(rows)), eval_path=str(held))
    found = {
        key[:2]: columns for key, columns in tables(printed_text(recipe_of(tmp_path, source, split="1,0,0"))).items()
    }
    assert found["sft", "training"][:4] == ["6", "0", "6", "6"]
    assert found["sft", "held out"][:4] == ["3", "0", "3", "0"]
    by_hash = SourceConfig(str(write_jsonl([*rows, *pairs(60, 200)])))
    found = {
        key[:2]: columns for key, columns in tables(printed_text(recipe_of(tmp_path, by_hash, split="1,0,0"))).items()
    }
    assert int(found["sft", "training"][3]) + int(found["sft", "held out"][3]) == 6


def test_reasons_for_dropping_rows_are_reported_by_source(tmp_path, write_jsonl):
    one = [{"prompt": "p", "chosen": "", "rejected": "b"}, *pairs(9)]
    two = [
        *pairs(4),
        {"prompt": "x" * 99, "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "", "rejected": "b"},
    ]
    sources = [SourceConfig(str(write_jsonl(rows, name))) for rows, name in ((one, "one.jsonl"), (two, "two.jsonl"))]
    text = printed_text(recipe_of(tmp_path, *sources, split="1,0,0", held_out=0.0))
    assert "    dropped: 2 empty answer (1 of 1, 1 of 2)\n    dropped: 1 prompt over 60 tokens (1 of 2)\n" in text
    found = {key[2].split("/")[-1]: columns for key, columns in tables(text).items() if key[0] == "sft"}
    assert [found[name][:3] for name in ("one.jsonl", "two.jsonl", "all")] == [
        ["10", "1", "9"],
        ["6", "2", "4"],
        ["16", "3", "13"],
    ]
    text = printed_text(recipe_of(tmp_path, *sources, split="0,0,1", held_out=0.0))
    assert "dropped: 5 repeated prompt (5 of 2)" in text  # q0 to q3, and p


def test_keys_of_messages_that_the_template_does_not_write_are_reported_by_source(tmp_path, write_jsonl):
    def rows(count: int, **more) -> list[dict]:
        answer = {"role": "assistant", "content": "a"}
        return [{"messages": [{"role": "user", "content": f"q{i}", **more}, answer]} for i in range(count)]

    files = [write_jsonl(rows(3, name="Ada"), "one.jsonl"), write_jsonl(rows(5, name="Bo", id="{x}"), "two.jsonl")]
    sources = [SourceConfig(str(path), format="messages") for path in files]
    text = printed_text(recipe_of(tmp_path, *sources, split="1,0,0", held_out=0.0, max_bad_rows=0))
    label = "    not written by the chat template (data.template gives another), used without it:"
    assert f"{label} 8 name (3 of 1, 5 of 2)\n" in text and f"{label} 5 id (5 of 2)\n" in text
    assert "    dropped: " not in text


def test_prompts_held_out_by_another_source_are_reported(tmp_path, write_jsonl):
    held = write_jsonl(pairs(4), "held.jsonl")
    source = SourceConfig(str(write_jsonl(pairs(30))), eval_path=str(held))
    text = printed_text(recipe_of(tmp_path, source, split="1,0,0"))
    assert "    dropped: 4 prompt held out by eval_path or eval_split\n" in text
    assert f"  1 {source.path}, 30 rows, format fields; held out: {held}, 4 rows\n" in text


def test_bad_rows_are_reported_once_with_the_stages_that_reject_them(tmp_path, write_jsonl):
    rows = pairs(40)
    rows[3], rows[5] = {"prompt": 3, "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": None}
    path = write_jsonl(rows)
    text = printed_text(recipe_of(tmp_path, SourceConfig(str(path)), max_bad_rows=2))
    assert "    bad rows left out: 1 for sft, 2 for reward, 1 for ppo\n" in text
    assert text.count(f"{path}, line 4: field 'prompt' must be text") == 1
    assert text.count(f"{path}, line 6: field 'rejected' must be text") == 1


def test_the_draws_of_an_epoch_are_reported_by_source(tmp_path, write_jsonl):
    sums = [{"prompt": f"s{i}", "answer": "1"} for i in range(20)]
    sources = (
        SourceConfig(str(write_jsonl(sums, "sums.jsonl")), answer="answer", chosen="", rejected=""),
        SourceConfig(str(write_jsonl(pairs(30))), epochs=2),
    )
    text = printed_text(recipe_of(tmp_path, *sources, split="1,0,0", held_out=0.0))
    assert "  drawn in an epoch: 80 rows, 20 of 1, 60 of 2\n  an epoch: 20 steps of 4 rows" in text
    assert "sums.jsonl, 20 rows, format fields, not for reward; held out: nothing\n" in text
    text = printed_text(recipe_of(tmp_path, *sources, split="0,1,0", held_out=0.0))
    assert "  drawn in an epoch: 60 rows, 60 of 2\n" in text


def test_packed_rows_are_reported_next_to_the_table_of_their_documents(tmp_path, write_jsonl):
    sft = SFTConfig(batch_size=4, pack_length=200)
    text = printed_text(
        recipe_of(tmp_path, SourceConfig(str(write_jsonl(pairs(60)))), split="1,0,0", held_out=0.0, sft=sft)
    )
    (columns,) = (columns for key, columns in tables(text).items() if key[0] == "sft")
    packed = int(re.search(r"  packed: (\d+) rows of 200 tokens\n", text)[1])
    assert columns[0] == "60" and int(columns[-1]) / 200 <= packed < 20
    assert re.search(rf"  an epoch: {packed // 4} steps? of 4 rows, padded to 200 tokens: \d+\.\d% padding\n", text)


def test_packed_pairs_are_reported_with_both_sub_rows(tmp_path, write_jsonl):
    recipe = recipe_of(tmp_path, SourceConfig(str(write_jsonl(pairs(60)))), split="0,1,0", held_out=0.0)
    run = dataclasses.replace(recipe.run, stages=("dpo",))
    data = dataclasses.replace(recipe.data, split={"dpo": 1.0})
    text = printed_text(dataclasses.replace(recipe, run=run, data=data, dpo=DPOConfig(batch_size=4, pack_length=200)))
    packed = int(re.search(r"  packed: (\d+) rows of 2 x 200 tokens\n", text)[1])
    assert packed < 20
    assert re.search(rf"  an epoch: {packed // 4} steps? of 4 rows, padded to 200 tokens: \d+\.\d% padding\n", text)


def test_fewer_rows_than_one_batch_are_reported(tmp_path, write_jsonl):
    text = printed_text(recipe_of(tmp_path, SourceConfig(str(write_jsonl(pairs(3)))), split="1,0,0", held_out=0.0))
    assert "  a batch has 4 rows, more than there are: add rows, or make it smaller\n" in text


# Colours.


HISTORY = [
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello!\n\nWell?"},
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "Sure!\nIt is 7 — \u00e9\u4e2d."},
]


def split_colours(text: str) -> tuple[str, str]:
    """(green text, dim text) of each line; only the border may have no colour."""
    border = re.sub(r"(\x1b\[1;32m|\x1b\[2m)[^\x1b\n]+\x1b\[0m", "", text)
    assert not border.strip("| \n")
    green, dim = (re.findall(re.escape(code) + r"([^\x1b\n]+)" + re.escape(PLAIN), text) for code in (GREEN, DIM))
    return "".join(green), "".join(dim)


def body(text: str, stage: str) -> str:
    """The bordered lines of a stage."""
    part = re.search(rf"^{stage}: a row.*?(?=^\w+: a row|\Z)", text, re.S | re.M)[0]
    return "\n".join(line for line in part.splitlines() if line.startswith("    |"))


@pytest.mark.parametrize("kind", [gpt2_like, opt_like, chatml_like, llama_like])
@pytest.mark.parametrize(("learn", "learned"), [("answer", HISTORY[3:]), ("assistant", HISTORY[1::2])])
def test_on_a_terminal_tokens_with_loss_are_green_and_the_rest_is_dim(
    tmp_path, write_jsonl, monkeypatch, kind, learn, learned
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    source = SourceConfig(str(write_jsonl([{"messages": HISTORY}])), format="messages")
    options = {"split": "1,0,0", "held_out": 0.0, "max_prompt_length": 500, "max_length": 600}
    recipe = recipe_of(tmp_path, source, tokenizer=kind, sft=SFTConfig(batch_size=1, learn=learn), **options)
    text = body(printed_text(recipe, 1, Terminal()), "sft")
    green, dim = split_colours(text)
    end = "<|im_end|>" if kind is chatml_like else "</s>"
    # The default template puts a blank before an answer, and the line breaks of an answer end its lines.
    blank = "" if kind is chatml_like else " "
    assert green == "".join(blank + turn["content"].replace("\n", "") + end for turn in learned)
    for turn in HISTORY:
        assert (turn in learned) != (turn["content"].replace("\n", "") in dim)


def test_off_a_terminal_or_without_colours_brackets_mark_the_tokens_with_loss(tmp_path, write_jsonl, monkeypatch):
    recipe = recipe_of(tmp_path, SourceConfig(str(write_jsonl(pairs(1)))), split="1,0,0", held_out=0.0)
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = printed_text(recipe, 1)
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed_text(recipe, 1, Terminal()) == plain
    assert body(plain, "sft") == "    |\n    |\n    | Human: q0\n    |\n    | Assistant:⟦ good 0</s>⟧"
    assert "\x1b" not in plain


def test_a_pair_is_shown_with_its_prompt_once_and_both_answers_by_name(tmp_path, write_jsonl):
    recipe = recipe_of(tmp_path, SourceConfig(str(write_jsonl(pairs(1)))), split="0,1,0", held_out=0.0)
    text = printed_text(recipe, 1)
    assert "rows.jsonl, row 1\n    |\n    |\n    | Human: q0\n    |\n    | Assistant:\n" in text
    assert "    | Assistant:\n    chosen:\n    | ⟦ good 0</s>⟧\n    rejected:\n    | ⟦ bad 0</s>⟧\n" in text
    assert text.count("Human: q0") == 1


def test_a_ppo_prompt_has_no_tokens_with_loss(tmp_path, write_jsonl):
    recipe = recipe_of(tmp_path, SourceConfig(str(write_jsonl(pairs(1)))), split="0,0,1", held_out=0.0)
    assert body(printed_text(recipe, 1), "ppo") == "    |\n    |\n    | Human: q0\n    |\n    | Assistant:"
    assert GREEN not in printed_text(recipe, 1, Terminal())


def test_control_sequences_are_shown_escaped_and_not_sent_to_the_terminal(tmp_path, write_jsonl):
    row = {"prompt": "q", "chosen": "a\x1b[2J\x07\tb\r", "rejected": "b"}
    recipe = recipe_of(tmp_path, SourceConfig(str(write_jsonl([row]))), split="1,0,0", held_out=0.0)
    assert "⟦ a\\x1b[2J\\x07\tb</s>⟧" in printed_text(recipe, 1)


# Layout.


def test_five_sources_are_shown_in_under_105_lines_of_under_120_characters(tmp_path, write_jsonl):
    folder = tmp_path / ("a-folder-with-a-long-name" * 3)
    folder.mkdir()
    sources = []
    for i in range(5):
        path = write_jsonl(pairs(60, 100 * i), f"source-{i}.jsonl")
        sources.append(SourceConfig(str(path.rename(folder / path.name))))
    text = printed_text(recipe_of(tmp_path, *sources), 1)
    lines = text.splitlines()
    assert len(tables(text)) == 6 * 6
    start = lines.index("") + 7  # after the paths, whose length is not limited
    assert max(map(len, lines[start:])) <= 120
    assert len([line for line in lines if not line.startswith("    |")]) < 105
    for number in range(1, 6):
        assert sum(f"  {number} …" in line and f"source-{number - 1}.jsonl" in line for line in lines) == 6 + 3


def test_long_source_names_are_numbered_and_keep_their_ends():
    paths = [BUILTIN, "/data/hh/train.jsonl", "rows.jsonl", "some/thing-with-a-name-that-is-much/too-long-for-it.jsonl"]
    assert short_names(paths) == [
        "1 builtin:assistant",
        "2 hh/train.jsonl",
        "3 rows.jsonl",
        "4 …is-much/too-long-for-it.jsonl",
    ]


def test_the_command_prints_one_row_of_each_source_by_default(tmp_path, write_jsonl, capsys):
    gpt2_like().save_pretrained(tmp_path / "model")
    config = tmp_path / "recipe.toml"
    source = json.dumps(str(write_jsonl(pairs(100))))
    config.write_text(
        f'[model]\nactor = "{tmp_path}/model"\n[data]\nsources = [{{ path = {source} }}]\nheld_out = 0.2\n'
    )
    for options, count in (((), 1), (("--examples", "3"), 3), (("--examples", "0"), 0)):
        assert main(["data", str(config), "sft.batch_size=4", *options]) == 0
        assert len(re.findall(r"\.jsonl, row \d+$", capsys.readouterr().out, re.M)) == 3 * count
    assert main(["data", str(config), "--examples", "-1"]) == 2
    assert capsys.readouterr().err == "rlhf-jax: --examples -1: at least 0\n"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL}")
def test_the_numbers_of_hh_rlhf_and_alpaca_eval_add_up_to_the_rows_of_their_files(tmp_path):
    hh, alpaca = REAL / "hh-rlhf-harmless", REAL / "alpaca-eval-preferences"
    sources = (
        SourceConfig(str(hh / "train.jsonl"), format="transcript", eval_path=str(hh / "test.jsonl")),
        SourceConfig(str(alpaca / "train.jsonl"), eval_path=str(alpaca / "test.jsonl")),
    )
    text = printed_text(recipe_of(tmp_path, *sources, tokenizer=opt_like))
    assert "1,747 rows, format transcript; held out: " in text and "13,823 rows, format fields; held out: " in text
    found = tables(text)
    for number, rows, held in (("1", 1_747, 252), ("2", 13_823, 1_369), ("all", 15_570, 1_621)):
        shares = [(side, int(columns[0])) for (_, side, name), columns in found.items() if name.split()[0] == number]
        assert sum(share for side, share in shares if side == "training") == rows
        assert [share for side, share in shares if side == "held out"] == [held] * 3
    assert all(int(share) == int(dropped) + int(used) for share, dropped, used, *_ in found.values())


def test_a_stream_is_shown_by_its_first_window_next_to_stored_rows(tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 20)
    one, two = write_jsonl(pairs(200), "one.jsonl"), write_jsonl(pairs(200), "two.jsonl")
    recipe = recipe_of(tmp_path, SourceConfig(str(one), stream=True), SourceConfig(str(two)))
    text = printed_text(recipe, 1)
    assert "not for reward, not for ppo; held out: 20.0% of its prompts, left out, as it is streamed" in text
    assert "rows in its first window, which is what all numbers below describe, format fields" in text
    assert text.count("two.jsonl, row") == 3 and text.count("one.jsonl, row") == 1


def test_a_model_without_an_available_tokenizer_is_reported_with_the_fix(tmp_path, write_jsonl):
    recipe = recipe_of(tmp_path, SourceConfig(str(write_jsonl(pairs(30)))))
    nowhere = dataclasses.replace(recipe, model=ModelConfig(actor=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="nowhere: its tokenizer is neither in a local folder.*set model.actor to the"):
        printed_text(nowhere)
