"""The remote judge against a server on this machine: every answer that is no score is an error, in one sentence."""

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hfpg.config import ConfigError
from hfpg.rewards import Judge, RemoteError, RemoteJudge, RewardError
from hfpg.rewards.remote import parse_scores, retry_after


PROMPTS = ["p", "pp", "ppp", "pppp", "ppppp"]
COMPLETIONS = ["c", "cc", "ccc", "cccc", "ccccc"]
Reply = Callable[[BaseHTTPRequestHandler, dict], None]


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None, said: int = -1
) -> None:
    handler.send_response(status)
    for key, value in (headers or {}).items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", str(len(body) if said < 0 else said))
    handler.end_headers()
    handler.wfile.write(body)


def answer(status: int, body: bytes = b"", **headers: str) -> Reply:
    return lambda handler, asked: send(handler, status, body, {k.replace("_", "-"): v for k, v in headers.items()})


def scores(handler: BaseHTTPRequestHandler, asked: dict) -> None:
    """The right answer: the length of each completion, null for the third letter."""
    found = [None if c == "ccc" else len(c) / 2 for c in asked["completions"]]
    send(handler, 200, json.dumps({"scores": found}).encode())


class Server(ThreadingHTTPServer):
    """Answers by the script, then rightly; `asked` holds what it was sent."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self) -> None:
        self.script: list[Reply] = []
        self.asked: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.busy, self.most, self.lock = 0, 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.asked.append(asked)
                    server.headers.append(dict(self.headers))
                    reply = server.script.pop(0) if server.script else scores
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                try:
                    reply(self, asked)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with server.lock:
                        server.busy -= 1

            def log_message(self, *args: Any) -> None:  # house: a server of tests is silent
                """Say nothing: the base class writes a line a request to stderr."""

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/score"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


class Pauses(list):
    """Remembers how long was slept and does not sleep."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)


def ask(server: Server, pauses: Pauses | None = None, **settings: Any) -> list[float | None]:
    sleep = Pauses() if pauses is None else pauses
    judge = RemoteJudge(server.url, **({"sleep": sleep, "random": lambda: 0.5} | settings))
    return asyncio.run(judge(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=[[1]] * 5, answer=[1] * 5))


def refusal(server: Server, **settings: Any) -> str:
    with pytest.raises(RemoteError) as caught:
        ask(server, **settings)
    text = str(caught.value)
    begin = f"the remote judge 'remote' at {server.url} "
    assert text.startswith(begin)
    return text.removeprefix(begin)


RIGHT = [0.5, 1.0, None, 2.0, 2.5]


# ── it works


def test_scores_come_back_in_order_and_only_what_is_named_is_sent(server: Server):
    assert ask(server) == RIGHT
    assert server.asked == [{"prompts": PROMPTS, "completions": COMPLETIONS}]
    assert ask(server, columns=["answer"], batch_size=2) == RIGHT
    assert sorted(len(a["completions"]) for a in server.asked[1:]) == [1, 2, 2]
    assert all(a["answer"] == [1] * len(a["prompts"]) for a in server.asked[1:])
    judge = RemoteJudge(server.url)
    assert asyncio.run(judge(prompts=[], completions=[])) == []
    message = [[{"role": "user", "content": "é\ud800"}]]
    assert asyncio.run(judge(prompts=message, completions=["x"])) == [0.5] and server.asked[-1]["prompts"] == message


def test_requests_overlap_up_to_a_limit(server: Server):
    def slow(handler: BaseHTTPRequestHandler, asked: dict) -> None:
        time.sleep(0.2)
        scores(handler, asked)

    server.script = [slow] * 5
    assert ask(server, batch_size=1, concurrency=3) == RIGHT
    assert server.most == 3


