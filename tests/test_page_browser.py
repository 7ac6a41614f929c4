"""The web page in headless Chromium, with scripted answers: conversation, stop, regenerate, edit, votes, keys."""

import asyncio
import contextlib
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn", reason="needs the server: pip install -e '.[serve]'")

import tiny_server  # noqa: E402
from tiny_browser import HOSTILE, check_fits, picture, sync_api  # noqa: E402

from rlhf_jax.serve.app import Service  # noqa: E402
from rlhf_jax.serve.metrics import Counters  # noqa: E402
from rlhf_jax.serve.models import Policy  # noqa: E402
from rlhf_jax.serve.votes import open_votes  # noqa: E402
from rlhf_jax.serve.worker import Piece  # noqa: E402

KEY = "correct horse"


class ScriptedWorker:
    """Says the model's name and the question; "slow" in the question: without end, "same": the same for all."""

    def __init__(self, name):
        self.name, self.asked, self.canceled = name, [], 0
        self.numbers = itertools.count(1)

    def start(self, loop):
        self.loop = loop

    def close(self):
        pass

    def cancel(self, answers):
        self.canceled += 1
        answers[0].task.cancel()

    def submit(self, answers):
        pieces = asyncio.Queue()
        answers[0].task = asyncio.create_task(self.say(answers[0].asked, pieces))
        return pieces

    async def say(self, asked, pieces):
        question = asked.prompts[0].turns[-1][1]
        name = "" if "same" in question else f"{self.name} number {next(self.numbers)} "
        for count in range(10_000 if "slow" in question else 1):
            await pieces.put((0, Piece(f"{name}answers {question} {HOSTILE}\n", (), count + 1)))
            await asyncio.sleep(0.02)
        await pieces.put((0, Piece("", (), 2, "stop")))


class ScriptedPolicy(Policy):
    async def answers(self, asked, most):
        self.worker.asked.append(asked)
        return [SimpleNamespace(request=SimpleNamespace(ids=[1]), asked=asked)]


