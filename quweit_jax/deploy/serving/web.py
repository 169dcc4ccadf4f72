"""The HTTP side: OpenAI's API for one model, as an ASGI application of Starlette."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from quweit_jax.deploy.serving.engine import Answer, ClosedError, Engine, FullError, Said
from quweit_jax.deploy.serving.requests import ApiError, Asked, Offer, check, error_of, read_body
from quweit_jax.errors import InputError, needed
from quweit_jax.reading import why

with needed("to serve a model"):
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

_LARGEST = 1 << 20  # bytes of a request
_PATIENCE = 30  # seconds that a request's body may take to come
_KEPT = 75  # seconds that an idle connection is kept; clients keep theirs for less
_LEFT = 499  # the status, which nobody reads, of a request whose client has gone


class Listener:
    """What the engine says of a request's answers, for the event loop it was made in."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._said: asyncio.Queue[tuple[int, Said]] = asyncio.Queue()

    def deliver(self, number: int, said: Said) -> None:
        """May be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self._said.put_nowait, (number, said))

    async def all(self, count: int) -> AsyncIterator[tuple[int, Said]]:
        """Until so many answers are over.

        Raises:
          ApiError: one could not be ended.
        """
        while count:
            number, said = await self._said.get()
            if said.finish == "error":
                raise ApiError(500, "the server could not end the answer; ask again.")
            count -= said.finish is not None
            yield number, said


class Api:
    """The routes. engine: started. offer: what is served."""

    def __init__(self, engine: Engine, offer: Offer):
        self.engine, self.offer = engine, offer
        self._created = int(time.time())

    def application(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _tell_error,
            HTTPException: _tell_http_error,
            Exception: _tell_mistake,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: Request) -> Response:
        """Whether it works, and how much there is to do."""
        failure = self.engine.failure
        status = {"status": "ok" if failure is None else "failed", "model": self.offer.name}
        return JSONResponse(status | self.engine.counts(), 200 if failure is None else 503)

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        """The one model, by its name."""
        name = request.path_params["name"]
        if name != self.offer.name:
            message = f"expected '{self.offer.name}', which is served here, found '{name[:200]}'."
            raise ApiError(404, message, "model", "model_not_found")
        return JSONResponse(self._about())

    def _about(self) -> dict[str, Any]:
        about = {"object": "model", "created": self._created, "owned_by": "quweit_jax"}
        return {"id": self.offer.name, **about}

    async def completions(self, request: Request) -> Response:
        """Texts that are continued."""
        return await self._answer(request, "completion")

    async def chat(self, request: Request) -> Response:
        """Messages that are answered."""
        return await self._answer(request, "chat")

    async def _answer(self, request: Request, kind: str) -> Response:
        data = await _body(request)
        asked = await run_in_threadpool(lambda: check(read_body(data), kind, self.offer))
        listener = Listener()
        try:
            answers = self.engine.submit(asked.answers, listener.deliver)
        except FullError as error:
            raise error_of(429, str(error)) from None
        except ClosedError as error:
            raise error_of(503, str(error)) from None
        shape = _Shape(asked, self.offer.name)
        if asked.stream:
            events = _events(shape, listener)
            return _Stream(events, lambda: self.engine.cancel(answers))
        return await self._whole(request, shape, listener, answers)

    async def _whole(
        self, request: Request, shape: _Shape, listener: Listener, answers: list[Answer]
    ) -> Response:
        """All at once, unless the client leaves before."""
        collect = asyncio.ensure_future(shape.collect(listener))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({collect, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(collect.result()) if collect.done() else Response(status_code=_LEFT)
        finally:
            self.engine.cancel(answers)
            collect.cancel()
            gone.cancel()


class _Shape:
    """The JSON of an answer, whole or in pieces."""

    def __init__(self, asked: Asked, model: str):
        self.asked, self.chat = asked, asked.kind == "chat"
        self._head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }
        self._object = "chat.completion" if self.chat else "text_completion"
        self._made = [0] * len(asked.answers)

    async def collect(self, listener: Listener) -> dict[str, Any]:
        """The whole answer."""
        count = len(self.asked.answers)
        texts, finish = list(self.asked.echo), [""] * count
        async for number, said in listener.all(count):
            self._made[number] = said.tokens
            texts[number] += said.text
            finish[number] = said.finish or ""
        choices = [self._choice(i, texts[i], finish[i], "message") for i in range(count)]
        return {**self._named(self._object), "choices": choices, "usage": self._usage()}

    async def pieces(self, listener: Listener) -> AsyncIterator[dict[str, Any]]:
        """The answer as it comes."""
        chunk = self._object + ".chunk" * self.chat
        usage = {"usage": None} if self.asked.usage else {}

        def one(number: int, text: str, finish: str | None) -> dict[str, Any]:
            choice = self._choice(number, text, finish, "delta")
            return {**self._named(chunk), "choices": [choice], **usage}

        for number, text in enumerate(self.asked.echo):
            if self.chat or text:
                first = one(number, text, None)
                if self.chat:
                    first["choices"][0]["delta"] = {"role": "assistant", "content": ""}
                yield first
        async for number, said in listener.all(len(self.asked.answers)):
            self._made[number] = said.tokens
            if said.text:
                yield one(number, said.text, None)
            if said.finish:
                last = one(number, "", said.finish)
                if self.chat:
                    last["choices"][0]["delta"] = {}
                yield last
        if self.asked.usage:
            yield {**self._named(chunk), "choices": [], "usage": self._usage()}

    def _named(self, kind: str) -> dict[str, Any]:
        return {**self._head, "object": kind}

    def _choice(self, number: int, text: str, finish: str | None, where: str) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self.chat:
            whole = {"role": "assistant", "refusal": None} if where == "message" else {}
            said = {where: {"content": text, **whole}}
        return {"index": number, **said, "logprobs": None, "finish_reason": finish}

    def _usage(self) -> dict[str, int]:
        made, read = sum(self._made), self.asked.prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


class _Stream(StreamingResponse):
    """Events as they come; whatever ends it, `leave` is called."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._leave = leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _events(shape: _Shape, listener: Listener) -> AsyncIterator[str]:
    """Server-sent events of an answer."""
    try:
        async for piece in shape.pieces(listener):
            yield f"data: {json.dumps(piece)}\n\n"
    except ApiError as error:  # the status was sent long ago
        yield f"data: {json.dumps(error.to_json())}\n\n"
        return
    yield "data: [DONE]\n\n"