def test_it_is_a_reward_of_hfpg_and_its_failure_is_named(server: Server):
    def local(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    judge = Judge([RemoteJudge(server.url, retries=0, name="far"), local])
    assert judge.names == ["far", "local"] and judge.functions[0].is_async
    scored = judge(PROMPTS, COMPLETIONS, [[1]] * 5, {})
    assert scored.by_function["far"] == RIGHT and scored.scores.tolist() == [1.5, 2, 1, 3, 3.5]
    server.script = [answer(500)]
    with pytest.raises(RewardError, match=r"'far'.*answered 500"):
        judge(PROMPTS, COMPLETIONS, [[1]] * 5, {})


def test_trl_awaits_it_under_its_name(server: Server):
    utils = pytest.importorskip("trl.trainer.utils", reason="the test extra installs it")
    judge = RemoteJudge(server.url, name="far")
    assert utils.is_async_callable(judge) and utils.get_callable_name(judge) == "far"


# ── it tries again


def test_a_server_that_recovers_is_asked_again_with_growing_pauses(server: Server):
    server.script = [answer(500, b"oops"), answer(503), answer(429)]
    assert ask(server, pauses := Pauses()) == RIGHT
    assert pauses == [0.5, 1, 2] and len(server.asked) == 4  # 0.5 · 2^n · (0.5 + 0.5)


def test_pauses_are_spread_and_bounded(server: Server):
    server.script = [answer(500)] * 4
    draws = iter([0.0, 0.999, 0.25, 0.5])
    assert ask(server, pauses := Pauses(), random=lambda: next(draws), backoff=2, max_wait=6.5) == RIGHT
    assert pauses == pytest.approx([1, 5.996, 6, 6.5])


def test_retry_after_is_honoured_and_bounded(server: Server):
    now = 1_800_000_000.0
    server.script = [
        answer(429, Retry_After="7"),
        answer(503, Retry_After=formatdate(now + 9, usegmt=True)),
        answer(429, Retry_After="3600"),
        answer(429, Retry_After="soon"),
    ]
    assert ask(server, pauses := Pauses(), clock=lambda: now) == RIGHT
    assert pauses == pytest.approx([7, 9, 30, 4])
    assert retry_after(formatdate(now - 9, usegmt=True), now) == 0 and retry_after("-1", now) == 0
    assert retry_after("9" * 30, now) == 0 and retry_after("", now) == 0 and retry_after("٣", now) == 0


def test_it_gives_up_after_the_last_attempt_and_says_what_came_last(server: Server):
    server.script = [answer(500)] * 2 + [answer(502)] * 8
    assert refusal(server, retries=2) == "answered 502 (3 attempts)"
    assert len(server.asked) == 3


# ── what is no score


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>busy</html>", r"answered with what is no JSON: b'<html>busy</html>'"),
        (b'{"scores": [1, 2', r"answered with what is no JSON: "),
        (b"\xff\xfe\x00", r"answered with what is no JSON: "),
        (b"[" * 100_000, r"answered with what is no JSON: "),
        (b'{"scores": [' + b"9" * 9999 + b",1,1,1,1]}", r"answered with what is no JSON: "),
        (b"[1,2,3,4,5]", "answered b'[1,2,3,4,5]'; it must answer {\"scores\": [one per completion]}"),
        (b'{"scores": 1}', 'it must answer {"scores": [one per completion]}'),
        (b'{"scores": [1,2]}', "gave 2 scores for 5 completions"),
        (b'{"scores": [1,2,3,4,5,6]}', "gave 6 scores for 5 completions"),
        (b'{"scores": [1,NaN,3,4,5]}', "gave nan as score 1 of a batch; a score is a finite number or null"),
        (b'{"scores": [1,2,1e999,4,5]}', "gave inf as score 2 of a batch"),
        (b'{"scores": [1,2,3,-1e39,5]}', "gave -1e+39 as score 3 of a batch"),
        (b'{"scores": ["1",2,3,4,5]}', "gave '1' as score 0 of a batch"),
        (b'{"scores": [1,2,3,4,true]}', "gave True as score 4 of a batch"),
        (b'{"scores": [[1],2,3,4,5]}', "gave [1] as score 0 of a batch"),
    ],
)
def test_an_answer_that_is_no_score_is_asked_for_again_and_then_refused(server: Server, body: bytes, said: str):
    server.script = [answer(200, body)] * 2
    text = refusal(server, retries=1)
    assert said in text and text.endswith("(2 attempts)") and len(server.asked) == 2
    server.script = [answer(200, body)]
    assert ask(server) == RIGHT


