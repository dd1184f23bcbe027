"""The server over real sockets, asked by the published `openai` client; and every mistake in its error shape."""

from __future__ import annotations

import base64
import json
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image

from hico_jax.api import Model
from hico_jax.generate import GenerationConfig
from hico_jax.serve import app
from hico_jax.serve.app import Options, Server, local
from hico_jax.serve.decoder import Limits
from hico_jax.serve.engine import Engine
from hico_jax.serve.media import Allowance, Store
from hico_jax.serve.timed import Timed


class Served:
    """A running server."""

    def __init__(self, model: Model, folder: pathlib.Path, **options: Any) -> None:
        self.model = model
        self.engine = Engine(model.hico, model.tokenizer, buckets=((4, 256),), piece=64, queue=8).start()
        limits, allowance = Limits(seconds=20.0), Allowance(file_bytes=1 << 20)
        self.store = Store(folder, model, self.engine.call, limits=limits, allowance=allowance)
        settings = Options(**{"name": "tiny", "json_bytes": 2 << 20, "body_s": 0.5, "max_new_tokens": 64, **options})
        server = Server(model, self.engine, self.store, settings)
        routes, self.rates = server.app(), server.rates
        protocol = type("Quick", (Timed,), {"head_s": 0.5})
        config = uvicorn.Config(routes, port=0, log_level="error", http=protocol, ws="none", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def raw(self, text: bytes) -> bytes:
        """What comes back for bytes as they stand, until the server closes the connection; it must."""
        with socket.create_connection(("127.0.0.1", self.port), 60) as wire:
            wire.sendall(text)
            found = b""
            while piece := wire.recv(1 << 16):
                found += piece
            return found

    def post(self, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, dict[str, Any]]:
        told = {"host": f"127.0.0.1:{self.port}", "content-type": "application/json", "connection": "close"}
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        told.setdefault("content-length", str(len(body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        answer = self.raw(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        status, _, rest = answer.partition(b"\r\n\r\n")
        return int(status.split()[1]), json.loads(rest)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.engine.close()
        self.store.close()


@pytest.fixture(scope="module")
def served(make_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(make_model(), tmp_path_factory.mktemp("uploads"))
    yield server
    server.close()


def video(url: str, text: str = "What is seen?") -> list[Any]:
    parts = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def data_url(path: pathlib.Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_the_openai_client_gets_what_ask_says(served: Served, films: list[pathlib.Path]) -> None:
    """By data URL, by upload, streamed; with usage, log-probabilities and a second turn."""
    client, model = served.client(), served.model
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    settings = GenerationConfig(max_new_tokens=6, eos=model.tokenizer.eos_ids)
    seen = model.watch(films[0])
    want = model.ask(seen, "What is seen?", settings=settings)
    got = client.chat.completions.create(
        model="tiny", messages=video(data_url(films[0])), max_tokens=6, logprobs=True, top_logprobs=3,
        extra_body={"hico": {"attention": True}},
    )  # fmt: skip
    assert got.choices[0].message.content == want.text
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (want.prompt_tokens, len(want.ids))
    assert got.choices[0].finish_reason == ("stop" if want.ids[-1] in settings.eos else "length")
    assert got.choices[0].logprobs is not None
    assert got.choices[0].logprobs.content is not None
    assert len(got.choices[0].logprobs.content) == len(want.ids)
    first = got.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 3
    assert first.logprob == pytest.approx(first.top_logprobs[0].logprob)
    told = got.model_extra["hico"]  # type: ignore[index]
    assert told["visual_tokens"] == want.visual_tokens
    assert sum(told["attention"][0]) == pytest.approx(1, abs=1e-3)

    kept = len(served.store.items)
    again = client.chat.completions.create(model="tiny", messages=video(data_url(films[0])), max_tokens=1)
    assert len(served.store.items) == kept  # the same bytes: neither read nor run again
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == want.prompt_tokens - 1

    sent = client.files.create(file=films[0], purpose="vision")
    assert sent.filename == "1.mp4"
    chat = model.chat(seen, settings=settings)
    chat.say("What is seen?")
    messages = [*video(sent.id), {"role": "assistant", "content": want.text}, {"role": "user", "content": "And who?"}]
    text, usage = "", None
    with client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for event in stream:
            text += (event.choices[0].delta.content or "") if event.choices else ""
            usage = event.usage or usage
    assert text == chat.say("And who?").text
    assert usage is not None
    assert usage.completion_tokens <= 6
    line = served.raw(
        f"GET /v1/files/{sent.id}/timeline HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    )
    assert json.loads(line.partition(b"\r\n\r\n")[2])["times"] == [float(t) for t in range(12)]
    assert client.files.delete(sent.id).deleted
    with pytest.raises(openai.NotFoundError, match="no such file"):
        client.chat.completions.create(model="tiny", messages=video(sent.id))


def test_pictures_and_nothing_to_see(served: Served, tmp_path: pathlib.Path) -> None:
    client, model = served.client(), served.model
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)) for i in (0, 1)]
    urls = []
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        urls.append({"type": "image_url", "image_url": {"url": data_url(tmp_path / f"{i}.png", "image/png")}})
    settings = GenerationConfig(max_new_tokens=4, eos=model.tokenizer.eos_ids)
    want = model.ask(None, "Describe both.", images=pictures, settings=settings)
    content = [*urls, {"type": "text", "text": "Describe both."}]
    got = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}], max_tokens=4)
    assert got.choices[0].message.content == want.text
    want = model.ask(None, "Hello?", settings=settings)
    hello: list[Any] = [{"role": "user", "content": "Hello?"}]
    got = client.chat.completions.create(model="tiny", messages=hello, max_tokens=4)
    assert got.choices[0].message.content == want.text


BAD = [
    ({"messages": []}, "at least one message"),
    ({"messages": "x"}, "must be a list"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "a role of"),
    ({"messages": [{"role": {"a": {}}, "content": "x"}]}, "with a role of"),
    ({"messages": [{"role": "user"}]}, "content must be"),
    ({"seed": 10**400}, "seed must be a whole number"),
    ({"messages": [{"role": "user", "content": "<image>"}]}, "marks where media stand"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "last message must have the role user"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"temperature": False}, "temperature must be a number"),
    ({"temperature": 1e400}, "not JSON"),
    ({"max_tokens": 0}, "max_tokens must be a whole number from 1"),
    ({"max_completion_tokens": None, "max_tokens": 65}, "max_tokens must be a whole number from 1 to 64"),
    ({"top_p": 0}, "top_p must be a number above 0"),
    ({"n": 2}, "n is not supported"),
    ({"tools": [{}]}, "tools is not supported"),
    ({"stop": [""]}, "stop must be"),
    ({"stream": "yes"}, "stream must be true or false"),
    ({"messages": video("file:///etc/passwd")}, "must begin with data:"),
    ({"messages": video("/etc/passwd")}, "must begin with data:"),
    ({"messages": video("concat:/etc/passwd")}, "must begin with data:"),
    ({"messages": video("http://169.254.169.254/latest")}, "addresses are not read by this server"),
    ({"messages": video("data:video/mp4;base64,####")}, "not base64"),
    ({"messages": video("data:video/mp4;base64,aGVsbG8gd29ybGQhIQ==")}, "text file, not a film"),
    ({"messages": video("data:,#EXTM3U")}, "data URL reads"),
    ({"messages": video("data:video/mp4;base64," + base64.b64encode(b"#EXTM3U\n/etc/passwd\n").decode())}, "playlist"),
    ({"messages": [{"role": "user", "content": "long " * 70}]}, "room for 256"),
    ({"messages": [{"role": "user", "content": "long " * 400}]}, "longer than the 512 that the model takes"),
    ({"messages": [{"role": "user", "content": "long " * 9000}]}, "45000 letters"),
    ({"hico": 3}, "hico must be an object"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_mistakes_get_one_sentence(served: Served, change: dict[str, Any], message: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4, **change}
    status, told = served.post(json.dumps(body).encode())
    assert status == 400, told
    assert set(told["error"]) == {"message", "type", "param", "code"}
    assert message in told["error"]["message"]
    assert "/tmp" not in told["error"]["message"]
    assert told["error"]["type"] == "invalid_request_error"


def test_bodies_and_clients_that_are_refused(served: Served) -> None:
    ok = json.dumps({"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 1}).encode()
    assert served.post(ok)[0] == 200
    assert served.post(ok.replace(b'{"mes', b'{"model": null, "mes'))[0] == 200
    assert served.post(b"[" * 100_000)[0] == 400
    assert served.post(b"\xff\xfe")[0] == 400
    assert served.post(b"3")[1]["error"]["message"] == "the body must be a JSON object"
    assert served.post(ok, content_type="text/plain")[0] == 415
    assert served.post(ok.replace(b'{"mes', b'{"model": "gpt", "mes'))[0] == 404
    assert served.post(b" " * (3 << 20))[0] == 413
    assert served.post(ok, host="evil.example")[0] == 403
    assert served.post(ok, origin="http://evil.example")[0] == 403
    for nonsense in ("[", "[::1", "[v1.x]:", "a]b"):
        assert served.post(ok, host=nonsense)[0] == 403, nonsense
        assert served.post(ok, origin=f"http://{nonsense}")[0] == 403, nonsense
    assert served.post(b'{"a": [' + b"[]," * (1 << 19) + b"0]}")[1]["error"]["message"].startswith(
        "the body holds more"
    )
    status, told = served.post(ok[:10], content_length=str(len(ok)))  # the rest never comes
    assert (status, told["error"]["message"]) == (408, "nothing more of the body came for 0.5 s")
    assert served.raw(b"POST /v1/chat") == b""  # a head that never ends: the connection is closed
    assert served.raw(b"") == b""
    assert b" 404 " in served.raw(b"GET /../../etc/passwd HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert b" 405 " in served.raw(b"PUT /v1/files HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")


def upload(served: Served, data: bytes, name: str = "../../a.mp4", field: str = "file") -> tuple[int, dict[str, Any]]:
    head = f'--b\r\ncontent-disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
    body = head + data + b"\r\n--b--\r\n"
    return served.post(body, "/v1/files", content_type="multipart/form-data; boundary=b")


def test_uploads_that_are_refused_leave_nothing(served: Served, films: list[pathlib.Path]) -> None:
    before = set(served.store.folder.iterdir())
    assert upload(served, b"x" * (1 << 21))[0] == 413
    assert upload(served, b"hello world, I am text")[0] == 400
    assert upload(served, b"x", field="other")[0] == 400
    assert served.post(b"{}", "/v1/files")[0] == 415
    many = b"--b\r\na: b\r\n\r\nx\r\n" * 100 + b"--b--\r\n"
    assert served.post(many, "/v1/files", content_type="multipart/form-data; boundary=b")[0] == 400
    long = b"--b\r\na: " + b"b" * (1 << 19) + b"\r\n\r\nx\r\n--b--\r\n"
    assert served.post(long, "/v1/files", content_type="multipart/form-data; boundary=b")[0] == 400
    assert served.post(b"--b\r\nnonsense", "/v1/files", content_type="multipart/form-data; boundary=b")[0] == 400
    assert set(served.store.folder.iterdir()) == before
    status, told = upload(served, films[0].read_bytes())
    assert (status, told["filename"]) == (200, "a.mp4")
    assert {p.parent for p in served.store.folder.rglob("*")} == {served.store.folder}


def test_what_a_file_may_be_is_said_over_http(
    served: Served, films: list[pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds, frames, pixels and time of a film; pixels of a picture whose file is small."""

    def refused(url: str, message: str, **limits: float) -> None:
        monkeypatch.setattr(served.store, "limits", Limits(**limits))  # type: ignore[arg-type]
        body = {"messages": video(url), "max_tokens": 1}
        status, told = served.post(json.dumps(body).encode())
        assert (status, set(told["error"])) == (400, {"message", "type", "param", "code"})
        assert message in told["error"]["message"]
        assert str(served.store.folder) not in told["error"]["message"]

    film = upload(served, films[1].read_bytes())[1]["id"]
    refused(film, "a.mp4: the video lasts 8 s; at most 5 s are taken", duration_s=5)
    refused(film, "the video has 8 frames; at most 7 are taken", source_frames=7)
    refused(film, "64x64 are too large", pixels=100)
    refused(film, "took more memory or time than is allowed", seconds=0.01)
    Image.new("1", (8000, 8000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 1 << 17
    refused(data_url(tmp_path / "bomb.png", "image/png"), "pixels")
    assert not served.store.under_way


def test_health_and_figures(served: Served) -> None:
    ask = lambda path: served.raw(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    assert b'"status":"ok"' in ask("/health")
    text = ask("/metrics").decode()
    assert 'hico_requests_total{reason="length"}' in text
    assert "hico_first_token_seconds_bucket" in text
    page = ask("/").decode()
    assert "content-security-policy" in page
    assert "{{" not in page


def test_keys_keep_people_apart(
    make_model: Callable[..., Model], films: list[pathlib.Path], tmp_path: pathlib.Path
) -> None:
    served = Served(make_model(), tmp_path, api_keys=("one", "two"))
    try:
        sent = served.client("one").files.create(file=films[0], purpose="vision")
        assert [f.id for f in served.client("one").files.list()] == [sent.id]
        assert list(served.client("two").files.list()) == []
        with pytest.raises(openai.NotFoundError):
            served.client("two").chat.completions.create(model="tiny", messages=video(sent.id))
        for key in ("three", "none"):
            with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                served.client(key).models.list()
    finally:
        served.close()


def test_who_hangs_up_is_not_answered_further(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    step, before = served.engine._step, served.engine.counts.requests["cancelled"]
    monkeypatch.setattr(served.engine, "_step", lambda *args: (time.sleep(0.05), step(*args)))
    many: Any = [{"role": "user", "content": "Hello?"}]
    with served.client().chat.completions.create(model="tiny", messages=many, max_tokens=64, stream=True) as stream:
        next(iter(stream))
    for _ in range(200):
        if served.engine.idle:
            break
        time.sleep(0.02)
    assert served.engine.idle
    assert served.engine.counts.requests["cancelled"] == before + 1


def test_who_asks_too_often_is_told_when_to_come_back(make_model: Callable[..., Model], tmp_path: pathlib.Path) -> None:
    """Each key has a rate of its own; wrong keys count against the address; health is never refused."""
    served = Served(make_model(), tmp_path, api_keys=("one", "two"), rate=20)  # two at once
    served.rates.clock = lambda: 0.0  # however slow this machine is
    try:
        for key in ("one", "two"):
            with served.client(key) as client:
                client.models.list()
                client.models.list()
                with pytest.raises(openai.RateLimitError, match="more than 20 requests a minute") as error:
                    client.models.list()
            assert error.value.response.headers["retry-after"] == "3"
            assert error.value.code == "rate_limit_exceeded"
        kinds = [openai.AuthenticationError, openai.AuthenticationError, openai.RateLimitError]
        for kind in kinds:
            with served.client("guess") as client, pytest.raises(kind):
                client.models.list()
        for _ in range(5):
            assert b"200 OK" in served.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    finally:
        served.close()


def test_bytes_whose_file_had_to_go_are_taken_anew(
    served: Served, films: list[pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's upload may need the room before the bytes are remembered."""
    store, keep, data = served.store, served.store.keep, films[1].read_bytes() + b"\0"

    def lose(*given: Any) -> Any:
        item = keep(*given)
        store.remove(item)
        return item

    with monkeypatch.context() as patch:
        patch.setattr(store, "keep", lose)
        lost = store.put(data, "somebody", "data")
    again = store.put(data, "somebody", "data")
    assert again.id != lost.id
    assert store.put(data, "somebody", "data") is again
    assert again.path.is_file()
    store.remove(again)
    assert again not in store.same.values()


def test_what_takes_too_long_is_a_504(
    make_model: Callable[..., Model],
    films: list[pathlib.Path],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the device, a film or a turn at the readers keeps it waiting; streamed, the error is the last event."""
    served = Served(make_model(), tmp_path, request_s=0.4)
    hello: list[Any] = [{"role": "user", "content": "Hello?"}]
    client = served.client()
    try:
        for stream in (False, True):
            gate = threading.Event()
            held = served.engine.call(lambda gate=gate: gate.wait(60))  # the device is busy until we say so
            with pytest.raises(openai.APIError, match="no end came within the time allowed") as error:
                list(client.chat.completions.create(model="tiny", messages=hello, max_tokens=4, stream=stream))
            assert stream or isinstance(error.value, openai.InternalServerError)
            assert stream or error.value.status_code == 504  # type: ignore[attr-defined]
            gate.set()
            assert held.result(60), "the answer came while the device was busy"
        gate = threading.Event()
        with monkeypatch.context() as patch:  # a prompt whose making compiles for long
            patch.setattr(app, "prompt", lambda *given: gate.wait(60) and None)
            with pytest.raises(openai.InternalServerError, match="made ready within"):
                client.chat.completions.create(model="tiny", messages=hello)
            assert not gate.is_set(), "the answer came only after the prompt"
            gate.set()
        sent = client.files.create(file=films[0], purpose="vision")
        for _ in range(2):
            served.store.readers.acquire()  # as if two long films were being read
        with pytest.raises(
            openai.InternalServerError, match=r"the media were not read and made ready within 0\.4 s"
        ) as late:
            client.chat.completions.create(model="tiny", messages=video(sent.id))
        assert late.value.status_code == 504
        head = f"GET /v1/files/{sent.id}/timeline HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        assert b" 504 " in served.raw(head.encode())
        for _ in range(100):  # nobody goes on waiting for a reader
            if not served.store.under_way:
                break
            time.sleep(0.02)
        assert not served.store.under_way
        served.store.readers.release(2)
        assert served.engine.idle
    finally:
        client.close()
        served.close()


@pytest.mark.parametrize(
    ("host", "ours"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_which_addresses_are_this_machines(host: str, ours: bool) -> None:
    assert local(host) is ours