async def _gone(request: Request) -> None:
    """Until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """The bytes of a request.

    Its type must be said: a web page elsewhere can make a browser send other types here unasked.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        found = f"'{kind[:100]}'" if kind else "none"
        message = f"expected the header Content-Type: application/json, found {found}."
        raise error_of(415, message)
    data = b""
    try:
        async with asyncio.timeout(_PATIENCE):
            async for part in request.stream():
                data += part
                if len(data) > _LARGEST:
                    raise error_of(413, f"expected at most {_LARGEST:,} bytes.")
    except TimeoutError:
        raise error_of(408, f"expected the request within {_PATIENCE} seconds.") from None
    except ClientDisconnect:
        raise error_of(_LEFT, "the client has left.") from None
    return data


async def _tell_error(request: Request, error: Any) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.to_json(), error.status, headers)


async def _tell_http_error(request: Request, error: Any) -> Response:
    path = request.url.path
    message = f"{request.method} {path[:200]}: {error.detail}."
    if error.status_code == 404:
        routes = [route.path for route in request.app.routes if not route.param_convertors]
        message = f"expected one of {', '.join(routes)}, found {path[:200]}."
    if error.status_code == 405:
        asked = (error.headers or {}).get("Allow", "another method")
        message = f"{path[:200]}: expected {asked}, found {request.method}."
    told = error_of(error.status_code, message)
    return JSONResponse(told.to_json(), error.status_code, error.headers)


async def _tell_mistake(request: Request, error: Exception) -> Response:
    return JSONResponse(error_of(500, "a mistake of this server; see its log.").to_json(), 500)


class Server(uvicorn.Server):
    """Ends in order at SIGINT and SIGTERM: takes no more, and waits for what is under way; a second
    one ends it at once.

    on_start: called once it listens. on_stop: called when it takes no more.
    """

    on_start: Callable[[], None] = staticmethod(lambda: None)
    on_stop: Callable[[], None] = staticmethod(lambda: None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        self.on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for what is under way."""
        self.on_stop()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising them again when all has ended in order."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ours = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._asked) for number in ours}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, where nothing listens yet; port 0 for any that is free.

    Raises:
      InputError: there is no such host, or the port is taken.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port: expected 0 to {2**16 - 1}, found {port}.")
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except BaseException:
            made.close()
            raise
        return made
    except (OSError, UnicodeError) as error:
        said = why(error) if isinstance(error, OSError) else str(error)
        raise InputError(
            f"--host, --port: cannot listen at {host}:{port} ({said}); give others."
        ) from None


def make_server(engine: Engine, offer: Offer, grace: float) -> Server:
    """What `run(sockets=[...])` serves with. grace: seconds that answers under way have to end,
    once it is to stop.
    """
    config = uvicorn.Config(
        Api(engine, offer).application(),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=_KEPT,
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    server = Server(config)

    def stop() -> None:
        server.should_exit = True

    engine.on_failure = stop
    return server
