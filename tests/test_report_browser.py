"""The report in headless Chromium: no error, nothing loaded from elsewhere, and what keys and filters change."""

import json
import re

import pytest
import tiny_browser

from rlhf_jax.report import write_report

HOSTILE = f"{tiny_browser.HOSTILE} \x1b[2J"


def write_run(folder, *, offset=0.0):
    """A run of sft and ppo with an evaluation; the second prompt of ppo is hostile."""
    for name in ("sft", "ppo/rollouts"):
        (folder / name).mkdir(parents=True)
    rows = [{"step": i, "loss": 4 / i + offset, "grad_norm": 1.0} for i in range(1, 41)]
    rows += [{"step": i, "held_out_loss": 4 / i + 0.5} for i in (1, 20, 40)] + [{"step": 41, "loss": "nan"}]
    (folder / "sft/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (1, 2, 3):
        rows = [
            {"prompt": HOSTILE if i == 1 else f"Question {i}?", "response": f"{HOSTILE} {step}.{i}", "score": i - step}
            | {"kl": i * 0.5, "reward": 0.0, "length": 30 - i, "finish_reason": "eos" if i % 2 else "length"}
            for i in range(30)
        ]
        (folder / f"ppo/rollouts/{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [
        {"prompt": [["user", HOSTILE]], "sft_answer": "a", "sft_score": 0.0, "ppo_answer": "b", "ppo_score": 2.0}
    ]
    (folder / "evaluate.jsonl").write_text(json.dumps(answers[0]) + "\n")
    pairs = {"pairs": 8, "accuracy": 0.5, "accuracy_interval": [0.25, 0.75], "longer": 0.5}
    numbers = {"prompts": 1, "sft_score": 0.0, "ppo_score": 2.0, "ppo_good": 0.5, "reward_pairs": pairs}
    (folder / "evaluate.json").write_text(json.dumps(numbers))
    (folder / "config.toml").write_text(f"[run]\nseed = {int(offset)}\n")
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{number of runs: the report}."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / name, offset=offset) for name, offset in (("one", 0.0), ("two", 1.0))]
    return {1: write_report(runs[:1]), 2: write_report(runs, folder / "both.html")}


@pytest.fixture
def open_page(browser, pages):
    """`open_page(runs=1, scheme="light", width=1200)`; at the end the test fails on any message or request."""
    complaints, contexts = [], []

    def open_one(runs=1, scheme="light", width=1200):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if page.url != "about:blank" else None)
        page.goto(pages[runs].as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_fits_wide_and_narrow_screens_in_both_schemes(open_page, scheme, width):
    page = open_page(2, scheme, width)
    tiny_browser.check_fits(page, width, scheme)
    tiny_browser.picture(page, f"report-{scheme}-{width}")
    assert page.locator("figure:visible svg .curve").count() >= 4


def test_pointer_and_arrow_keys_read_the_values_of_a_step(open_page):
    page = open_page()
    chart = page.locator("figure", has_text="loss").first
    readout, svg = chart.locator(".readout"), chart.locator("svg[role=img]")
    assert readout.inner_text().split() == ["last:", "training", "nan", "held", "out", "0.6"]
    svg.focus()
    page.keyboard.press("Home")
    assert readout.inner_text().split() == ["step", "1:", "training", "4", "held", "out", "4.5"]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert readout.inner_text().split() == ["step", "3:", "training", "1.333"]
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 60)
    assert readout.inner_text().split()[:2] == ["step", "41:"]
    page.mouse.move(0, 0)
    assert readout.inner_text().startswith("last:")
    assert "first 4, last 0.6, least 0.1, greatest 4.5 nats" in svg.get_attribute("aria-label")


def test_log_scale_smoothing_search_and_runs_change_the_curves(open_page):
    page = open_page(2)
    curve = page.locator("figure", has_text="loss").first.locator("path.curve")
    before = curve.first.get_attribute("d")
    page.check("#log")
    assert curve.first.get_attribute("d") != before and "log scale" in page.locator("figure svg").first.text_content()
    page.uncheck("#log")
    assert curve.count() == 4  # two runs, training and held out
    page.select_option("#smooth", "0.9")
    assert curve.count() == 6  # and the curves before smoothing
    page.select_option("#smooth", "0")
    page.get_by_role("checkbox", name="two").uncheck()
    assert curve.count() == 2
    page.fill("#find", "grad")
    assert page.locator("figure:visible").all_inner_texts()[0].startswith("grad_norm")


def test_rollouts_are_filtered_sorted_and_shown_as_text(open_page):
    page = open_page()
    cards = page.locator("#rollouts article")
    assert "90 found" in page.locator("#rollouts").inner_text() and cards.count() == 20
    page.get_by_role("button", name="Show 20 more of 70").click()
    assert cards.count() == 40
    page.select_option("#step", "ppo 2")
    page.select_option("#sort", "-score")
    assert "30 found" in page.locator("#rollouts").inner_text() and "score 27" in cards.first.inner_text()
    page.select_option("#end", "eos")
    assert "15 found" in page.locator("#rollouts").inner_text()
    page.fill("#search", "QUESTION 3?")
    assert cards.count() == 1 and "ppo step 2" in cards.first.inner_text()
    shown = cards.first.locator("pre.answer").inner_text()
    assert shown.startswith("</script><img src=x") and "\\u202egnp.exe \\u001b[2J 2.3" in shown
    assert page.locator("img").count() == 0 and page.title() == "Report: one"


def test_one_prompt_at_several_steps_and_before_and_after(open_page):
    page = open_page()
    page.get_by_role("button", name="One prompt at several steps").click()
    first = page.locator("#rollouts article").first
    assert "30 found" in page.locator("#rollouts").inner_text()
    assert first.locator("strong").all_inner_texts() == ["ppo step 1", "ppo step 2", "ppo step 3"]
    page.get_by_role("button", name="Before and after, held out").click()
    assert [text.split() for text in page.locator("#rollouts .head").all_inner_texts()] == [
        ["sft", "score", "0"],
        ["ppo", "score", "2"],
    ]


def test_the_evaluation_is_a_table_of_policies_with_intervals(open_page):
    rows = open_page().locator("#evaluation tr").all_inner_texts()
    assert [re.split(r"\s*\t\s*", row) for row in rows] == [
        ["over 1 prompts", "sft", "ppo"],
        ["mean score", "0", "2"],
        ["judged good", "–", "50.0% 5.5% to 94.5%"],
        ["reward model on", "pairs", "accuracy", "the longer is chosen"],
        ["all held-out pairs", "8", "50.0% 25.0% to 75.0%", "50.0%"],
    ]


def test_keys_that_differ_between_runs_are_listed(open_page):
    page = open_page(2)
    assert "1 of 1 keys differ" in page.locator("#configuration").inner_text()
    assert page.locator("#configuration tbody tr").all_inner_texts() == ["run.seed\t0\t1"]