@pytest.fixture
def open_page(browser, tmp_path):
    """`open_page(models="ab", votes=True, key="", status=0, scheme="light", width=1200)`; at the end the test fails on
    any message of the console, except those that the browser writes about `status`, and on any request elsewhere."""
    complaints, stack = [], contextlib.ExitStack()

    def open_one(models="ab", votes=True, key="", status=0, scheme="light", width=1200):
        policies = {name: ScriptedPolicy(name, ScriptedWorker(name), None) for name in models}
        file = open_votes(tmp_path / "votes.jsonl") if votes else None
        url = stack.enter_context(
            tiny_server.listening(Service(policies, {}, tiny_server.LIMITS, Counters(), key, file))
        )
        context = stack.enter_context(
            contextlib.closing(
                browser.new_context(
                    viewport={"width": width, "height": 800},
                    color_scheme=scheme,
                    has_touch=width < 600,
                    is_mobile=width < 600,
                )
            )
        )
        page = context.new_page()
        page.set_default_timeout(60_000)
        expected = f"Failed to load resource: the server responded with a status of {status} "
        page.on("console", lambda each: None if each.text.startswith(expected) else complaints.append(each.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(url) else complaints.append(request.url))
        page.goto(url)
        page.policies = policies
        return page

    with stack:
        yield open_one
    assert [each for each in complaints if not each.startswith("blob:")] == []


def ask(page, text):
    page.fill("#message", text)
    page.click("#send")


def rows(tmp_path, name="votes.jsonl"):
    return [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]


def test_a_conversation_streams_stops_regenerates_and_is_edited_with_the_right_messages(open_page):
    page = open_page("a", votes=False)
    worker = page.policies["a"].worker
    assert "start the server with --votes FILE" in page.locator("#kept").inner_text()
    page.locator("summary").click()
    page.fill("#system", "Be short.")
    page.fill("#temperature", "0.5")
    page.locator("#message").focus()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    answers = page.locator(".answer .text")
    sync_api.expect(answers).to_have_text(re.compile("^a number 1 answers first line\\s+second line </script><img"))
    sync_api.expect(page.locator("#send")).to_be_visible()
    assert "\\u202egnp.exe" in answers.inner_text() and page.locator("img").count() == 0 and page.title() != "taken"
    assert "number 1" in page.locator("#announce").inner_text()
    asked = worker.asked[0]
    assert [tuple(turn) for turn in asked.prompts[0].turns] == [
        ("system", "Be short."),
        ("user", "first line\nsecond line"),
    ]
    assert (asked.temperature, asked.top_p, asked.max_new_tokens) == (0.5, 1.0, None)

    ask(page, "slow question")
    sync_api.expect(answers.last).to_contain_text("number 2 answers")
    assert page.locator("#send").is_hidden()
    page.keyboard.press("Escape")
    sync_api.expect(page.locator("#status")).to_have_text("Stopped.")
    assert "stopped" in page.locator(".answer").last.inner_text() and worker.canceled == 2
    assert len(worker.asked[1].prompts[0].turns) == 4

    page.locator(".user").last.get_by_role("button", name="Edit this message").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("quick question")
    page.keyboard.press("Enter")
    sync_api.expect(answers.last).to_contain_text("number 3 answers quick question")
    page.get_by_role("button", name="Regenerate").click()
    sync_api.expect(answers.last).to_contain_text("number 4 answers quick question")
    assert worker.asked[2].prompts == worker.asked[3].prompts and worker.asked[2].seed != worker.asked[3].seed
    assert [turn[0] for turn in worker.asked[3].prompts[0].turns] == ["system", "user", "assistant", "user"]

    page.locator(".user").first.get_by_role("button", name="Edit this message").click()
    assert "What came after it is forgotten." in page.locator(".user").first.inner_text()
    page.get_by_role("button", name="Cancel").click()
    assert page.locator(".user").count() == 2
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0


def test_a_blind_vote_is_one_row_whose_sides_are_those_shown_and_the_chosen_answer_is_continued(open_page, tmp_path):
    page, bits = open_page(), [0, 1, 1, 0]
    # The bits that put the second model on the left; seeds stay random.
    page.evaluate(
        "(bits) => { const random = crypto.getRandomValues.bind(crypto); crypto.getRandomValues = (array) =>"
        " array instanceof Uint8Array ? array.fill(bits.shift()) : random(array); }",
        bits,
    )
    for number, bit in enumerate(bits, 1):
        ask(page, f"question {number}")
        sync_api.expect(page.get_by_role("button", name="Right is better")).to_be_visible()
        cards = page.locator(".turn").last.locator(".answer")
        assert cards.locator("h3").all_text_contents() == ["left", "right"], "names are hidden"
        texts = cards.locator(".text").all_text_contents()
        page.get_by_role("button", name="Right is better").click()
        sync_api.expect(page.locator("#status")).to_have_text("Right is better; the vote is in the file.")
        row, models = rows(tmp_path)[-1], ["ab", "ba"][bit]
        assert len(rows(tmp_path)) == number and row["chosen_side"] == "right"
        assert [row[name].replace("\u202e", "\\u202e") for name in ("rejected", "chosen")] == texts
        assert [text[0] for text in texts] == [row["rejected_by"]["model"], row["chosen_by"]["model"]] == list(models)
        assert cards.locator("h3").all_text_contents() == [f"left: {models[0]}", f"right: {models[1]}"]
    assert row["prompt"][-2] == {"role": "assistant", "content": rows(tmp_path)[-2]["chosen"]}
    assert row["chosen_by"]["seed"] != row["rejected_by"]["seed"]


def test_ties_skips_undo_equal_and_stopped_answers(open_page, tmp_path):
    page = open_page("a")
    page.locator("summary").click()
    page.check("#compare")
    button, status = lambda name: page.get_by_role("button", name=name), page.locator("#status")
    ask(page, "one")
    button("Tie").click()
    sync_api.expect(status).to_have_text("Tie; the vote is in the file.")
    assert rows(tmp_path) == [] and len(rows(tmp_path, "votes.ties.jsonl")) == 1
    ask(page, "two")
    button("Left is better").click()
    sync_api.expect(status).to_contain_text("in the file")
    assert len(rows(tmp_path)) == 1
    button("Undo").click()
    sync_api.expect(status).to_have_text("The vote was taken back.")
    assert rows(tmp_path) == []
    page.fill("#message", "three")
    page.click("#send")
    sync_api.expect(status).to_have_text("First choose an answer, a tie or skip.")
    button("Skip").click()
    sync_api.expect(status).to_have_text("Skipped; no vote is kept.")
    ask(page, "the same")
    sync_api.expect(button("Left is better")).to_be_disabled()
    button("Regenerate").click()
    sync_api.expect(button("Left is better")).to_be_disabled()
    button("Skip").click()
    ask(page, "slow")
    sync_api.expect(page.locator(".answer .text").last).to_contain_text("slow")
    button("Stop").click()
    sync_api.expect(button("Tie")).to_be_disabled()
    assert "A stopped answer gets no vote" in page.locator(".turn").last.inner_text()
    assert rows(tmp_path) == [] and len(rows(tmp_path, "votes.ties.jsonl")) == 1


def test_the_page_of_votes_lists_deletes_and_exports(open_page, tmp_path):
    page = open_page()
    ask(page, "one")
    page.get_by_role("button", name="Left is better").click()
    sync_api.expect(page.locator("#status")).to_contain_text("in the file")
    with (tmp_path / "votes.jsonl").open("a") as file:
        file.write(f"no vote {HOSTILE}\n{json.dumps(rows(tmp_path)[0] | {'chosen': HOSTILE})}\n")
    page.get_by_role("link", name="Votes").click()
    cards = page.locator("#rows article")
    sync_api.expect(cards).to_have_count(3)
    assert page.locator("#votes-status").inner_text() == "3 in votes.jsonl, the newest first"
    assert "no vote of this page" in cards.nth(1).inner_text() and page.locator("img").count() == 0
    assert "temperature 1" in cards.nth(2).inner_text() and "model" in cards.nth(2).inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    assert download.value.suggested_filename == "pairs.jsonl"
    assert Path(download.value.path()).read_bytes() == (tmp_path / "votes.jsonl").read_bytes()
    cards.first.get_by_role("button", name="Delete").click()
    sync_api.expect(cards).to_have_count(2)
    assert page.evaluate("document.activeElement.id") == "votes-title"
    left = (tmp_path / "votes.jsonl").read_text().splitlines()
    assert len(left) == 2 and left[1] == f"no vote {HOSTILE}"
    page.select_option("#kind", "ties")
    sync_api.expect(cards).to_have_count(0)


def test_a_wrong_vote_is_corrected_on_the_page_of_votes(open_page, tmp_path):
    page = open_page()
    ask(page, "one")
    page.get_by_role("button", name="Left is better").click()
    sync_api.expect(page.locator("#status")).to_contain_text("in the file")
    (before,) = rows(tmp_path)
    page.get_by_role("link", name="Votes").click()
    page.get_by_role("button", name="Swap chosen and rejected").click()
    sync_api.expect(page.locator("#rows .chosen .note")).to_contain_text(f"model {before['rejected_by']['model']},")
    (after,) = rows(tmp_path)
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        assert (after[name], after[f"{name}_by"]) == (before[other], before[f"{other}_by"])
    assert after["prompt"] == before["prompt"] and (before["chosen_side"], after["chosen_side"]) == ("left", "right")


def test_the_key_is_asked_for_kept_for_the_tab_and_sent(open_page):
    page = open_page(key=KEY, status=401)
    sync_api.expect(page.locator("#key-dialog")).to_be_visible()
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#key-wrong")).to_have_text("The server does not know this key.")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#kept")).to_contain_text("Votes are appended to votes.jsonl")
    ask(page, "hello")
    sync_api.expect(page.locator(".answer .text").first).to_contain_text("answers hello")
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.reload()
    sync_api.expect(page.locator("#kept")).to_contain_text("Votes are appended")
    assert page.locator("#key-dialog").is_hidden()


def test_an_error_is_shown_and_its_question_is_left_out_of_what_follows(open_page):
    page = open_page("a", votes=False, status=500)
    worker, submit = page.policies["a"].worker, page.policies["a"].worker.submit

    def fail(answers):
        raise RuntimeError("out of memory")

    worker.submit = fail
    ask(page, "one")
    sync_api.expect(page.locator(".wrong")).to_contain_text("the server failed to answer")
    worker.submit = submit
    ask(page, "two")
    sync_api.expect(page.locator(".answer .text").last).to_contain_text("answers two")
    assert [turn[1] for turn in worker.asked[-1].prompts[0].turns] == ["two"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 375])
def test_both_pages_fit_wide_and_narrow_screens_in_both_schemes_and_every_control_has_a_name(open_page, scheme, width):
    page = open_page(scheme=scheme, width=width)
    if width < 600:  # keyboards of phones have no Shift+Enter
        page.fill("#message", "one")
        page.press("#message", "Enter")
        assert page.input_value("#message") == "one\n" and page.locator(".turn").count() == 0
    ask(page, "What is 3 + 4?")
    page.get_by_role("button", name="Left is better").click()
    ask(page, "And a long word: " + "x" * 300)
    sync_api.expect(page.get_by_role("button", name="Tie")).to_be_visible()
    picture(page, f"chat-{scheme}-{width}")
    check_fits(page, width, scheme)
    page.locator("summary").click()
    page.evaluate("scrollTo(0, 0)")
    picture(page, f"settings-{scheme}-{width}")
    check_fits(page, width, scheme)
    names = "[...document.querySelectorAll('input, select, textarea')].map((each) => each.labels.length)"
    assert min(page.evaluate(names)) == 1
    page.get_by_role("link", name="Votes").click()
    sync_api.expect(page.locator("#rows article")).to_have_count(1)
    picture(page, f"votes-{scheme}-{width}")
    check_fits(page, width, scheme)
