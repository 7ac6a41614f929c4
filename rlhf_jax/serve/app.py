"""The routes of the server: OpenAI's endpoints, scores, health, metrics, the web page and its votes."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_jax.serve.errors import FAILED, SHUTTING_DOWN, TOO_LATE, ApiError, invalid
from rlhf_jax.serve.fields import Asked, parse_chat, parse_completion, parse_score
from rlhf_jax.serve.limits import Limits
from rlhf_jax.serve.metrics import Counters
from rlhf_jax.serve.models import Policy, Scorer, find_model
from rlhf_jax.serve.replies import HttpReply, event
from rlhf_jax.serve.votes import VOTE_KINDS, VoteFile, Votes, line_id, parse_vote
from rlhf_jax.serve.worker import PendingAnswer, Piece

LOGGER = logging.getLogger(__name__)
# {path: file in the package, and type, of the web page, which loads nothing else}
PAGE = {
    "/": ("serve/page.html", "text/html"),
    "/page.css": ("serve/page.css", "text/css"),
    "/elements.js": ("elements.js", "text/javascript"),
    "/page.js": ("serve/page.js", "text/javascript"),
}
OPEN_PATHS = ("/health", *PAGE)  # need no key
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MOST_LISTED = 200  # votes of one reply


@dataclass
class Service:
    """What the routes share.

    Attributes:
        key: of the clients; "": none is needed.
        active: requests that are being answered.
        draining: whether new requests are refused, as the server is to stop.
        votes: None: votes are not kept.
    """

    policies: Mapping[str, Policy]
    scorers: Mapping[str, Scorer]
    limits: Limits
    metrics: Counters
    key: str = ""
    votes: Votes | None = None
    active: int = 0
    draining: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)


def make_app(service: Service) -> Starlette:
    """The application. Its state has `service`."""
    routes = [
        Route("/v1/chat/completions", answer_endpoint(service, parse_chat), methods=["POST"]),
        Route("/v1/completions", answer_endpoint(service, parse_completion), methods=["POST"]),
        Route("/v1/score", endpoint(service, give_scores), methods=["POST"]),
        Route("/v1/models", endpoint(service, list_models), methods=["GET"]),
        Route("/v1/models/{name:path}", endpoint(service, show_model), methods=["GET"]),
        Route("/health", endpoint(service, show_health), methods=["GET"]),
        Route("/metrics", endpoint(service, show_metrics), methods=["GET"]),
        Route("/votes", endpoint(service, take_vote), methods=["POST"]),
        Route("/votes/{kind}.jsonl", endpoint(service, export_votes), methods=["GET"]),
        Route("/votes/{kind}", endpoint(service, list_votes), methods=["GET"]),
        Route("/votes/{kind}/{id}", endpoint(service, delete_vote), methods=["DELETE"]),
        *(Route(path, endpoint(service, partial(show_page, *PAGE[path])), methods=["GET"]) for path in PAGE),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for policy in service.policies.values():
            policy.worker.start(asyncio.get_running_loop())
        yield
        for policy in service.policies.values():
            policy.worker.close()

    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path:.100}: {error.detail}"
        code = "not_found" if error.status_code == 404 else "http"
        return ApiError(error.status_code, message, code).response(error.headers)

    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: http_error})
    app.state.service = service
    return app


Handle = Callable[[Service, Request], Awaitable[Response]]


def endpoint(service: Service, handle: Handle) -> Callable[[Request], Awaitable[Response]]:
    """A route that checks the key, counts, and answers errors as JSON."""

    async def run(request: Request) -> Response:
        start = time.monotonic()
        try:
            check_key(service, request)
            response = await handle(service, request)
        except ApiError as error:
            response = error.response()
        except ClientDisconnect:
            response = Response(status_code=499)  # nginx's; no one reads it
        except Exception:
            LOGGER.exception(f"{request.method} {request.url.path} failed")
            response = ApiError(*FAILED).response()
        path = request.scope["route"].path
        if not isinstance(response, EventStream):
            service.metrics.count_request(path, response.status_code, time.monotonic() - start)
        return response

    return run


def check_key(service: Service, request: Request) -> None:
    """ApiError 401 without the key of the server."""
    if not service.key or request.url.path in OPEN_PATHS:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Compared in constant time, so that the time does not say how much of a guess is right.
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), service.key.encode()):
        raise ApiError(401, "Incorrect API key provided: send it as Authorization: Bearer KEY", "invalid_api_key")


async def read_body(service: Service, request: Request) -> dict[str, Any]:
    """The JSON object of a request. ApiError 415, 413, 408 or 400."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A page of another site could otherwise send requests through its visitor's browser.
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json", "unsupported_media_type")
    most, body = service.limits.body, bytearray()
    too_large = ApiError(413, f"the body may have at most {most} bytes", "request_too_large")
    if int(request.headers.get("content-length", "0") or 0) > most:
        raise too_large
    try:
        async with asyncio.timeout(service.limits.seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, "the body did not arrive in time", "timeout") from error
    try:
        found = json.loads(body)
        json.dumps(found, ensure_ascii=False).encode()  # fails for a lone surrogate, which no reply could repeat
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    return found


