"""A policy behind any OpenAI-compatible server: `POST base_url/chat/completions`, as vLLM, SGLang, llama.cpp and OpenAI speak it.

    --set sample.policy=server --set sample.policy_settings='{"base_url": "http://localhost:8000/v1", "model": "Qwen/Qwen3-8B"}'

One request is one draw with its own `seed`; many are in the air at once, in the order they are given, so that draws from one prompt
meet in the server's prefix cache. What a server may do wrong, and what becomes of it:

    429, 408, 5xx, no answer in time, a dropped connection, no JSON,    asked again after a growing, jittered wait, or the wait that
    no choice                                                           Retry-After names; after `retries` of that: one error completion
    400, 413, 422                                                       an error completion: that one prompt is too long, or filtered
    any other 4xx; or nothing has worked so far; or many in a row       ModelError with what the server said: no request can work

Steps that are kept go as the assistant's own last message with `continue_final_message: true, add_generation_prompt: false`, which vLLM
and SGLang continue; OpenAI has no such thing and starts a new turn. Texts of `stop` are left out of the answer, as servers do it.

The key is read from the environment variable that `api_key_env` names: it is in no setting, log, manifest or error.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import requests

from rayward.errors import ModelError
from rayward.policies import Completion, Request, written

LONGEST_WAIT_S = 60.0  # of the growing waits between two tries
LONGEST_RETRY_AFTER_S = 600.0  # a server that asks for more has no quota left: the run ends
MANY = 8  # failed requests, without any that worked, after which no request is thought to work
MANY_IN_A_ROW = 32  # requests that used up their tries one after the other, after which the server is thought to be gone

_ONE_REQUEST = re.compile(r"context.?length|maximum context|too long|too many tokens|content.?(?:filter|policy|management)", re.IGNORECASE)


OURS = ("continue_final_message", "max_tokens", "messages", "model", "n", "seed", "stream", "temperature", "top_p")
"""Fields of a request that `extra_body` may leave out (null) and never set."""


@dataclass(frozen=True)
class ServerSettings:
    """Which server, what is drawn, and how hard it may be pressed."""

    model: str  # name of the model as the server knows it
    base_url: str = "http://localhost:8000/v1"  # up to and including /v1
    api_key_env: str = ""  # name of the environment variable that holds the key, e.g. OPENAI_API_KEY; "": no key is sent
    temperature: float = 1.0  # 0: the likeliest token
    top_p: float = 1.0  # share of the likeliest tokens that is drawn from
    max_tokens: int = 1024  # most tokens of a completion
    stop: tuple[str, ...] = ()  # texts that end a completion
    concurrency: int = 16  # requests in the air at once, per worker
    requests_per_minute: float = 0.0  # most requests begun in a minute, tries again included, per worker (0: no limit)
    retries: int = 5  # tries after the first one
    backoff_s: float = 1.0  # seconds of the first wait; every further one is twice as long
    timeout_s: float = 300.0  # seconds without a byte after which a request is given up
    extra_body: Mapping[str, Any] = field(default_factory=dict)  # more fields of the request, over ours; null leaves a field out

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature={self.temperature} must be at least 0 and top_p={self.top_p} above 0 and at most 1")
        if min(self.max_tokens, self.concurrency) < 1 or self.timeout_s <= 0:
            raise ValueError(f"max_tokens={self.max_tokens}, concurrency={self.concurrency} and timeout_s={self.timeout_s} must be above 0")
        if min(self.retries, self.backoff_s, self.requests_per_minute) < 0:
            raise ValueError("retries, backoff_s and requests_per_minute must be at least 0")
        if not isinstance(self.extra_body, Mapping):
            raise ValueError(f"extra_body={self.extra_body!r} is not an object of fields")
        ours = sorted(name for name in OURS if self.extra_body.get(name) is not None)
        if ours:
            said = "those are settings, or differ from request to request; null leaves one out"
            raise ValueError(f"extra_body sets {', '.join(ours)}: {said}")
        if not re.fullmatch(r"https?://[^\s@]+", self.base_url):
            raise ValueError("base_url is not http://HOST/v1 or https://HOST/v1 (and a name or password has no place in it)")
        if not re.fullmatch(r"(?:[A-Za-z_][A-Za-z0-9_]*)?", self.api_key_env):
            raise ValueError("api_key_env is not the name of an environment variable: put the key into one, and its name here")


class _Failed(Exception):
    """A try that may be made again, after so many seconds where the server names them."""

    def __init__(self, why: str, wait_s: float | None = None):
        super().__init__(why)
        self.wait_s = wait_s


class _Refused(Exception):
    """A request that the server will not take, however often it is asked."""


class _Reply(NamedTuple):
    completion: Completion
    kind: str  # worked | refused | gave up | its own fault


class ServerPolicy:
    """The model behind a server."""

    def __init__(self, settings: ServerSettings):
        self.settings, self.capacity = settings, settings.concurrency
        self.url = settings.base_url.rstrip("/") + "/chat/completions"
        self._key = ""
        if settings.api_key_env:
            self._key = os.environ.get(settings.api_key_env, "").strip()
            if not self._key:
                raise ModelError(f"the environment variable {settings.api_key_env} holds no key", f"export {settings.api_key_env}=...")
        self._local = threading.local()
        self._lock = threading.Lock()
        self._next_slot = 0.0  # when the next request may begin, on the monotonic clock
        self._stopping = threading.Event()
        self._worked = self._in_a_row = self._done = self._bad = 0  # requests: ever, of late; and of this call
        self._why = ""

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        done = dict(self.stream(requests))
        return [done[place] for place in range(len(requests))]

    def stream(self, requests: Iterable[Request | None]) -> Iterator[tuple[int, Completion]]:
        """(place, completion) as they come back. What is in the air when something fails is still waited for and handed over."""
        todo = enumerate(requests)
        flying: dict[Future[_Reply], int] = {}
        self._stopping.clear()
        self._done = self._bad = 0
        with ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="server-policy") as pool:
            try:
                while True:
                    while len(flying) < self.settings.concurrency and (item := next(todo, None)) is not None:
                        place, request = item
                        if request is None:
                            break
                        flying[pool.submit(self._ask, request)] = place
                    if not flying:
                        break
                    landed, _ = wait(flying, return_when=FIRST_COMPLETED)
                    for future in sorted(landed, key=flying.__getitem__):
                        reply = future.result()
                        yield flying.pop(future), reply.completion
                        self._check_health(reply)
                if not self._worked and 0 < self._bad == self._done:
                    raise self._nothing_works()
            except (Exception, KeyboardInterrupt):
                self._stopping.set()
                for future, place in flying.items():
                    if future.exception() is None and future.result().kind == "worked":
                        yield place, future.result().completion
                raise
            finally:
                self._stopping.set()

    def _check_health(self, reply: _Reply) -> None:
        """ModelError where there is no sense in asking on."""
        self._done += 1
        self._worked += reply.kind == "worked"
        self._bad += reply.kind in ("refused", "gave up")
        self._in_a_row = self._in_a_row + 1 if reply.kind == "gave up" else 0
        self._why = reply.completion.error or self._why
        if (not self._worked and self._bad >= MANY) or self._in_a_row >= MANY_IN_A_ROW:
            raise self._nothing_works()

    def _nothing_works(self) -> ModelError:
        return ModelError(
            f"{self.url}: {self._bad} of {self._done} requests failed, the last one with: {self._why}",
            f"check base_url, model={self.settings.model} and the server's log; the same command goes on where this one stopped",
        )

    # ------------------------------------------------------------------------------------------------------ one request

    def _ask(self, request: Request) -> _Reply:
        """One completion, whatever it takes."""
        body = self.body(request)
        why = "stopped"
        for attempt in range(self.settings.retries + 1):
            self._wait_for_slot()
            if self._stopping.is_set():
                break
            try:
                return _Reply(self._try(body), "worked")
            except _Failed as failed:
                why = f"{failed} ({attempt + 1} tries)"
                if attempt < self.settings.retries:
                    self._wait(failed.wait_s, attempt)
            except _Refused as refused:
                kind = "its own fault" if _ONE_REQUEST.search(str(refused)) else "refused"
                return _Reply(Completion((), "error", 0, error=str(refused)), kind)
        return _Reply(Completion((), "error", 0, error=why), "gave up")

    def body(self, request: Request) -> dict[str, Any]:
        """The request as the server gets it."""
        settings = self.settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": [{"role": m.role, "content": m.content} for m in request.prompt],
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "seed": request.seed,
        }
        if settings.stop:
            body["stop"] = list(settings.stop)
        if request.kept:
            body["messages"].append({"role": "assistant", "content": "".join(request.kept)})
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        body |= settings.extra_body
        return {name: value for name, value in body.items() if value is not None}

    def _try(self, body: Mapping[str, Any]) -> Completion:
        try:
            answer = self._session().post(self.url, json=body, timeout=self.settings.timeout_s, allow_redirects=False)
        except requests.Timeout:
            raise _Failed(f"no answer in {self.settings.timeout_s:g} s") from None
        except requests.RequestException as error:
            raise _Failed(f"no connection: {_cause(error)}") from None
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise _Failed(self._said(answer), self._retry_after(answer))
        if answer.status_code in (400, 413, 422):
            raise _Refused(self._said(answer))
        if answer.status_code != 200:
            raise ModelError(f"{self.url} says {self._said(answer)}", self._way_out_of(answer.status_code))
        return self._read(answer)

    def _read(self, answer: requests.Response) -> Completion:
        try:
            content = answer.json()
            choice = content["choices"][0]
            text, reason = choice["message"].get("content") or "", choice.get("finish_reason")
            usage = content.get("usage") or {}
            generated, prompt = (int(usage.get(name) or 0) for name in ("completion_tokens", "prompt_tokens"))
            if not isinstance(text, str):
                raise TypeError("the content is not a text")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Failed(f"an answer that is no chat completion: {self._hide(answer.text[:200])!r}") from None
        text = text.encode(errors="replace").decode()  # half a surrogate pair cannot be stored
        if reason in ("stop", "length"):
            return Completion(written(text), reason, generated, prompt)
        if reason is None:  # it does not say: a full completion was cut off
            return Completion(written(text), "length" if generated >= self.settings.max_tokens else "stop", generated, prompt)
        return Completion((), "error", generated, prompt, error=f"ended by {reason}")

    def _session(self) -> requests.Session:
        """One per thread, since a session is not safe to share; its connection stays open."""
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            if self._key:
                session.auth = self._with_key  # a header alone would give way to a .netrc
        return session

    def _with_key(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    # ---------------------------------------------------------------------------------------------------------- waiting

    def _wait_for_slot(self) -> None:
        """Until the rate limit, or the wait that the server asked of everybody, lets one more request begin."""
        with self._lock:
            start = max(time.monotonic(), self._next_slot)
            if self.settings.requests_per_minute:
                self._next_slot = start + 60 / self.settings.requests_per_minute
        self._stopping.wait(max(0.0, start - time.monotonic()))

    def _wait(self, named_s: float | None, attempt: int) -> None:
        if named_s is None:
            self._stopping.wait(min(LONGEST_WAIT_S, self.settings.backoff_s * 2**attempt) * random.uniform(0.5, 1))
        else:
            with self._lock:
                self._next_slot = max(self._next_slot, time.monotonic() + named_s)

    def _retry_after(self, answer: requests.Response) -> float | None:
        """Seconds that the server asks to wait (RFC 9110, 10.2.3: a number or a date); ModelError where they are too many."""
        given = answer.headers.get("Retry-After", "").strip()
        if not given:
            return None
        try:
            wait_s = float(given) if re.fullmatch(r"\d+(?:\.\d+)?", given) else parsedate_to_datetime(given).timestamp() - time.time()
        except ValueError:
            return None
        if wait_s > LONGEST_RETRY_AFTER_S:
            raise ModelError(
                f"{self.url} asks to wait {wait_s:,.0f} s: {self._said(answer)}", "run the same command later: what was answered is kept"
            )
        return max(0.0, wait_s)

    # ------------------------------------------------------------------------------------------------------------ words

    def _said(self, answer: requests.Response) -> str:
        """Status and message of an answer, whatever form its body has, without the key."""
        message: Any = None
        try:
            content = answer.json()
            message = content.get("error", content.get("message", content.get("detail"))) if isinstance(content, Mapping) else content
            message = message.get("message", message) if isinstance(message, Mapping) else message
        except ValueError:
            message = re.sub(r"<[^>]*>", " ", answer.text)
        return self._hide(f"{answer.status_code} {answer.reason}: {' '.join(str(message or 'nothing').split())[:300]}")

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text

    def _way_out_of(self, status: int) -> str:
        if status in (401, 403):
            name = self.settings.api_key_env
            return f"is the key in {name} the right one?" if name else "name the variable that holds the key: api_key_env=..."
        if status == 404:
            return f"does base_url end in /v1, and does the server know model={self.settings.model}?"
        return "what it asks for may fit into extra_body"


def _cause(error: BaseException) -> str:
    """The innermost words of a chain of wrapped errors, without addresses of objects."""
    while error.__context__ is not None or error.__cause__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}"
