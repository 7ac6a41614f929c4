"""Scores of the rows of a file, and models of any folders side by side on any prompts."""

import json
import shutil

import numpy as np
import pytest
import tiny_recipe
import torch
from tiny_recipe import records
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rlhf_jax
import rlhf_jax.compare
from rlhf_jax.cli import main
from rlhf_jax.data.places import kind_of, parse_place, read_place
from rlhf_jax.data.records import Example
from rlhf_jax.reward_functions import Answered, call_function, load_function
from rlhf_jax.scoring import score_answers, win_rate

QUESTIONS = ["What is 3 + 4?", "What is 10 + 2?", "Please sort 3, 1 and 2.", "Hello!"]


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def run(tmp_path_factory):
    return tiny_recipe.finished_run(tmp_path_factory)


@pytest.fixture
def scorer(run):
    return rlhf_jax.reward_from_pretrained(run / "reward/export")


def reference_scores(folder, sequences) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return [float(model(torch.tensor([ids])).logits[0, 0]) for ids in sequences]


def test_scores_of_texts_and_dialogues_equal_those_of_transformers(run, scorer):
    folder, tokenizer = run / "reward/export", AutoTokenizer.from_pretrained(run / "reward/export")
    texts = ["7", "The sum is 7, as 3 + 4 = 7.", messages("What is 3 + 4?", "Sure! 7."), "A long text. " * 6]
    ids = [
        tokenizer(text).input_ids if isinstance(text, str) else tokenizer.apply_chat_template(text, return_dict=False)
        for text in texts
    ]
    for batch_size in (1, 3):
        scores = rlhf_jax.score_texts(scorer, texts, batch_size=batch_size)
        np.testing.assert_allclose(scores, reference_scores(folder, ids), rtol=0, atol=2e-5)


