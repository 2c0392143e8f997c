"""OpenAI's chat completion as far as one question about one image goes: its body read, its responses made."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unimed.notice import NOTICE
from unimed.serve.settings import Refused, Settings
from unimed.tasks import TASKS

DEFAULT_TOKENS = 100
_TAG = re.compile(r"\s*\[([A-Za-z_]\w*)\]\s*")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Url(_Strict):
    url: str
    detail: str | None = None


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: _Url


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Annotated[_Text | _Image, Field(discriminator="type")]], Field(max_length=64)] | None = None
    name: str | None = None
    refusal: Any = None

    def parts(self) -> tuple[str, list[str]]:
        """The text, and the URLs of the images."""
        if not isinstance(self.content, list):
            return self.content or "", []
        texts = [part.text for part in self.content if isinstance(part, _Text)]
        return "\n".join(texts), [part.image_url.url for part in self.content if isinstance(part, _Image)]


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Any = None


class _Chat(_Strict):
    """The fields in use, then those of OpenAI's that change nothing here: decoding is greedy."""

    messages: list[_Message] = Field(min_length=1, max_length=256)
    model: str | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: Literal[1] | None = None
    task: str | None = None
    plane: Literal["axial", "coronal", "sagittal"] | None = None
    slice: int | None = Field(None, ge=0, le=10**6)
    window: tuple[float, float] | None = None
    response_format: dict[str, Any] | None = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    seed: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    user: Any = None
    safety_identifier: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None

    @model_validator(mode="after")
    def _of_use(self) -> _Chat:
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise ValueError("response_format: only {'type': 'text'} is answered")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError("window: the first number must be below the second")
        return self


@dataclass(frozen=True)
class Ask:
    """A body that was read: the request for the worker, without its image, whose URL is beside it. model: as named, or None."""

    fields: dict[str, Any]
    url: str | None
    stream: bool
    usage: bool
    model: str | None
    notes: tuple[str, ...]


def read(body: bytes, settings: Settings) -> Ask:
    """What a body asks; a Refused where it cannot be answered."""
    chat = _chat(body)
    message, text, urls = _last(chat)
    notes = _unused(chat, message)
    if len(urls) > 1:
        raise Refused(400, f"messages: {len(urls)} images in one message, a question has one or none", param="messages")
    task, question = _task(chat.task, text)
    if task is None:
        task = "vqa" if urls or _earlier(chat, message) else "qa"
    if not urls and TASKS[task].needs_image:
        urls = _earlier(chat, message)
    if len(question) > settings.max_question:
        raise Refused(400, f"messages: a question of {len(question)} characters, at most {settings.max_question}", param="messages")
    tokens = chat.max_completion_tokens or chat.max_tokens or min(DEFAULT_TOKENS, settings.max_tokens)
    if tokens > settings.max_tokens:
        raise Refused(400, f"max_tokens is {tokens}, at most {settings.max_tokens} are made", param="max_tokens")
    fields = {"question": question, "task": task, "plane": chat.plane or "axial", "slice": chat.slice, "window": chat.window}
    usage = bool(chat.stream_options and chat.stream_options.include_usage)
    return Ask(fields | {"max_new_tokens": tokens}, urls[0] if urls else None, bool(chat.stream), usage, chat.model, notes)


def _chat(body: bytes) -> _Chat:
    try:
        given = json.loads(body, parse_constant=_no_constant)
        if not isinstance(given, dict):
            raise Refused(400, "the body must be a JSON object", code="invalid_json")
        chat = _Chat.model_validate(given)
        for message in chat.messages:
            message.parts()[0].encode()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        what = first["msg"].removeprefix("Value error, ")
        raise Refused(400, f"{where}: {what}" if where else what, param=where or None) from None
    except (UnicodeEncodeError, UnicodeDecodeError):
        raise Refused(400, "the body is not valid UTF-8", code="invalid_json") from None
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not valid JSON", code="invalid_json") from None
    return chat


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _last(chat: _Chat) -> tuple[int, str, list[str]]:
    """The place of the last message, which must be the user's, its text and its images."""
    at = len(chat.messages) - 1
    if chat.messages[at].role != "user":
        raise Refused(400, "messages: the last one must be of the role user", param="messages")
    return at, *chat.messages[at].parts()


def _earlier(chat: _Chat, before: int) -> list[str]:
    """The image that a dialogue is about: the newest of the earlier messages."""
    for message in reversed(chat.messages[:before]):
        if message.role == "user" and (urls := message.parts()[1]):
            return urls[-1:]
    return []


def _unused(chat: _Chat, last: int) -> tuple[str, ...]:
    roles = {message.role for message in chat.messages[:last]}
    notes = ("system message not used",) if roles & {"system", "developer"} else ()
    return (*notes, "earlier messages not used: the model takes one question") if roles & {"user", "assistant"} else notes


def _task(named: str | None, text: str) -> tuple[str | None, str]:
    """The task, by the field or by a leading [tag], and the question without the tag."""
    found = _TAG.match(text)
    tag = found[1] if found else None
    for one in (named, tag if named is None else None):
        if one is not None and one not in TASKS:
            raise Refused(400, f"task {one[:40]!r}: no such task; valid are {', '.join(TASKS)}", param="task")
    if named is not None and tag in TASKS and tag != named:
        raise Refused(400, f"task: the field says {named}, the question begins with [{tag}]", param="task")
    return named or tag, text[found.end() :].strip() if found and tag in TASKS else text.strip()


def completion(key: str, model: str, ask: Ask, answer: dict[str, Any]) -> dict[str, Any]:
    """The whole response to a question."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer["text"], "refusal": None},
        "logprobs": None,
        "finish_reason": answer["finish"],
        "unimed": _details(ask, answer),
    }
    return {**_head(key, model, "chat.completion"), "choices": [choice], "usage": _usage(answer)}


def _head(key: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{key}", "object": kind, "created": int(time.time()), "model": model}


def _usage(answer: dict[str, Any]) -> dict[str, int]:
    made, given = answer["tokens"], answer["prompt_tokens"]
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": made + given}


def _details(ask: Ask, answer: dict[str, Any]) -> dict[str, Any]:
    names = ("task", "box", "confidence", "gates", "kind")
    return {name: answer[name] for name in names} | {"notes": [*ask.notes, *answer["notes"]], "notice": NOTICE}


class Chunks:
    """The events of one streamed response, as bytes of text/event-stream."""

    def __init__(self, key: str, model: str, ask: Ask) -> None:
        self._head, self._ask = _head(key, model, "chat.completion.chunk"), ask

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        usage = {"usage": None} if self._ask.usage else {}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
        return event({**self._head, "choices": [choice], **usage})

    def start(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def end(self, answer: dict[str, Any]) -> bytes:
        last = self._chunk({}, answer["finish"], unimed=_details(self._ask, answer))
        usage = event({**self._head, "choices": [], "usage": _usage(answer)}) if self._ask.usage else b""
        return last + usage + b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
