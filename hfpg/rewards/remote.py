"""A judge over HTTP.

    POST url    {"prompts": […], "completions": […], "<column>": […]}
    200         {"scores": [0.7, null, …]}      one finite number or null (cannot judge) per completion

Whatever else happens is an error and never a score: after bounded retries `RemoteError` says in one sentence what the
server did last. It is a coroutine: batches overlap each other, other async judges and whatever the judge overlaps.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import ipaddress
import json
import logging
import math
import os
import random
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from hfpg.config import ConfigError, require
from hfpg.rewards.output import LARGEST_SCORE, RewardError
from hfpg.rewards.rules import optional
from hfpg.types import Text


RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})  # what may be gone in a moment


class RemoteError(RewardError):
    """The remote judge gave no scores."""


class _Attempt(Exception):
    """One request gave no scores: why, whether another may, and how long the server asks to wait."""

    def __init__(self, why: str, *, again: bool = True, wait: float = 0.0):
        super().__init__(why)
        self.again, self.wait = again, wait


class _Queries(logging.Filter):
    """Takes the query of an address, which may hold a secret, out of what httpx2 logs of every request."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}  # by the address as it is logged

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record passes."""
        if isinstance(record.args, tuple):
            record.args = tuple(self.shown.get(str(value), value) for value in record.args)
        return True


QUERIES = _Queries()


class RemoteJudge:
    """A reward function that asks a server.

    Args:
        url: https, or http to this machine.
        columns: columns of the data set that are sent beside prompts and completions.
        token_env: environment variable with a token, sent as `Authorization: Bearer …`; it stands in no message.
        batch_size: completions of one request.
        concurrency: requests at a time.
        timeout: seconds of one attempt, from the first byte sent to the last one read.
        retries: attempts after the first.
        backoff: seconds before the first retry; doubled for each further one, times a random factor in [0.5, 1.5).
        max_wait: longest pause before a retry, also where the server asks for more (Retry-After).
        deadline: seconds of one call: all of its batches with their retries and pauses.
        max_bytes: largest answer that is read.
        allow_insecure: http to other machines, too: anybody on the way can read and change what is sent.
        name: what scores are logged under.
        sleep, random, clock: for tests.
    Raises:
        ConfigError: the address or the token cannot be used.
    """

    def __init__(
        self,
        url: str,
        *,
        columns: Sequence[str] = (),
        token_env: str | None = None,
        batch_size: int = 64,
        concurrency: int = 4,
        timeout: float = 30.0,
        retries: int = 4,
        backoff: float = 0.5,
        max_wait: float = 30.0,
        deadline: float = 900.0,
        max_bytes: int = 1 << 20,
        allow_insecure: bool = False,
        name: str = "remote",
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        random: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ):
        self.http = optional("httpx2", "httpx2", "remote", "a remote judge")
        self.url, self.shown, self.local = url, *_checked_url(url, allow_insecure)
        try:
            QUERIES.shown[str(self.http.URL(url))] = self.shown
        except self.http.InvalidURL as error:
            raise ConfigError(f"the remote judge's url {self.shown!r} cannot be read: {error}") from None
        logging.getLogger("httpx2").addFilter(QUERIES)  # once, however often it is said
        self.headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if token_env is not None:
            self.headers["Authorization"] = f"Bearer {_token(token_env)}"
        for key, value in dict(batch_size=batch_size, concurrency=concurrency, max_bytes=max_bytes).items():
            require(isinstance(value, int) and value >= 1, f"{key}={value!r} must be a whole number, at least 1")
        require(isinstance(retries, int) and retries >= 0, f"retries={retries!r} must be a whole number, at least 0")
        for key, seconds in dict(timeout=timeout, deadline=deadline).items():
            require(0 < seconds < math.inf, f"{key}={seconds} must be a number of seconds above 0")
        require(0 <= backoff < math.inf, f"backoff={backoff} must be a number of seconds, at least 0")
        require(0 <= max_wait < math.inf, f"max_wait={max_wait} must be a number of seconds, at least 0")
        require(not isinstance(columns, str), f"columns={columns!r} is one text; give a list, such as [{columns!r}]")
        self.columns, self.batch_size, self.concurrency = tuple(columns), batch_size, concurrency
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.max_wait, self.deadline, self.max_bytes = max_wait, deadline, max_bytes
        self.sleep, self.random, self.clock = sleep, random, clock
        self.tls = ssl.create_default_context() if urlsplit(url).scheme == "https" else False
        self.__name__ = name

    def __str__(self) -> str:
        """How messages call it."""
        return f"the remote judge {self.__name__!r} at {self.shown}"

    async def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        """One score per completion; None where the server says null.

        Raises:
            RemoteError: a batch got no scores in 1 + retries attempts, or not all did before the deadline; the other
                batches are given up.
        """
        missing = [c for c in self.columns if c not in columns]
        if missing:
            raise RemoteError(f"{self} is sent the columns {missing}, which the data set lacks")
        everything = dict(prompts=prompts, completions=completions, **{c: columns[c] for c in self.columns})
        starts = range(0, len(completions), self.batch_size)
        slots, failures = asyncio.Semaphore(self.concurrency), ["none failed"]
        # an environment's proxy is for other machines; a client lives in one event loop, and each call has its own
        async with self.http.AsyncClient(
            headers=self.headers, timeout=self.timeout, verify=self.tls, trust_env=not self.local
        ) as client:

            async def one(start: int) -> list[float | None]:
                batch = {key: values[start : start + self.batch_size] for key, values in everything.items()}
                async with slots:
                    return await self._batch(client, batch, failures)

            waiting = [asyncio.ensure_future(one(start)) for start in starts]
            try:
                async with asyncio.timeout(self.deadline):
                    parts = await asyncio.gather(*waiting)
            except TimeoutError:
                done = sum(task.done() and not task.cancelled() for task in waiting)
                raise RemoteError(
                    f"{self} scored {done} of {len(waiting)} batches in {self.deadline:g} s (deadline=); the last "
                    f"failed attempt: {failures[-1]}"
                ) from None
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
        return [score for part in parts for score in part]

    async def _batch(self, client: Any, batch: dict[str, list], failures: list[str]) -> list[float | None]:
        """The scores of one batch, after as many attempts as it takes and may take; `failures` gets what failed."""
        count = len(batch["completions"])
        try:
            body = json.dumps(batch, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RemoteError(f"{self} cannot be sent this batch as JSON: {error}") from None
        for attempt in range(self.retries + 1):
            try:
                return await self._attempt(client, body, count)
            except _Attempt as failed:
                failures.append(f"it {failed}")
                if attempt == self.retries or not failed.again:
                    tried = f" ({attempt + 1} attempts)" if attempt else ""
                    raise RemoteError(f"{self} {failed}{tried}") from None
                pause = self.backoff * 2.0 ** min(attempt, 32) * (0.5 + self.random())
                await self.sleep(min(self.max_wait, max(pause, failed.wait)))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, client: Any, body: bytes, count: int) -> list[float | None]:
        try:
            async with (
                asyncio.timeout(self.timeout),  # httpx's own limits start anew with every byte
                client.stream("POST", self.url, content=body, follow_redirects=False) as response,
            ):
                self._check_status(response)
                return parse_scores(await self._read(response), count)
        except (TimeoutError, self.http.TimeoutException):
            raise _Attempt(f"did not answer within {self.timeout:g} s") from None
        except self.http.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                told = "shows a certificate that is not trusted; name its authority in SSL_CERT_FILE"
                raise _Attempt(told, again=False) from None
            raise _Attempt("cannot be reached") from None
        except self.http.RequestError as error:
            raise _Attempt(f"broke the connection ({type(error).__name__})") from None

    def _check_status(self, response: Any) -> None:
        status = response.status_code
        if status == 200:
            return
        if 300 <= status < 400:
            raise _Attempt(f"answered {status}: redirects are not followed; give its final address", again=False)
        if status in (401, 403):
            raise _Attempt(f"answered {status}: it wants a token, or another one (token_env=)", again=False)
        wait = retry_after(response.headers.get("Retry-After", ""), self.clock())
        raise _Attempt(f"answered {status}", again=status in RETRIED, wait=wait)

    async def _read(self, response: Any) -> bytes:
        """The body, read no further than max_bytes."""
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _Attempt("sent a compressed answer, which was not asked for", again=False)
        body = bytearray()
        async with contextlib.aclosing(response.aiter_raw()) as pieces:
            async for piece in pieces:
                body += piece
                if len(body) > self.max_bytes:
                    raise _Attempt(f"sent more than {self.max_bytes} bytes (max_bytes=)", again=False)
        return bytes(body)


def parse_scores(body: bytes, count: int) -> list[float | None]:
    """The scores in an answer; `_Attempt` where it is anything but {"scores": [count finite numbers or nulls]}."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise _Attempt(f"answered with what is no JSON: {body[:60]!r}") from None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise _Attempt(f'answered {body[:60]!r}; it must answer {{"scores": [one per completion]}}')
    if len(scores) != count:
        raise _Attempt(f"gave {len(scores)} scores for {count} completions")
    for i, score in enumerate(scores):
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if score is not None and not (number and abs(score) <= LARGEST_SCORE):
            raise _Attempt(f"gave {score!r:.60} as score {i} of a batch; a score is a finite number or null")
    return [None if score is None else float(score) for score in scores]


