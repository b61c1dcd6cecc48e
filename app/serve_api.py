"""The endpoints of `trueup serve`, in OpenAI's format (https://platform.openai.com/docs/api-reference/chat)."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import iterate_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from trueup.app.conversation import in_words, prompt_of
from trueup.app.generation import Generation, ReplySettings, stream
from trueup.app.models_pool import Loaded
from trueup.app.ui import is_loopback
from trueup.recipes.errors import TrueupError, UsageError

AT_ONCE = 4  # replies that are generated at a time; the others wait
WAITING = 64  # requests that may wait; who comes then is told to try later
Json = dict[str, Any]


class TextPart(BaseModel):
    """A part of a message; pictures and sounds are refused."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Json:
        """As the chat template takes it."""
        parts = self.content if isinstance(self.content, str) else "".join(one.text for one in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": parts}


class StreamOptions(BaseModel):
    """What a stream brings besides the text."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """What of OpenAI's request decides the reply here; `top_k` and `repetition_penalty` are vLLM's names.

    The defaults are OpenAI's. What would change the reply and cannot be done is refused; the rest is ignored.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    tools: None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    def stops(self) -> list[str]:
        """Texts that end the reply."""
        listed = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in listed if text]

    def settings(self) -> ReplySettings:
        """How to sample. Raises UsageError for what is out of range."""
        longest = self.max_completion_tokens or self.max_tokens or 1 << 20  # or as far as the context goes
        return ReplySettings(
            max_new_tokens=longest,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            seed=uuid.uuid4().int % 2**63 if self.seed is None else self.seed,
            repetition_penalty=self.repetition_penalty,
        )


class Turns:
    """A few replies at a time, while others wait: `async with turns`."""

    def __init__(self) -> None:
        self._now = asyncio.Semaphore(AT_ONCE)
        self._count = 0

    @property
    def full(self) -> bool:
        """Whether so many wait that one more had better come later."""
        return self._count >= AT_ONCE + WAITING

    async def __aenter__(self) -> None:
        self._count += 1
        try:
            await self._now.acquire()
        except BaseException:  # the client went away while it waited
            self._count -= 1
            raise

    async def __aexit__(self, *error: object) -> None:
        self._count -= 1
        self._now.release()


def build_api(loaded: Loaded, host: str) -> FastAPI:
    """The server's application, for one model."""
    api = FastAPI(title="trueup serve", docs_url=None, redoc_url=None, openapi_url=None)
    if is_loopback(host):  # or a page in a browser here could reach it under a name of its own
        api.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]"])
    turns, started = Turns(), int(time.time())

    @api.exception_handler(TrueupError)
    def refused(request: Request, error: TrueupError) -> JSONResponse:
        return _error(400, str(error))

    @api.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        places = [".".join(map(str, one["loc"][1:])) for one in error.errors()]
        said = [f"{place}: {one['msg']}" for place, one in zip(places, error.errors(), strict=True)]
        return _error(400, "; ".join(said), places[0])

    @api.get("/v1/models")
    def models() -> Json:
        one = {"id": loaded.name, "object": "model", "created": started, "owned_by": "trueup"}
        return {"object": "list", "data": [one | {"identity": loaded.identity}]}

    @api.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, connection: Request) -> Response:
        if asked.model != loaded.name:
            return _error(404, f"there is no model {asked.model!r} here, but {loaded.name!r}", "model")
        if asked.messages[-1].role != "user":
            raise UsageError("messages: the last must be the user's")
        if turns.full:
            return _error(429, f"{WAITING} requests are waiting already; try again later")
        prompt = prompt_of(loaded, "", [message.plain() for message in asked.messages])
        reply = Generation(loaded.model, loaded.tokenizer, prompt, asked.settings(), asked.stops())
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            events = _events(loaded.name, reply, turns, usage)
            return StreamingResponse(events, media_type="text/event-stream")
        async with turns:
            async for _ in iterate_in_threadpool(stream([reply])):
                if await connection.is_disconnected():
                    break
        if reply.error:
            return _error(500, in_words(reply.error))
        return JSONResponse(_completion(loaded.name, reply))

    return api


def _error(status: int, message: str, param: str | None = None) -> JSONResponse:
    kind = (
        "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
    )
    code = "model_not_found" if status == 404 else None
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, {"Retry-After": "1"} if status == 429 else None)


def _completion(model: str, reply: Generation) -> Json:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.text},
        "finish_reason": reply.finish,
        "logprobs": None,
    }
    return _frame(model, "chat.completion") | {"choices": [choice], "usage": _usage(reply)}


def _frame(model: str, kind: str) -> Json:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _usage(reply: Generation) -> Json:
    asked, said = len(reply.prompt_ids), len(reply.ids)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


async def _events(model: str, reply: Generation, turns: Turns, usage: bool) -> AsyncIterator[str]:
    """Server-sent events; a client that goes away closes this, and ends the reply."""
    frame = _frame(model, "chat.completion.chunk")

    def event(delta: Json, finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event(frame | {"choices": [choice]})

    async with turns:
        sent = 0
        yield event({"role": "assistant", "content": ""})
        async for _ in iterate_in_threadpool(stream([reply])):
            text = reply.text
            if len(text) > sent:
                yield event({"content": text[sent:]})
                sent = len(text)
    if reply.error:
        yield _event({"error": {"message": in_words(reply.error), "type": "server_error", "code": None}})
        return
    yield event({}, reply.finish)
    if usage:
        yield _event(frame | {"choices": [], "usage": _usage(reply)})
    yield "data: [DONE]\n\n"


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