def answer_endpoint(
    service: Service, parse: Callable[[Mapping[str, Any]], Asked]
) -> Callable[[Request], Awaitable[Response]]:
    """A route that answers by a policy."""

    async def handle(service: Service, request: Request) -> Response:
        start = time.monotonic()
        check_open(service)
        asked = parse(await read_body(service, request))
        deadline = time.monotonic() + service.limits.seconds
        policy = find_model(service.policies, asked.model, service.scorers)
        answers = await in_time(policy.answers(asked, service.limits.rows), request.receive, deadline)
        check_open(service)
        pieces = policy.worker.submit(answers)
        reply, run = HttpReply(policy.name, asked, answers), Running(service, policy, answers, pieces, deadline)
        if asked.stream:
            return EventStream(reply, run, start, request.scope["route"].path)
        return await collect(reply, run, request)

    return endpoint(service, handle)


def check_open(service: Service) -> None:
    if service.draining:
        raise ApiError(*SHUTTING_DOWN)


class Running:
    """Answers that a worker computes, as a context: at its end what they hold is freed."""

    def __init__(
        self, service: Service, policy: Policy, answers: Sequence[PendingAnswer], pieces: asyncio.Queue, deadline: float
    ):
        self.service, self.policy, self.answers, self.queue = service, policy, answers, pieces
        self.deadline = deadline  # of time.monotonic
        service.active += 1
        service.idle.clear()

    def close(self) -> None:
        self.policy.worker.cancel(self.answers)
        self.service.active -= 1
        if not self.service.active:
            self.service.idle.set()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the answer, piece) until all have ended. ApiError where the worker fails."""
        left = len(self.answers)
        while left:
            index, piece = await self.queue.get()
            if piece.error:
                raise piece.error
            left -= piece.finish is not None
            yield index, piece


async def until_gone(receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    """Wait until the client closes the connection; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def in_time(work: Awaitable[Any], receive: Callable, deadline: float) -> Any:
    """The result of `work`. ClientDisconnect if the client goes away before, ApiError 504 if the deadline, of
    time.monotonic, comes first."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        left = deadline - time.monotonic()
        done, _ = await asyncio.wait((task, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        raise ClientDisconnect if gone in done else ApiError(*TOO_LATE)
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def collect(reply: HttpReply, run: Running, request: Request) -> Response:
    """The whole reply."""

    async def work() -> dict[str, Any]:
        found: list[list[Piece]] = [[] for _ in run.answers]
        async for index, piece in run.pieces():
            found[index].append(piece)
            reply.add(index, piece)
        return reply.whole(found)

    try:
        return JSONResponse(await in_time(work(), request.receive, run.deadline))
    finally:
        run.close()


class EventStream(Response):
    """The reply in server-sent events, as its pieces come. Rows are freed when the client goes away."""

    def __init__(self, reply: HttpReply, run: Running, start: float, path: str):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self.status_code, self.media_type, self.background = 200, "text/event-stream", None
        self.init_headers(headers)
        self.reply, self.run, self.start, self.path = reply, run, start, path

    async def __call__(self, scope, receive, send) -> None:
        status = 200

        async def put(*events: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"".join(events), "more_body": more})

        async def work() -> None:
            await put(*self.reply.first_events())
            async for index, piece in self.run.pieces():
                self.reply.add(index, piece)
                await put(*self.reply.events(index, piece))
            await put(*self.reply.last_events(), more=False)

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await in_time(work(), receive, self.run.deadline)
        except ClientDisconnect:
            status = 499
        except ApiError as failure:
            # The status has been sent; the error is an event, as a client may still read.
            status = failure.status
            try:
                async with asyncio.timeout(1.0):
                    await put(event(failure.content()), more=False)
            except TimeoutError:
                LOGGER.info("a client that does not read was disconnected")
        finally:
            self.run.close()
            self.run.service.metrics.count_request(self.path, status, time.monotonic() - self.start)


async def give_scores(service: Service, request: Request) -> Response:
    check_open(service)
    name, rows = parse_score(await read_body(service, request), service.limits.inputs)
    deadline = time.monotonic() + service.limits.seconds
    scorer = find_model(service.scorers, name, service.policies)
    scores, tokens = await in_time(scorer.scores(rows), request.receive, deadline)
    data = [{"object": "score", "index": index, "score": score} for index, score in enumerate(scores)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "model": scorer.name, "data": data, "usage": usage})


def describe(model: Policy | Scorer) -> dict[str, Any]:
    kind = "chat" if isinstance(model, Policy) else "score"
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "rlhf_jax", "kind": kind}


async def list_models(service: Service, request: Request) -> Response:
    models = [*service.policies.values(), *service.scorers.values()]
    return JSONResponse({"object": "list", "data": [describe(model) for model in models]})


async def show_model(service: Service, request: Request) -> Response:
    models = {**service.policies, **service.scorers}
    return JSONResponse(describe(find_model(models, request.path_params["name"], {})))


async def show_health(service: Service, request: Request) -> Response:
    """200 while requests are taken, 503 while the server stops."""
    check_open(service)
    return JSONResponse({"status": "ok", "models": [*service.policies, *service.scorers]})


async def show_metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def show_page(name: str, kind: str, service: Service, request: Request) -> Response:
    text = resources.files("rlhf_jax").joinpath(name).read_text(encoding="utf-8")
    return Response(text, media_type=kind, headers=PAGE_HEADERS)


def vote_file(service: Service, kind: str) -> VoteFile:
    """ApiError 404 where no votes are kept, or none of this kind."""
    if kind not in VOTE_KINDS:
        raise ApiError(404, f"votes are {' or '.join(VOTE_KINDS)}, not {kind!r:.60}", "not_found")
    if service.votes is None:
        raise ApiError(404, "this server keeps no votes: start it with --votes FILE.jsonl", "votes_off")
    return getattr(service.votes, kind)


def check_same_origin(request: Request) -> None:
    """ApiError 403 for what a page of another site sends, as browsers say; other programs say nothing."""
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise ApiError(403, "votes are taken from the page of this server only", "cross_origin")


async def take_vote(service: Service, request: Request) -> Response:
    check_same_origin(request)
    vote_file(service, VOTE_KINDS[0])  # refused before its body is read
    kind, row = parse_vote(await read_body(service, request), service.policies.keys())
    id = await asyncio.to_thread(vote_file(service, kind).append, row)
    return JSONResponse({"object": "vote", "kind": kind, "id": id, "row": row}, 201)


async def list_votes(service: Service, request: Request) -> Response:
    """The newest first. Where no votes are kept `file` is null."""
    kind = request.path_params["kind"]
    if service.votes is None and kind in VOTE_KINDS:
        return JSONResponse({"object": "list", "kind": kind, "file": None, "total": 0, "data": []})
    file, page = vote_file(service, kind), []
    for name, default in (("offset", 0), ("limit", 50)):
        text = request.query_params.get(name, str(default))
        if not text.isascii() or not text.isdecimal() or len(text) > 9:
            raise invalid(f"{name} must be a number of votes, not {text!r:.60}", name)
        page.append(int(text))
    lines = [line for line in await asyncio.to_thread(file.lines) if line.strip()]
    chosen = lines[::-1][page[0] : page[0] + min(page[1], MOST_LISTED)]
    data = [{"id": line_id(line), "row": read_line(line)} for line in chosen]
    name = file.path.name
    return JSONResponse({"object": "list", "kind": kind, "file": name, "total": len(lines), "data": data})


def read_line(line: bytes) -> Any:
    """The JSON of a line; its text where it is none, as after an edit by hand."""
    try:
        return json.loads(line, parse_constant=str)  # NaN is no JSON
    except (ValueError, RecursionError):
        return line.decode(errors="replace")


async def export_votes(service: Service, request: Request) -> Response:
    file = vote_file(service, request.path_params["kind"])
    headers = {"Content-Disposition": f'attachment; filename="{request.path_params["kind"]}.jsonl"'}
    content = b"".join(await asyncio.to_thread(file.lines))
    return Response(content, media_type="application/jsonl", headers=headers)


async def delete_vote(service: Service, request: Request) -> Response:
    check_same_origin(request)
    kind, id = request.path_params["kind"], request.path_params["id"]
    if not await asyncio.to_thread(vote_file(service, kind).remove, id):
        raise ApiError(404, "there is no such vote: it was deleted, or changed in the file", "not_found", "id")
    return JSONResponse({"object": "vote", "kind": kind, "id": id, "deleted": True})