def retry_after(value: str, now: float) -> float:
    """Seconds that a Retry-After header asks for, given as a number or as a date; 0 where it says nothing clear."""
    if re.fullmatch(r"\d{1,9}", value.strip(), re.ASCII):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _checked_url(url: str, allow_insecure: bool) -> tuple[str, bool]:
    """The address as messages show it (a query may hold a secret), and whether it is this machine."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ConfigError("the remote judge's url cannot be read; give one as https://example.org/score") from None
    require(
        parts.username is None and parts.password is None,
        "the remote judge's url holds a password; put a token into an environment variable and name it in token_env=",
    )
    shown = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}{parts.path}"
    require(
        parts.scheme in ("http", "https") and bool(host),
        f"the remote judge's url {shown!r} is no web address; give one as https://example.org/score",
    )
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    require(
        parts.scheme == "https" or local or allow_insecure,
        f"the remote judge {shown} is on another machine and not https: anybody on the way could read the texts and "
        "change the scores; use https, or allow_insecure=True",
    )
    return shown, local


def _token(variable: str) -> str:
    token = os.environ.get(variable, "").strip()
    require(bool(token), f"token_env={variable!r}: the environment variable {variable} is not set")
    require(
        re.fullmatch(r"[\x21-\x7e]+", token) is not None,
        f"token_env={variable!r}: the value of {variable} has spaces, line breaks or letters outside ASCII in it",
    )
    return token