def test_numbers_and_nulls_are_scores():
    assert parse_scores(b'{"scores": [1, -2.5, null], "more": "ignored"}', 3) == [1.0, -2.5, None]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (answer(404), "answered 404"),
        (answer(201, b'{"scores": []}'), "answered 201"),
        (answer(302, Location="/"), "answered 302: redirects are not followed; give its final address"),
        (answer(401), "answered 401: it wants a token, or another one (token_env=)"),
        (answer(200, b"\x1f\x8b", Content_Encoding="gzip"), "sent a compressed answer, which was not asked for"),
        (answer(200, b'{"scores": [' + b" " * 999), "sent more than 500 bytes (max_bytes=)"),
    ],
)
def test_what_cannot_get_better_is_not_asked_for_again(server: Server, reply: Reply, said: str):
    server.script = [reply]
    assert refusal(server, max_bytes=500) == said and len(server.asked) == 1


def test_an_endless_answer_is_not_read_to_its_end(server: Server):
    sent = []

    def endless(handler: BaseHTTPRequestHandler, asked: dict) -> None:
        send(handler, 200, b"[", said=10**10)
        while len(sent) < 10_000:
            handler.wfile.write(b" " * 65536)
            sent.append(1)

    server.script = [endless]
    assert refusal(server) == "sent more than 1048576 bytes (max_bytes=)" and len(sent) < 10_000


def test_one_failed_batch_ends_the_others(server: Server):
    server.script = [answer(404)]
    begin = time.monotonic()
    assert refusal(server, batch_size=1, concurrency=1) == "answered 404"
    assert time.monotonic() - begin < 5 and len(server.asked) < 5


# ── nobody there


def test_a_hang_and_a_slow_drip_end_at_the_timeout(server: Server):
    free = threading.Event()

    def hang(handler: BaseHTTPRequestHandler, asked: dict) -> None:
        free.wait(20)

    def drip(handler: BaseHTTPRequestHandler, asked: dict) -> None:
        send(handler, 200, b"[", said=1000)
        while not free.wait(0.05):
            handler.wfile.write(b" ")

    server.script = [hang, drip]
    begin = time.monotonic()
    assert refusal(server, timeout=0.4, retries=1) == "did not answer within 0.4 s (2 attempts)"
    assert time.monotonic() - begin < 5
    free.set()


def test_a_call_ends_at_its_deadline_whatever_its_batches_and_retries_would_wait_for(server: Server):
    free = threading.Event()

    def drip(handler: BaseHTTPRequestHandler, asked: dict) -> None:
        send(handler, 200, b"[", said=10**6)
        while not free.wait(0.02):
            handler.wfile.write(b" ")

    server.script = [scores, scores, answer(503)] + [drip] * 9
    begin = time.monotonic()
    said = refusal(server, batch_size=1, concurrency=1, timeout=20, deadline=2, retries=9)
    assert said == "scored 2 of 5 batches in 2 s (deadline=); the last failed attempt: it answered 503"
    server.script = [drip]
    said = refusal(server, deadline=0.3)
    assert said == "scored 0 of 1 batches in 0.3 s (deadline=); the last failed attempt: none failed"
    assert time.monotonic() - begin < 15
    free.set()


def test_a_refused_and_a_broken_connection(server: Server):
    def cut(handler: BaseHTTPRequestHandler, asked: dict) -> None:
        send(handler, 200, b'{"sco', said=100)

    server.script = [cut]
    assert refusal(server, retries=0) == "broke the connection (RemoteProtocolError)"
    closed = Server()
    closed.server_close()
    pauses = Pauses()
    assert refusal(closed, pauses=pauses, retries=3) == "cannot be reached (4 attempts)" and len(pauses) == 3


def test_a_certificate_that_is_not_trusted_is_said_once(server: Server, monkeypatch: pytest.MonkeyPatch):
    httpx2 = pytest.importorskip("httpx2")

    def untrusted(*args: Any, **kwargs: Any) -> None:
        raise httpx2.ConnectError(
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
        )

    monkeypatch.setattr(httpx2.AsyncClient, "stream", untrusted)
    said = refusal(server, retries=3)
    assert said.startswith("shows a certificate that is not trusted; name its authority in SSL_CERT_FILE")


def test_columns_are_a_list():
    with pytest.raises(ConfigError, match=r"columns='answer' is one text; give a list, such as \['answer'\]"):
        RemoteJudge("http://localhost:1", columns="answer")


