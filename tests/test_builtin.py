"""The built-in data, their judge, and the tokenizer trained on them."""

import ast
import math
import re
from itertools import islice
from pathlib import Path

import pytest

import rlhf_jax
from rlhf_jax.data.builtin import GOOD_SHARE, make_dialogues, make_rows
from rlhf_jax.data.builtin_judge import judge
from rlhf_jax.stages.from_scratch import train_tokenizer

ROWS = list(make_dialogues(seed=0, rows=4000))

FIRST_ROW = {
    "prompt": "Sam likes wine and lives in Bern. What does Sam like?",
    "answer": "Sure! Sam likes wine. I hope this helps!",
    "chosen": "Happy to help! Sam likes wine. Anything else?",
    "rejected": "Happy to help! Sam likes milk. Anything else?",
}


def test_the_first_row_of_seed_0_is_the_same_on_every_machine():
    assert next(make_rows(0, 1)) == FIRST_ROW


def test_equal_seeds_give_equal_rows_and_more_rows_only_append():
    assert list(make_rows(3, 50)) == list(islice(make_rows(3, 80), 50))
    assert list(make_rows(3, 50)) != list(make_rows(4, 50))


def test_zero_rows_are_rejected():
    with pytest.raises(ValueError, match="at least one row, not 0"):
        next(make_rows(0, 0))


def test_the_judge_names_exactly_the_faults_with_which_an_answer_was_generated():
    for row in ROWS:
        for answer in (row.demonstration, row.chosen, row.rejected):
            verdict = judge(row.prompt, answer.text, ended=True)
            assert tuple(sorted(verdict.faults)) == answer.faults, (row.prompt, answer.text)
            assert verdict.good == (answer.faults == ())


def test_the_share_of_good_demonstrations_is_one_half_within_four_standard_errors():
    share = sum(judge(row.prompt, row.demonstration.text, ended=True).good for row in ROWS) / len(ROWS)
    assert abs(share - GOOD_SHARE) < 4 * math.sqrt(GOOD_SHARE * (1 - GOOD_SHARE) / len(ROWS))


def test_one_fault_is_three_times_as_frequent_as_two():
    counts = [len(row.demonstration.faults) for row in ROWS]
    assert max(counts) == 2
    assert counts.count(1) / counts.count(2) == pytest.approx(3, rel=0.2)


def test_the_chosen_answer_has_a_strictly_smaller_penalty_by_the_faults_of_the_judge():
    penalty = {"opening": 2, "close": 2, "rambling": 2, "no answer": 2, "wrong": 3}

    def penalties(prompt: str, text: str) -> int:
        return sum(penalty[fault] for fault in judge(prompt, text, ended=True).faults)

    for row in ROWS:
        assert penalties(row.prompt, row.chosen.text) < penalties(row.prompt, row.rejected.text)


def test_60_percent_of_the_pairs_and_85_of_those_on_sums_differ_only_in_the_correctness_of_the_answer():
    """The shares include independent draws that differ only in correctness and choice of words."""
    for is_sum, share in ((False, 0.6), (True, 0.85)):
        rows = [row for row in ROWS if (len(re.findall(r"\d", row.prompt)) == 2) == is_sum]
        alike = [row.rejected.faults == tuple(sorted((*row.chosen.faults, "wrong"))) for row in rows]
        assert share - 0.02 < sum(alike) / len(rows) < share + 0.1


def test_5_percent_of_the_prompts_are_hundreds_and_answers_are_short():
    assert len({row.prompt for row in make_dialogues(0, 20000)}) * 0.05 > 350
    assert max(len(answer.text) for row in ROWS for answer in (row.chosen, row.rejected)) < 100


SUM = "What is 3 + 4?"
STORY = "Ann has 3 cups and gets 4 more. How many cups is that?"
SORT = "Sort 8, 0, 5."
LARGEST = "Which is the largest: 1, 9 or 4?"
SMALLEST = "Find the smallest of 6, 2, 7."
HOME = "Ann lives in Rome and likes tea. Where does Ann live?"
TASTE = "Ann lives in Rome and likes tea. What does Ann like?"
COLOUR = "The red hat is in the box. What colour is the hat?"
PLACE = "In the box is a red hat. Where is the hat?"


