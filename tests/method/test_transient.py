"""A reward that asks a server: what passes by itself is asked again, anything else ends at once and never is a 0."""

from __future__ import annotations

import json
import socket
import struct
import threading
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from diffinstruct.method import transient
from diffinstruct.method.rewards import LatentRewards, RewardError, RewardRequest


class Judge(BaseHTTPRequestHandler):
    """Answers as the server's list of failures says, one after the other, and then with a score a prompt."""

    server: Any  # a QuietServer

    def do_POST(self) -> None:
        prompts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        failure = self.server.failures.pop(0) if self.server.failures else 200
        if failure == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif failure == "silent":
            self.server.released.wait(10)
        else:
            body = json.dumps([0.25] * len(prompts)).encode()
            self.send_response(failure)
            self.send_header("Content-Length", str(len(body)))
            if failure != 200 and self.server.retry_after:
                self.send_header("Retry-After", self.server.retry_after)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Judge)
        self.failures: list[Any] = []
        self.asked, self.retry_after, self.released, self.pauses = 0, "", threading.Event(), list[float]()

    def handle_error(self, *_) -> None:  # a connection that the test itself cuts
        pass


@pytest.fixture
def server(monkeypatch):
    server = QuietServer()
    monkeypatch.setattr(transient.time, "sleep", server.pauses.append)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def post(url: str, prompts: list[str]) -> list[float]:
    request = urllib.request.Request(url, json.dumps(prompts).encode())
    with urllib.request.urlopen(request, timeout=0.3) as answer:
        return json.load(answer)


def post_by_requests(url: str, prompts: list[str]) -> list[float]:
    import requests

    answer = requests.post(url, json=prompts, timeout=0.3)
    answer.raise_for_status()
    return answer.json()


class Remote:
    """A judge behind HTTP, as somebody writes it in five minutes."""

    attempts: int

    def __init__(self, server, post=post) -> None:
        self.url, self.post = f"http://127.0.0.1:{server.server_address[1]}/", post

    def __call__(self, images, prompts):
        return torch.tensor(self.post(self.url, list(prompts)))


def scores(reward, trained=False):
    rewards = LatentRewards(lambda latents: latents, {"judge": reward})
    answer = rewards(torch.rand(2, 3, 4, 4), ["a", "b"], RewardRequest({"judge": 1.0} if trained else {}, 2))
    return answer.scores["judge"].tolist()


@pytest.mark.parametrize("post", [post, post_by_requests])
@pytest.mark.parametrize("failure", [503, 429, 502, 504, "reset", "silent"])
def test_a_held_out_judge_that_fails_once_is_asked_again(server, failure, post, caplog):
    server.failures = [failure]
    assert scores(Remote(server, post)) == [0.25, 0.25]
    assert server.asked == 2 and server.pauses == [1.0]
    (line,) = caplog.messages
    assert line.startswith("reward judge: ") and line.endswith("asked again in 1 s (2 of 5)") and "\n" not in line


@pytest.mark.parametrize("failure", [503, "reset"])
def test_after_the_last_attempt_the_failure_is_raised_and_is_no_score(server, failure):
    server.failures = [failure] * 9
    with pytest.raises(RewardError, match=r"^reward judge: \w+: .*\(asked 5 times\)$"):
        scores(Remote(server))
    assert server.asked == 5 and server.pauses == [1.0, 2.0, 4.0, 8.0]


def test_a_reward_says_itself_how_often_it_is_asked(server):
    server.failures, judge = [503] * 9, Remote(server)
    judge.attempts = 2
    with pytest.raises(RewardError, match=r"Service Unavailable \(asked 2 times\)"):
        scores(judge)
    assert server.asked == 2


@pytest.mark.parametrize("failure", [400, 401, 404, 500])
def test_what_does_not_pass_by_itself_ends_at_once(server, failure):
    server.failures = [failure]
    with pytest.raises(RewardError, match=rf"^reward judge: HTTPError: HTTP Error {failure}"):
        scores(Remote(server))
    assert server.asked == 1 and not server.pauses