def test_score_writes_both_scores_of_each_pair_and_reports_the_accuracy(run, scorer, write_jsonl, capsys, tmp_path):
    pairs = [(question, "Sure! It is 7.", "no") for question in QUESTIONS]
    file = write_jsonl([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs])
    assert main(["score", str(run / "reward/export"), str(file)]) == 0
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    for place, name in ((1, "chosen"), (2, "rejected")):
        expected = rlhf_jax.score_texts(scorer, [messages(pair[0], pair[place]) for pair in pairs])
        np.testing.assert_allclose([line[name] for line in lines], expected, atol=1e-6)
    wins = np.mean([line["chosen"] > line["rejected"] for line in lines])
    assert f"the chosen answer scores higher in {wins:.1%} of 4 pairs (95% interval " in said.err
    assert [line["row"] for line in lines] == [1, 2, 3, 4]
    assert main(["score", str(run / "reward/export"), str(file), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert records(tmp_path / "out.jsonl") == lines and capsys.readouterr().out == ""


def test_a_row_longer_than_the_positions_is_scored_without_its_beginning_which_is_reported(
    run, scorer, write_jsonl, capsys
):
    text = "abc def." + " abc def." * 59
    file = write_jsonl([{"text": "short"}, {"text": text}])
    assert main(["score", str(run / "reward/export"), str(file)]) == 0
    said = capsys.readouterr()
    short, long = map(json.loads, said.out.splitlines())
    ids = scorer.tokenizer(text).input_ids
    assert short.keys() == {"row", "score"} and long["tokens_left_out"] == len(ids) - 160
    assert "1 of 2 rows exceed the 160 positions of the reward model" in said.err
    assert long["score"] == pytest.approx(reference_scores(run / "reward/export", [ids[-160:]])[0], abs=2e-5)


def test_a_language_model_does_not_score(run, write_jsonl, capsys):
    file = write_jsonl([{"text": "a"}])
    assert main(["score", str(run / "sft/export"), str(file)]) == 2
    assert "sft/export is a language model (LlamaForCausalLM) and has no head that scores" in capsys.readouterr().err
    options = ["--prompts", str(file), "--reward", str(run / "sft/export")]
    assert main(["evaluate", str(run / "sft/export"), *options]) == 2
    assert "has no head that scores: give the folder of a reward model" in capsys.readouterr().err


def test_models_are_compared_by_a_reward_model_that_reads_the_answers_as_text(
    run, scorer, write_jsonl, capsys, tmp_path
):
    file, output = write_jsonl([{"prompt": text} for text in QUESTIONS]), tmp_path / "compared"
    options = ["--prompts", str(file), "--reward", str(run / "reward/export"), "--output", str(output)]
    options += ["sample.max_new_tokens=12", "show=1", "batch_size=4"]
    assert main(["evaluate", str(run / "sft/export"), str(run / "ppo/export"), *options]) == 0
    said, rows = capsys.readouterr().out, records(output / "evaluate.jsonl")
    numbers = json.loads((output / "evaluate.json").read_text())
    assert [row["prompt"] for row in rows] == [[["user", text]] for text in QUESTIONS]
    for name in "AB":
        # No answer of this model has its end within 12 tokens, so none is scored with one.
        assert numbers[f"{name}_ended"] == 0.0 and numbers[f"{name}_length"] == 12.0
        answers = [Answered((("user", row["prompt"][0][1]),), row[f"{name}_answer"], False) for row in rows]
        np.testing.assert_allclose([row[f"{name}_score"] for row in rows], score_answers(scorer, answers, 2), atol=1e-5)
    rate, *interval = win_rate([row["B_score"] for row in rows], [row["A_score"] for row in rows])
    assert (numbers["B_win_rate"], numbers["B_win_rate_interval"]) == (rate, interval)
    assert f"B's answer scores above A's                {rate:.1%} (95% interval " in said
    assert QUESTIONS[0] in said and QUESTIONS[1] not in said and f"A is {run / 'sft/export'}" in said


def test_the_end_of_an_answer_is_scored_only_where_it_has_one(scorer):
    turns = (("user", "What is 3 + 4?"),)
    ended, cut = score_answers(scorer, [Answered(turns, "7"), Answered(turns, "7", ended=False)], 2)
    whole = scorer.tokenizer.apply_chat_template(messages("What is 3 + 4?", "7"), tokenize=False)
    assert whole.endswith("7</s>")
    expected = rlhf_jax.score_texts(scorer, [whole, whole.removesuffix("</s>")])
    np.testing.assert_allclose([ended, cut], expected, atol=1e-6)


def test_every_model_gets_prompts_in_its_own_template(run, write_jsonl, tmp_path, monkeypatch):
    other, asked, sample = shutil.copytree(run / "sft/export", tmp_path / "other"), [], rlhf_jax.compare.sample_texts
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "Q: {{ messages[0]['content'] }}\nA:"
    tokenizer.save_pretrained(other)

    def record(model, tokens, mask, config):
        asked.append([model.tokenizer.decode(row[real]) for row, real in zip(tokens, mask, strict=True)])
        return sample(model, tokens, mask, config)

    monkeypatch.setattr(rlhf_jax.compare, "sample_texts", record)
    config = rlhf_jax.evaluate.EvaluateConfig(prompts=2, sample=rlhf_jax.SampleConfig(max_new_tokens=2))
    file = write_jsonl([{"question": text} for text in QUESTIONS])
    compared = rlhf_jax.compare_models([run / "sft/export", other], str(file), config=config)
    assert asked[0] == [f"\n\nHuman: {text}\n\nAssistant:" for text in QUESTIONS[:2]]
    assert asked[1] == [f"Q: {text}\nA:" for text in QUESTIONS[:2]]
    assert "A_score" not in compared.records[0] and "B_win_rate" not in compared.numbers


def test_the_best_of_several_answers_is_kept_and_written_as_demonstrations(run, write_jsonl, tmp_path):
    seen, judge = tmp_path / "seen.jsonl", tmp_path / "judge.py"
    judge.write_text(
        "import json, pathlib\ndef score(prompts, completions):\n"
        f"    pathlib.Path({str(seen)!r}).write_text(json.dumps(completions))\n"
        "    return [float(sum(map(ord, text)) % 97) for text in completions]\n"
    )
    file, output = write_jsonl([{"prompt": text} for text in QUESTIONS]), tmp_path / "best"
    sample = rlhf_jax.SampleConfig(max_new_tokens=6)
    config = rlhf_jax.evaluate.EvaluateConfig(best_of=3, sample=sample)
    compared = rlhf_jax.compare_models([str(run / "sft/export")], str(file), f"{judge}:score", config, output=output)
    texts = np.array(json.loads(seen.read_text())).reshape(4, 3)
    scores = [[sum(map(ord, text)) % 97 for text in row] for row in texts]
    assert len(set(texts.ravel())) > 8
    assert [row["A_score"] for row in compared.records] == [max(row) for row in scores]
    assert [row["A_answer"] for row in compared.records] == [
        row[np.argmax(each)] for row, each in zip(texts, scores, strict=True)
    ]
    assert compared.numbers["best_of"] == 3 and (output / "A_best.jsonl").read_text() == ""  # no answer ended
    with pytest.raises(ValueError, match="best_of=3: give --reward"):
        rlhf_jax.compare_models([run / "sft/export"], str(file), config=config)


def test_best_answers_are_read_as_demonstrations_of_sft_without_those_that_were_cut(tmp_path):
    asked = [
        Example((("system", "Hm."), ("user", "a")), "", "", "", "x", 1),
        Example((("user", "c"),), *[""] * 3, "x", 2),
    ]
    answers = [rlhf_jax.compare.SampledAnswer("Yes.", True, 2), rlhf_jax.compare.SampledAnswer("No", False, 6)]
    rlhf_jax.compare.write_best(tmp_path / "best.jsonl", asked, answers, [0.5, 0.75])
    source = parse_place(str(tmp_path / "best.jsonl"), "FILE")
    ((fields, example),) = read_place(source, "demonstration")
    assert source.format == "messages" and fields["score"] == 0.5
    assert [turn[:2] for turn in example.turns] == [("system", "Hm."), ("user", "a")] and example.answer == "Yes."


def test_a_win_rate_counts_ties_half_and_has_wilsons_interval():
    rate, low, high = win_rate([1] * 8 + [0] * 2, [0] * 8 + [1] * 2)
    assert (rate, round(low, 4), round(high, 4)) == (0.8, 0.4902, 0.9433)
    assert win_rate([1, 2, 3], [1, 1, 4])[0] == 0.5
    assert win_rate([1.0], [0.0])[2] == 1.0 and win_rate([0.0], [1.0])[1] == 0.0


ANSWERS = [
    Answered((("user", "q1"),), "a", True, {"truth": "a"}),
    Answered((("user", "q2"),), "bb", True, {"truth": 1}),
]


def test_a_reward_function_is_called_as_in_trl(tmp_path):
    (tmp_path / "judge.py").write_text(
        "def by_truth(completions, truth, **columns):\n"
        "    assert columns == {'prompts': ['q1', 'q2']}\n"
        "    return [float(text == right) for text, right in zip(completions, truth)]\n"
        "def by_place(prompts, answers):\n    return [len(p) + len(a) for p, a in zip(prompts, answers)]\n"
        "def by_message(prompts, completions):\n"
        "    return [len(p) * len(c[-1]['content']) for p, c in zip(prompts, completions)]\n"
        "def short(prompts, answers):\n    return [1.0]\n"
        "def fails(prompts, answers):\n    raise KeyError('x')\n"
    )

    def scores(name, as_messages=False):
        return call_function(load_function(f"{tmp_path / 'judge.py'}:{name}"), ANSWERS, as_messages=as_messages)

    assert scores("by_truth").tolist() == [1.0, 0.0]
    assert scores("by_place").tolist() == [3.0, 4.0]
    assert scores("by_message", as_messages=True).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="short must return one finite number for each of 2 answers"):
        scores("short")
    with pytest.raises(ValueError, match="the reward function fails: KeyError: 'x'"):
        scores("fails")
    with pytest.raises(ValueError, match="AttributeError"):
        scores("absent")
    assert load_function("math:fsum")([1, 2]) == 3


@pytest.mark.parametrize(
    ("row", "kind", "turns"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pair", (("user", "q"),)),
        ({"question": "q", "answer": "a"}, "demonstration", (("user", "q"),)),
        ({"prompt": "q", "completion": "a"}, "demonstration", (("user", "q"),)),
        ({"messages": messages("q", "a")}, "demonstration", (("user", "q"),)),
        ({"instruction": "q", "output": "a"}, "demonstration", (("user", "q"),)),
        ({"text": "a"}, "demonstration", ()),
    ],
)
def test_the_fields_of_a_file_say_what_its_rows_are(row, kind, turns, write_jsonl):
    source = parse_place(str(write_jsonl([row])), "FILE")
    ((fields, example),) = read_place(source, kind_of(source))
    assert kind_of(source) == kind and fields == row
    assert tuple(turn[:2] for turn in example.turns) == turns
    texts = [example.text, example.answer, example.chosen]
    assert "a" in texts


def test_an_inline_table_names_the_fields(write_jsonl):
    file = write_jsonl([{"in": "q", "out": "a"}])
    source = parse_place(f'{{ path = "{file}", prompt = "in", answer = "out" }}', "FILE")
    ((_, example),) = read_place(source, "demonstration")
    assert (example.turns[0][1], example.answer) == ("q", "a")
    with pytest.raises(ValueError, match="unknown key"):
        parse_place(f'{{ path = "{file}", prompts = "in" }}', "FILE")


def test_options_of_a_comparison_need_prompts_and_its_settings_are_those_of_evaluate(run, write_jsonl, capsys):
    for wrong in ([str(run.parent / "tiny.toml"), "--reward", "x"], [str(run / "sft/export")]):
        assert main(["evaluate", *wrong]) == 2
        assert "folders, --reward and --output need --prompts FILE" in capsys.readouterr().err
    file = write_jsonl([{"prompt": "q"}])
    assert main(["evaluate", str(run / "sft/export"), "--prompts", str(file), "sample.temperatur=0"]) == 2
    assert "did you mean 'sample.temperature'?" in capsys.readouterr().err