@pytest.mark.parametrize(
    ("prompt", "response", "faults"),
    [
        (SUM, "Sure! 3 + 4 = 7. Anything else?", ()),
        (SUM, " Of course! 3 + 4 = 7. Have a nice day!\n", ()),
        ("Please add 9 and 8.", "Happy to help! 9 + 8 = 17. I hope this helps!", ()),
        (STORY, "Sure! 3 + 4 = 7. Anything else?", ()),
        (SUM, "Sure! 3 + 4 = 8. Anything else?", ("wrong",)),
        (SUM, "Sure! 4 + 4 = 8. Anything else?", ("wrong",)),
        (SUM, "Sure! 3 + 4 = 77. Anything else?", ("wrong",)),
        (SUM, "Sure! 3 + = 7. Anything else?", ("no answer",)),
        (SUM, "Sure! In order: 3, 4. Anything else?", ("no answer",)),
        (SUM, "Sure! I do not know. Anything else?", ("no answer",)),
        (SUM, "Sure! Anything else?", ("no answer",)),
        (SUM, "3 + 4 = 7. Anything else?", ("opening",)),
        (SUM, "Ugh. 3 + 4 = 7. Anything else?", ("opening",)),
        (SUM, "Sure 3 + 4 = 7. Anything else?", ("opening", "no answer")),
        (SUM, "Sure! 3 + 4 = 7.", ("close",)),
        (SUM, "Sure! 3 + 4 = 7. Now go away.", ("close",)),
        (SUM, "Sure! 3 + 4 = 7. Anything", ("close", "unfinished")),
        (SUM, "Sure! 3 + 4 = 7. Anything else? and", ("unfinished",)),
        (SUM, "Sure! 3 + 4 = 7. Anything else? Ben.", ("rambling", "close")),
        (SUM, "Sure! 3 + 4 = 7. Anything else? Anything else?", ("rambling",)),
        (SUM, "Sure! Of course! 3 + 4 = 7. Anything else?", ("rambling",)),
        (SUM, "Sure! 3 + 4 = 7. 3 + 4 = 7. Anything else?", ("rambling",)),
        (SUM, "Sure! 3 + 4 = 7. 3 + 4 = 8. Anything else?", ("wrong", "rambling")),
        (SUM, "Sure! 3 + 4 = 7. I like to talk. I talk a lot. Anything else?", ("rambling",)),
        (SUM, "", ("opening", "no answer", "close")),
        (SORT, "Sure! In order: 0, 5, 8. Anything else?", ()),
        (SORT, "Sure! In order: 0, 8, 5. Anything else?", ("wrong",)),
        (SORT, "Sure! In order: 0, 5. Anything else?", ("wrong",)),
        (SORT, "Sure! In order: 0, 5, 8, 9. Anything else?", ("wrong",)),
        (SORT, "Sure! In order: 0, 5, 9. Anything else?", ("wrong",)),
        (LARGEST, "Sure! The largest is 9. Anything else?", ()),
        (LARGEST, "Sure! The largest is 4. Anything else?", ("wrong",)),
        (LARGEST, "Sure! The smallest is 9. Anything else?", ("wrong",)),
        (SMALLEST, "Sure! The smallest is 2. Anything else?", ()),
        (SMALLEST, "Sure! The smallest is 0. Anything else?", ("wrong",)),
        (HOME, "Sure! Ann lives in Rome. Anything else?", ()),
        (HOME, "Sure! Ann lives in Oslo. Anything else?", ("wrong",)),
        (HOME, "Sure! Ben lives in Rome. Anything else?", ("wrong",)),
        (HOME, "Sure! Ann likes tea. Anything else?", ("wrong",)),
        (TASTE, "Sure! Ann likes tea. Anything else?", ()),
        (TASTE, "Sure! Ann likes milk. Anything else?", ("wrong",)),
        (TASTE, "Sure! Ann likes tea and lives in Rome. Anything else?", ("no answer",)),
        (COLOUR, "Sure! The hat is red. Anything else?", ()),
        (COLOUR, "Sure! The hat is blue. Anything else?", ("wrong",)),
        (COLOUR, "Sure! The hat is in the box. Anything else?", ("wrong",)),
        (PLACE, "Sure! The hat is in the box. Anything else?", ()),
        (PLACE, "Sure! The key is in the box. Anything else?", ("wrong",)),
        (PLACE, "Sure! The hat is the box. Anything else?", ("no answer",)),
    ],
)
def test_the_judge_finds_the_faults_of_answers_written_by_hand(prompt, response, faults):
    verdict = judge(prompt, response, ended=True)
    assert verdict.faults == faults
    assert verdict.good == (faults == ())


def test_an_answer_truncated_before_its_end_token_is_unfinished():
    assert judge(SUM, "Sure! 3 + 4 = 7. Anything else?", ended=False).faults == ("unfinished",)


def test_the_judge_rejects_a_prompt_of_an_unknown_kind():
    with pytest.raises(ValueError, match="not a prompt of the built-in data"):
        judge("What is the capital of France?", "Sure! Paris. Anything else?", ended=True)


def test_only_evaluate_imports_the_judge_which_imports_nothing_from_the_package():
    package = Path(rlhf_jax.__file__).parent
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any("assistant_judge" in name for name in _imported_names(path))
    }
    assert users <= {"evaluate.py"}
    assert not [name for name in _imported_names(package / "data/builtin_judge.py") if name.startswith("rlhf_jax")]


def _imported_names(path: Path) -> list[str]:
    """All dotted names that a file imports; of relative imports the part after the dots."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((f"{row.prompt}\n{row.demonstration.text}" for row in ROWS), 512)


def test_the_tokenizer_reproduces_every_text(tokenizer):
    for text in ["Sure! 3 + 4 = 7. Anything else?", "\n\nHuman: two  spaces\tand a tab\n", "Grüße, 东京 🙂", " 10,000"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizer_splits_digits_and_keeps_common_words_whole(tokenizer):
    assert tokenizer.tokenize(" = 12345.") == ["Ġ=", "Ġ", "1", "2", "3", "4", "5", "."]
    assert tokenizer.tokenize(" Anything else?") == ["ĠAnything", "Ġelse", "?"]


def test_special_tokens_are_distinct_and_none_is_added_around_a_text(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("").input_ids == []
    assert len(tokenizer) == 512


def test_a_saved_tokenizer_loads_with_auto_tokenizer_and_encodes_equally(tokenizer, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=512).save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = "\n\nHuman: Sort 8, 0, 5.\n\nAssistant: Sure!</s>"
    assert opened(text).input_ids == tokenizer(text).input_ids
    assert opened.decode(opened(text).input_ids) == text
    assert opened.get_vocab() == tokenizer.get_vocab()
    assert (opened.pad_token, opened.bos_token, opened.eos_token) == ("<pad>", "<s>", "</s>")


def test_tokenizer_training_is_deterministic(tokenizer):
    again = train_tokenizer((f"{row.prompt}\n{row.demonstration.text}" for row in ROWS), 512)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_too_small_for_all_bytes_is_rejected():
    with pytest.raises(ValueError, match="use 259 or more"):
        train_tokenizer(["a"], 100)