def test_the_server_says_how_long_to_wait(server):
    server.failures, server.retry_after = [429], "7"
    assert scores(Remote(server, post_by_requests)) == [0.25, 0.25] and server.pauses == [7.0]
    server.failures, server.retry_after = [503], format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert scores(Remote(server)) == [0.25, 0.25] and 25 < server.pauses[-1] <= 30
    server.failures, server.retry_after = [503], "soon"
    assert scores(Remote(server)) == [0.25, 0.25] and server.pauses[-1] == 1.0


def test_a_server_that_wants_an_hour_is_not_waited_for(server):
    server.failures, server.retry_after = [429], "3600"
    with pytest.raises(RewardError, match="429"):
        scores(Remote(server))
    assert server.asked == 1 and not server.pauses


class RemoteGradient(torch.autograd.Function):
    """Asks its server in the backward pass, too."""

    @staticmethod
    def forward(context, images, judge, prompts):
        context.judge, context.prompts, context.shape = judge, prompts, images.shape
        return torch.tensor(post(judge.url, list(prompts)))

    @staticmethod
    def backward(context, weights):
        (values,) = {*post(context.judge.url, context.prompts)}
        return torch.full(context.shape, values), None, None


class TrainedRemote(Remote):
    def __call__(self, images, prompts):
        return RemoteGradient.apply(images, self, prompts)


@pytest.mark.parametrize(("failures", "asked"), [([503], 3), ([200, 503], 4)])
def test_a_trained_reward_is_asked_again_in_forward_and_backward(server, failures, asked):
    server.failures = failures
    assert scores(TrainedRemote(server), trained=True) == [0.25, 0.25] and server.asked == asked


def test_a_gradient_that_is_never_answered_is_one_line_with_the_rewards_name(server):
    server.failures = [200, 503] * 9
    with pytest.raises(RewardError, match=r"^the gradient of judge: HTTPError: .*\(asked 5 times\)$"):
        scores(TrainedRemote(server), trained=True)
    assert server.asked == 10


def test_a_forward_that_never_answers_is_not_multiplied_by_the_backwards_attempts(server):
    server.failures = [503] * 30
    with pytest.raises(RewardError, match=r"^reward judge: .*\(asked 5 times\)$"):
        scores(TrainedRemote(server), trained=True)
    assert server.asked == 5


class TransportError(Exception):
    """As a client names its own that has no cause."""


class ReadTimeout(TransportError):
    pass


def with_status(error, **facts):
    vars(error).update(facts)
    return error


@pytest.mark.parametrize(
    ("error", "pause"),
    [
        (ReadTimeout("silence"), 1.0),
        (urllib.error.URLError(ConnectionRefusedError(111, "refused")), 1.0),
        (urllib.error.URLError(socket.gaierror(-2, "Name or service not known")), None),
        (with_status(RuntimeError("busy"), status_code=503), 1.0),
        (with_status(RuntimeError("busy"), status=429, headers={"Retry-After": "3"}), 3.0),
        (with_status(RuntimeError("of this code"), code="invalid"), None),
        (FileNotFoundError(2, "no such file"), None),
        (ValueError("out of order"), None),
    ],
)
def test_errors_of_other_clients_are_told_apart(error, pause):
    assert transient.pause_before_retry(error, 1.0) == pause


def test_an_error_raised_instead_of_a_transient_one_is_told_by_its_cause():
    for suppressed, pause in ((False, 1.0), (True, None)):
        try:
            try:
                raise ConnectionResetError(104, "reset")
            except ConnectionResetError:
                if suppressed:
                    raise ValueError("bad answer") from None
                raise ValueError("bad answer")  # noqa: B904
        except ValueError as error:
            assert transient.pause_before_retry(error, 1.0) == pause