def test_a_batch_that_is_no_json_is_refused(server: Server):
    judge = RemoteJudge(server.url, columns=["answer"])
    for value, why in ((float("nan"), "not JSON compliant"), (object(), "not JSON serializable")):
        with pytest.raises(RemoteError, match=f"cannot be sent this batch as JSON: .*{why}"):
            asyncio.run(judge(prompts=["p"], completions=["c"], answer=[value]))
    with pytest.raises(RemoteError, match=r"is sent the columns \['answer'\], which the data set lacks"):
        asyncio.run(judge(prompts=["p"], completions=["c"]))


# ── secrets and addresses


@pytest.mark.parametrize("query", ["?key=s3cret", "?a=b%20c&key=s3cret&x=ä", "?key=s3cret#here"])
def test_an_addresss_query_is_in_no_log(server: Server, caplog: pytest.LogCaptureFixture, query: str):
    caplog.set_level(logging.DEBUG)
    judge = RemoteJudge(server.url + query)
    assert asyncio.run(judge(PROMPTS, COMPLETIONS)) == [0.5, 1.0, None, 2.0, 2.5]
    assert f"HTTP Request: POST {judge.shown} " in caplog.text
    assert "s3cret" not in caplog.text


def test_the_token_goes_into_a_header_and_nowhere_else(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    caplog.set_level(logging.DEBUG)
    server.script = [answer(403)]
    assert "s3cret" not in refusal(server, token_env="JUDGE_TOKEN")
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in caplog.text and "s3cret" not in repr(RemoteJudge(server.url, token_env="JUDGE_TOKEN"))
    ask(server)
    assert "Authorization" not in server.headers[1]


def test_a_token_that_cannot_be_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="the environment variable JUDGE_TOKEN is not set"):
        RemoteJudge("https://example.org", token_env="JUDGE_TOKEN")
    monkeypatch.setenv("JUDGE_TOKEN", "s3 cret")
    with pytest.raises(ConfigError, match="JUDGE_TOKEN has spaces, line breaks") as caught:
        RemoteJudge("https://example.org", token_env="JUDGE_TOKEN")
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://example.org/s", "http://10.0.0.1", "http://localhost.example.org", "http://127.0.0.1.example.org"],
)
def test_plain_http_to_another_machine_needs_a_word(url: str):
    with pytest.raises(ConfigError, match="is on another machine and not https: .* use https, or allow_insecure=True"):
        RemoteJudge(url)
    assert not RemoteJudge(url, allow_insecure=True).local


def test_https_and_this_machine_are_allowed():
    for url in ("https://example.org/s", "http://localhost:8000", "http://127.0.0.2/", "http://[::1]:80/s"):
        RemoteJudge(url)
    assert RemoteJudge("http://[::1]:80/s?key=1").shown == "http://[::1]:80/s"


@pytest.mark.parametrize(
    ("url", "settings", "sentence"),
    [
        ("ftp://example.org", {}, "'ftp://example.org' is no web address; give one as https://example.org/score"),
        ("example.org/score", {}, "is no web address"),
        ("https://", {}, "is no web address"),
        ("https://a:99999", {}, "url cannot be read"),
        ("https://me:pass@example.org", {}, "holds a password; put a token into an environment variable"),
        ("https://e.org", {"batch_size": 0}, "batch_size=0 must be a whole number, at least 1"),
        ("https://e.org", {"retries": -1}, "retries=-1 must be a whole number, at least 0"),
        ("https://e.org", {"timeout": 0}, "timeout=0 must be a number of seconds above 0"),
        ("https://e.org", {"deadline": 0}, "deadline=0 must be a number of seconds above 0"),
        ("https://e.org", {"deadline": float("nan")}, "deadline=nan must be a number of seconds above 0"),
        ("https://e.org", {"backoff": -1}, "backoff=-1 must be a number of seconds, at least 0"),
        ("https://e.org", {"max_wait": float("inf")}, "max_wait=inf must be a number of seconds, at least 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(url: str, settings: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence) as caught:
        RemoteJudge(url, **settings)
    assert "pass@" not in str(caught.value)


def test_without_a_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ConfigError, match=r'a remote judge needs httpx2: pip install "hfpg\[remote\]"'):
        RemoteJudge("https://example.org")
