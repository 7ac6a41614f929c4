"""Votes of the web page: what is appended, what trainers read of it, and what is refused."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_jax.data.config import DataConfig, SourceConfig
from rlhf_jax.data.mapping import make_mapper, resolve_format
from rlhf_jax.data.sources import read_rows

pytest.importorskip("starlette", reason="needs the server: pip install -e '.[serve]'")

import tiny_server  # noqa: E402

from rlhf_jax.serve.app import Service, make_app  # noqa: E402
from rlhf_jax.serve.metrics import Counters  # noqa: E402
from rlhf_jax.serve.run import only_by_local_names  # noqa: E402
from rlhf_jax.serve.votes import VoteFile, open_votes  # noqa: E402

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Say a.\n\nThen b."},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "And c — “ć” 漢字 \u2028 </script>?"},
]
SETTINGS = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 64, "seed": 3, "finish_reason": "stop"}
LEFT, RIGHT = {"text": "left 漢\nc", "model": "a"} | SETTINGS, {"text": "right", "model": "b"} | SETTINGS | {"seed": 4}
VOTE = {"messages": MESSAGES, "left": LEFT, "right": RIGHT, "vote": "right"}


@pytest.fixture
def votes(tmp_path):
    return open_votes(tmp_path / "votes.jsonl")


def call_server(votes, key=""):
    """`call(method, path, body=None, **headers)` -> (status, JSON or text), of an application without its threads."""
    policy = SimpleNamespace(worker=None)
    app = make_app(Service({"a": policy, "b": policy}, {}, tiny_server.LIMITS, Counters(), key, votes))
    return lambda *request, **headers: tiny_server.call_app(app, *request, **headers)


def pairs_read(path):
    """The examples that `reward` and `dpo` read of a file with the default mapping."""
    source = resolve_format(DataConfig((SourceConfig(str(path)),)).sources[0])
    mapper = make_mapper(source, "pair")
    return [example for row in read_rows(str(path)) for example in mapper(row)]


def test_a_vote_appends_a_row_that_trainers_read_as_a_pair_with_its_provenance(votes):
    call = call_server(votes)
    status, found = call("POST", "/votes", VOTE)
    assert status == 201 and found["kind"] == "pairs"
    (example,) = pairs_read(votes.pairs.path)
    assert [tuple(turn) for turn in example.turns] == [(each["role"], each["content"]) for each in MESSAGES]
    assert (example.chosen, example.rejected) == ("right", "left 漢\nc")
    (row,) = map(json.loads, votes.pairs.path.read_text(encoding="utf-8").split("\n")[:-1])
    assert row == found["row"] and row["chosen_side"] == "right" and row["time"].endswith("+00:00")
    assert row["chosen_by"] == {"model": "b"} | SETTINGS | {"seed": 4}
    assert row["rejected_by"] == {"model": "a"} | SETTINGS
    call("POST", "/votes", VOTE | {"vote": "left"})
    assert [each.chosen for each in pairs_read(votes.pairs.path)] == ["right", "left 漢\nc"]
    assert votes.ties.path.read_bytes() == b""


def test_the_row_in_the_document_is_one_that_trainers_read_with_the_fields_of_a_vote(votes):
    text = (Path(__file__).parents[1] / "docs/feedback.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```json\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    row = json.loads(code)
    votes.pairs.append(row)
    assert [(each.chosen, each.rejected) for each in pairs_read(votes.pairs.path)] == [("7", "It is 8.")]
    taken = call_server(votes)("POST", "/votes", VOTE)[1]["row"]
    assert taken.keys() == row.keys() and taken["chosen_by"].keys() == row["chosen_by"].keys()


def test_a_tie_is_kept_apart_from_the_pairs_with_both_answers(votes):
    status, found = call_server(votes)("POST", "/votes", VOTE | {"vote": "tie", "left": LEFT | {"max_tokens": None}})
    assert status == 201 and found["kind"] == "ties" and votes.pairs.path.read_bytes() == b""
    (row,) = map(json.loads, votes.ties.path.read_text(encoding="utf-8").split("\n")[:-1])
    assert (row["left"], row["right"], row["prompt"]) == (LEFT["text"], RIGHT["text"], MESSAGES)
    assert row["left_by"]["max_tokens"] is None and row["right_by"]["model"] == "b"


def test_votes_are_listed_newest_first_deleted_and_exported(votes):
    call = call_server(votes)
    ids = [call("POST", "/votes", VOTE | {"left": LEFT | {"text": f"answer {i}"}})[1]["id"] for i in range(5)]
    status, found = call("GET", "/votes/pairs?limit=2&offset=1")
    assert status == 200 and found["total"] == 5 and found["file"] == "votes.jsonl"
    assert [each["id"] for each in found["data"]] == ids[::-1][1:3]
    assert found["data"][0]["row"]["rejected"] == "answer 3"
    assert call("DELETE", f"/votes/pairs/{ids[1]}")[0] == 200
    assert [each.rejected for each in pairs_read(votes.pairs.path)] == [f"answer {i}" for i in (0, 2, 3, 4)]
    assert call("DELETE", f"/votes/pairs/{ids[1]}")[0] == 404
    status, text = call("GET", "/votes/pairs.jsonl")
    assert status == 200 and text == votes.pairs.path.read_text(encoding="utf-8")
    assert call("GET", "/votes/ties")[1]["total"] == 0


def test_lines_that_are_no_votes_are_listed_and_stay_when_others_are_deleted(votes):
    votes.pairs.path.write_bytes(b'\xff no JSON\n{"prompt": "p", "x": NaN}\n{"cut": ')
    call = call_server(votes)
    id = call("POST", "/votes", VOTE)[1]["id"]
    status, found = call("GET", "/votes/pairs")
    assert status == 200 and [each["row"] for each in found["data"][1:]] == [
        *('{"cut": \n', {"prompt": "p", "x": "NaN"}, "\ufffd no JSON\n")
    ]
    assert call("DELETE", f"/votes/pairs/{id}")[0] == 200
    assert votes.pairs.path.read_bytes() == b'\xff no JSON\n{"prompt": "p", "x": NaN}\n{"cut": \n'


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"vote": "both"}, 400, "vote must be left, right or tie, not 'both'"),
        ({"vote": ["left"]}, 400, "vote must be left, right or tie"),
        ({"vote": None}, 400, "vote must be left, right or tie"),
        ({"comment": "x"}, 400, "Unrecognized request argument supplied: comment"),
        ({"left": "text"}, 400, "left must be an object"),
        ({"left": {"text": "a"}}, 400, "left.finish_reason is missing"),
        ({"left": LEFT | {"extra": 1}}, 400, "left.extra"),
        ({"left": LEFT | {"model": "c"}}, 404, "The model 'c' does not exist"),
        ({"left": LEFT | {"text": 5}}, 400, "text must be a text"),
        ({"left": LEFT | {"text": "\ud800"}}, 400, "surrogates not allowed"),
        ({"left": LEFT | {"text": " \n"}}, 400, "an answer is empty"),
        ({"left": LEFT | {"text": "right\n"}}, 400, "the answers are equal"),
        ({"left": LEFT | {"temperature": float("nan")}}, 400, "temperature must be from 0 to 2"),
        ({"left": LEFT | {"seed": 2**64}}, 400, "seed"),
        ({"left": LEFT | {"finish_reason": None}}, 400, "finish_reason must be stop or length"),
        ({"messages": "Say a."}, 400, "messages must be a list"),
        ({"messages": []}, 400, "must end with a turn of the user"),
        ({"messages": MESSAGES[:3]}, 400, "must end with a turn of the user"),
        ({"messages": [{"role": "king", "content": "a"}]}, 400, "'king'"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "the last message is empty"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, 400, "messages.name"),
        ({"messages": [5]}, 400, "messages must be an object"),
    ],
)
def test_a_bad_vote_is_refused_with_its_status_and_nothing_is_written(votes, change, status, message):
    found = call_server(votes)("POST", "/votes", VOTE | change)
    assert found[0] == status and message in found[1]["error"]["message"]
    assert votes.pairs.path.read_bytes() == votes.ties.path.read_bytes() == b""


def test_a_key_json_and_the_own_site_are_needed_to_vote_read_and_delete(votes):
    call, key = call_server(votes, "secret"), {"authorization": "Bearer secret"}
    requests = [("POST", "/votes", VOTE), ("GET", "/votes/pairs"), ("GET", "/votes/pairs.jsonl")]
    requests += [("DELETE", "/votes/pairs/0")]
    assert [call(*request)[0] for request in requests] == [401] * 4
    assert [call(*request, authorization="Bearer other")[0] for request in requests] == [401] * 4
    assert [call(*request, **key)[0] for request in requests] == [201, 200, 200, 404]
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):  # what forms can send
        assert call("POST", "/votes", VOTE, **key, **{"content-type": kind})[0] == 415
    for site, expected in (("cross-site", 403), ("same-site", 403), ("same-origin", 201)):
        assert call("POST", "/votes", VOTE, **key, **{"sec-fetch-site": site})[0] == expected
    assert call("DELETE", "/votes/pairs/0", **key, **{"sec-fetch-site": "cross-site"})[0] == 403
    assert len(pairs_read(votes.pairs.path)) == 2
    assert call("POST", "/votes", VOTE | {"left": LEFT | {"text": "x" * 20_000}}, **key)[0] == 413


def test_without_a_file_nothing_is_taken_and_the_list_says_so():
    call = call_server(None)
    assert call("GET", "/votes/pairs") == (
        200,
        {"object": "list", "kind": "pairs", "file": None, "total": 0, "data": []},
    )
    for request in (("POST", "/votes", VOTE), ("DELETE", "/votes/pairs/0"), ("GET", "/votes/ties.jsonl")):
        status, found = call(*request)
        assert status == 404 and "start it with --votes FILE.jsonl" in found["error"]["message"]


def test_wrong_kinds_and_pages_are_refused(votes):
    call = call_server(votes)
    assert call("GET", "/votes/other")[0] == call("GET", "/votes/other.jsonl")[0] == 404
    assert call("GET", "/votes/pairs?limit=-1")[0] == call("GET", "/votes/pairs?offset=x")[0] == 400
    assert call("GET", "/votes")[0] == 405


def test_votes_at_once_through_several_openings_of_the_file_lose_nothing_while_others_are_deleted(votes):
    path = votes.pairs.path
    files = [VoteFile(path) for _ in range(4)]  # each with its own lock of threads, as other processes have
    first = [files[0].append({"chosen": "old", "number": i}) for i in range(20)]

    def append(number):
        return files[number % 4].append({"chosen": "漢" * 3000, "number": number})

    with ThreadPoolExecutor(12) as pool:
        removed = pool.map(files[1].remove, first)
        ids = set(pool.map(append, range(40)))
        assert all(removed)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert sorted(row["number"] for row in rows) == list(range(40)) and len(ids) == 40


def test_an_append_that_fails_leaves_the_file_as_it_was(votes, monkeypatch):
    votes.pairs.append({"number": 1})
    before = votes.pairs.path.read_bytes()

    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf_jax.serve.votes.os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        votes.pairs.append({"number": 2})
    assert votes.pairs.path.read_bytes() == before
    assert call_server(votes)("POST", "/votes", VOTE)[0] == 500


def test_an_append_to_a_full_disk_leaves_the_file_as_it_was_though_space_is_free_again(votes, monkeypatch):
    resource = pytest.importorskip("resource", reason="limits the size of files, as a full disk does")
    votes.pairs.append({"number": 1})
    before, limits, truncate = votes.pairs.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE), os.truncate

    def free_space(path, size):
        truncate(path, size)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr("rlhf_jax.serve.votes.os.truncate", free_space)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    with pytest.raises(OSError, match="too large"):
        votes.pairs.append({"number": 2})
    assert votes.pairs.path.read_bytes() == before


def test_the_file_is_named_as_trainers_read_it_in_a_folder_that_exists(tmp_path):
    with pytest.raises(ValueError, match="must end with .jsonl"):
        open_votes(tmp_path / "votes.csv")
    with pytest.raises(ValueError, match="there is no folder .*; make it first"):
        open_votes(tmp_path / "missing/votes.jsonl")
    (tmp_path / "real.jsonl").write_text('{"number": 1}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    linked = open_votes(tmp_path / "link.jsonl").pairs
    id = linked.append({"number": 2})
    assert linked.remove(id) and (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "real.jsonl").read_text() == '{"number": 1}\n'


def test_the_page_loads_nothing_from_elsewhere_and_needs_no_key(votes):
    call = call_server(votes, "secret")
    texts = [call("GET", path) for path in ("/", "/page.css", "/elements.js", "/page.js")]
    assert [status for status, _ in texts] == [200] * 4
    assert not any(part in text for _, text in texts for part in ("http:", "https:", "//cdn", "@import", "url("))
    script = texts[2][1] + texts[3][1]
    assert not any(
        name in script for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(")
    )


def test_a_server_without_a_key_answers_only_requests_that_name_the_loopback_address():
    app = make_app(Service({}, {}, tiny_server.LIMITS, Counters()))
    only_by_local_names(app, "127.0.0.2")
    status = {
        name: tiny_server.call_app(app, "GET", "/health", host=name)[0]
        for name in ("127.0.0.1:8000", "localhost", "[::1]:8000", "127.0.0.2", "a.example:8000", "localhost.a.example")
    }
    assert list(status.values()) == [200, 200, 200, 200, 400, 400]
