"""Models of the Hugging Face hub, against a hub on loopback: what is fetched, kept, found, refused and deleted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants, file_download

import infopt as ip
from infopt.errors import FetchError
from infopt.io import hf, names
from infopt.io.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
REPO, NAME = "owner/tiny", "hf:owner/tiny"
API = "/api/models/owner/tiny/revision/main"
NOISE = {
    "README.md": b"---\nlicense: mit\n---\n",
    "pytorch_model.bin": b"pickle" * 999,
    "modeling.py": b"raise SystemExit",
    "onnx/model.onnx": b"onnx" * 999,
    "consolidated.safetensors": b"copy" * 999,
    "original/config.json": b"{}",
}
GGUF = {f"tiny-{kind}.gguf": kind.encode() * 900 for kind in ("Q4_0", "Q8_0")}


def folder(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (FIXTURES / name).iterdir() if path.suffix != ".npz"}


def pull(name: str = NAME) -> Path:
    return hf.pull(hf.Ref.parse(name))


def cached(name: str = NAME) -> Path | None:
    return hf.cached(hf.Ref.parse(name))


def remove(name: str = NAME) -> int:
    return hf.remove(hf.Ref.parse(name))


def blobs(repo: str = REPO) -> list[str]:
    return sorted(path.name for path in hf.Ref(repo).folder.glob("blobs/*"))


def unfinished(repo: str = REPO) -> list[Path]:
    return list(hf.Ref(repo).folder.glob("blobs/*.incomplete"))


@pytest.fixture
def hub(hub_server: Any) -> Any:
    hub_server.put(REPO, folder("llama") | NOISE)
    return hub_server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """`huggingface_hub` waits a second before it tries again."""
    quick = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
    monkeypatch.setattr(file_download, "time", quick)


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "repo", "revision", "file"),
    [
        ("hf:owner/name", "owner/name", "main", ""),
        ("hf:HuggingFaceTB/SmolLM2-1.7B_x", "HuggingFaceTB/SmolLM2-1.7B_x", "main", ""),
        ("hf:o/n@v1.0", "o/n", "v1.0", ""),
        ("hf:o/n:a-Q4_K_M.gguf", "o/n", "main", "a-Q4_K_M.gguf"),
        ("hf:o/n@abc:sub/a.gguf", "o/n", "abc", "sub/a.gguf"),
    ],
)
def test_name_is_read_and_written_alike(name: str, repo: str, revision: str, file: str) -> None:
    assert hf.Ref.parse(name) == hf.Ref(repo, revision, file)
    assert str(hf.Ref.parse(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "hf:", "hf:name", "hf:a/b/c", "hf:../name", "hf:owner/..", "hf:a..b/c", "hf:/etc/passwd", "hf:a/b@../main",
        "hf:a/b@x/y", "hf:a/b:../x.gguf", "hf:a/b:x/../y.gguf", "hf:a/b:/x.gguf", "hf:a/b:x.bin", "hf:a/b@", "hf:a/b:",
        "hf:a b/c", "hf:a/b\n", "hf:a/b\0", "hf:a--b/c", "hf:-a/b", "hf:a/b.", "hf:ä/b", "hf:a\\b/c", "hf:a/b?x",
        "hf:a/b#x", "hf:a/%2e%2e", "hf:a/" + "b" * 96,
    ],
)  # fmt: skip
def test_odd_name_is_refused_before_anyone_is_asked(name: str) -> None:
    with pytest.raises(FetchError, match="is not the name of a model of the hub") as caught:
        hf.Ref.parse(name)
    assert "\n" not in caught.value.one_line


# --------------------------------------------------------------------------------------------------------- fetching


def test_load_fetches_what_is_read_and_nothing_else(hub: Any) -> None:
    model, params = ip.load(NAME)
    expected, wanted = ip.load(FIXTURES / "llama")
    tokens = np.arange(6, dtype=np.int32)[None] % model.spec.config.vocab
    np.testing.assert_array_equal(model.apply(params, tokens)[0], expected.apply(wanted, tokens)[0])
    place = cached()
    assert place is not None
    assert sorted(path.name for path in place.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sorted({*hub.paths()}) == [API, "README.md", "config.json", "model.safetensors"]


def test_card_larger_than_any_is_left_where_it_is(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "LARGEST_CARD", 10)
    hub.put(REPO, folder("llama") | {"README.md": b"x" * 11, "LICENSE": b"y" * 10})
    pull()
    assert "LICENSE" in hub.paths() and "README.md" not in hub.paths()


PLAIN, TOOLS, OLD = "{{ messages[0].content }}", "{{ tools | length }} tools", "old"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"chat_template.jinja": PLAIN}, ["Hi", "Hi"]),
        ({"chat_template.jinja": PLAIN, "additional_chat_templates/tool_use.jinja": TOOLS}, ["Hi", "1 tools"]),
        ({"chat_template.jinja": OLD, "additional_chat_templates/default.jinja": PLAIN}, ["Hi", "Hi"]),
        ({"chat_template.jinja": PLAIN, "additional_chat_templates/rag.jinja": OLD}, ["Hi", "Hi"]),
        ({}, [OLD, "old tools"]),
    ],
    ids=["one", "named", "named default", "other name", "in tokenizer_config.json"],
)
def test_named_chat_templates_are_fetched_and_chosen_as_transformers_does(
    files: dict[str, str], said: list[str], hub: Any
) -> None:
    tokenizer = Tokenizer.from_tables(["a", "<s>"], [], [1, 3], "gpt-2").backend.to_str()
    named = [{"name": "default", "template": OLD}, {"name": "tool_use", "template": "old tools"}]
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": json.dumps({"chat_template": named})} | files
    hub.put(REPO, folder("llama") | {name: text.encode() for name, text in files.items()})
    model, _ = ip.load(NAME)
    messages = [{"role": "user", "content": "Hi"}]
    assert [model.tokenizer.chat(messages, tools=tools) for tools in (None, [{"name": "f"}])] == said
    assert "additional_chat_templates/rag.jinja" not in hub.paths()


def test_model_that_is_here_is_used_without_asking(hub: Any) -> None:
    first = names.locate(NAME)
    hub.asked.clear()
    assert names.locate(NAME) == first
    assert hub.asked == []


def test_sharded_model_is_fetched_by_its_index(hub: Any) -> None:
    files = folder("llama_tied")
    hub.put("o/sharded", files | {"model-00009-of-00009.safetensors": b"stray" * 999, "model.fp16.safetensors": b"x"})
    place = pull("hf:o/sharded")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == files
    ip.load("hf:o/sharded")


def test_pull_fetches_a_new_commit_and_shares_what_has_not_changed(hub: Any) -> None:
    old = pull()
    files = folder("llama") | {"tokenizer_config.json": b"{}"}
    hub.put(REPO, files)
    assert cached() == old, "until the next pull"
    hub.asked.clear()
    new = pull()
    assert new != old
    assert cached() == new
    assert "model.safetensors" not in hub.paths()
    assert (new / "model.safetensors").samefile(old / "model.safetensors")


def test_second_pull_of_the_same_commit_fetches_no_file(hub: Any) -> None:
    place = pull()
    hub.asked.clear()
    assert pull() == place
    assert len(hub.asked) == 1


def test_revision_is_a_branch_a_tag_or_a_commit(hub: Any) -> None:
    other = folder("llama") | {"generation_config.json": b"{}"}
    commit = hub.put(REPO, other, "v1")
    assert (pull(NAME + "@v1") / "generation_config.json").exists()
    assert pull(f"{NAME}@{commit}") == cached(NAME + "@v1") == cached(f"{NAME}@{commit}")
    assert not (pull() / "generation_config.json").exists()


def test_token_goes_along(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pull()
    assert not any("authorization" in headers for _, _, headers in hub.asked)
    shutil.rmtree(hf.cache_folder())
    hub.asked.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull()
    assert {headers.get("authorization") for _, _, headers in hub.asked} == {"Bearer hf_secret"}


def test_gguf_file_is_fetched_alone(hub: Any) -> None:
    hub.put("o/gguf", GGUF | NOISE | {"config.json": b"{}"})
    place = pull("hf:o/gguf:tiny-Q8_0.gguf")
    assert place.read_bytes() == GGUF["tiny-Q8_0.gguf"]
    assert place == cached("hf:o/gguf:tiny-Q8_0.gguf") == cached("hf:o/gguf")
    assert [path.name for path in place.parent.iterdir()] == ["tiny-Q8_0.gguf"]
    assert cached("hf:o/gguf:tiny-Q4_0.gguf") is None


def test_only_gguf_file_of_a_repository_needs_no_name(hub: Any) -> None:
    hub.put("o/one", {"one.gguf": b"GGUF" * 999} | NOISE)
    assert pull("hf:o/one") == cached("hf:o/one:one.gguf")


def test_several_gguf_files_are_listed_and_none_is_fetched(hub: Any) -> None:
    hub.put("o/gguf", GGUF)
    with pytest.raises(FetchError, match=r"2 GGUF files are in it: tiny-Q4_0.gguf, tiny-Q8_0.gguf") as caught:
        pull("hf:o/gguf")
    assert "hf:o/gguf:tiny-Q4_0.gguf" in caught.value.fix
    assert len(hub.asked) == 1
    for name in GGUF:
        pull(f"hf:o/gguf:{name}")
    with pytest.raises(FetchError, match="2 GGUF files are here"):
        cached("hf:o/gguf")


def test_split_gguf_is_one_model_and_comes_with_all_its_parts(hub: Any) -> None:
    parts = {f"big-{i:05}-of-00003.gguf": bytes([i]) * 2000 for i in (1, 2, 3)}
    hub.put("o/split", parts)
    place = pull("hf:o/split")
    assert place.name == "big-00001-of-00003.gguf"
    assert {path.name: path.read_bytes() for path in place.parent.iterdir()} == parts
    (place.parent / "big-00002-of-00003.gguf").unlink()
    assert cached("hf:o/split") is None
    assert cached("hf:o/split:big-00001-of-00003.gguf") is None


def test_file_that_is_not_there_suggests_a_near_one(hub: Any) -> None:
    hub.put("o/gguf", GGUF)
    with pytest.raises(FetchError, match=r"has no file 'tiny-Q8\.gguf'.*\n.*tiny-Q8_0\.gguf"):
        pull("hf:o/gguf:tiny-Q8.gguf")


def test_pickles_alone_are_refused_before_they_are_fetched(hub: Any) -> None:
    hub.put("o/bin", {"config.json": b"{}", "pytorch_model.bin": b"x" * 5000})
    with pytest.raises(FetchError, match="no weights that are read here") as caught:
        pull("hf:o/bin")
    assert "pytorch_model.bin" in caught.value.why
    assert len(hub.asked) == 1


@pytest.mark.parametrize(
    "index",
    [
        b"{",
        b"[]",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": []}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": "../../../secret.safetensors"}}',
        b'{"weight_map": {"a": "sub/x.safetensors"}}',
        b'{"weight_map": {"a": "x.bin"}}',
        b"[" * 5000,
        b"\xff",
    ],
)
def test_index_that_is_damaged_or_leaves_its_folder_is_refused(hub: Any, index: bytes) -> None:
    hub.put("o/odd", folder("llama_tied") | {hf.INDEX: index})
    with pytest.raises(FetchError, match="is damaged"):
        pull("hf:o/odd")
    assert cached("hf:o/odd") is None


def test_shard_that_the_hub_lacks_is_named(hub: Any) -> None:
    files = folder("llama_tied")
    del files["model-00002-of-00002.safetensors"]
    hub.put("o/short", files)
    with pytest.raises(FetchError, match=r"has no file 'model-00002-of-00002\.safetensors'"):
        pull("hf:o/short")
    assert cached("hf:o/short") is None


# -------------------------------------------------------------------------------------------- interrupted and at once


def test_broken_connection_is_taken_up_where_it_broke(hub: Any, impatient: None) -> None:
    data = os.urandom(50_000)
    hub.put("o/gguf", {"a.gguf": data})
    hub.cut["a.gguf"] = [30_000]
    assert pull("hf:o/gguf").read_bytes() == data
    (again,) = [headers["range"] for method, path, headers in hub.asked if method == "GET" and "range" in headers]
    assert 0 < int(again.removeprefix("bytes=").removesuffix("-")) <= 30_000


def test_connection_that_stays_broken_is_an_error_and_the_next_pull_goes_on(hub: Any, impatient: None) -> None:
    data = os.urandom(50_000)
    hub.put("o/gguf", {"a.gguf": data})
    hub.cut["a.gguf"] = [20_000] + [0] * 20
    with pytest.raises(FetchError, match="could not be reached"):
        pull("hf:o/gguf")
    assert cached("hf:o/gguf") is None
    (part,) = unfinished("o/gguf")
    hub.cut.clear()
    hub.asked.clear()
    kept = part.stat().st_size
    assert pull("hf:o/gguf").read_bytes() == data
    assert [h["range"] for m, p, h in hub.asked if m == "GET" and p.endswith(".gguf")] == [f"bytes={kept}-"]
    assert unfinished("o/gguf") == []


CHILD = """
import sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1024
from infopt.io import hf
print(hf.pull(hf.Ref.parse(sys.argv[1])))
"""


def child(name: str) -> subprocess.Popen[str]:
    """A process of its own, which knows the hub by HF_ENDPOINT and its cache by HF_HOME."""
    command = [sys.executable, "-c", CHILD, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_killed_pull_is_not_taken_for_whole_and_the_next_goes_on(hub: Any) -> None:
    data = os.urandom(200_000)
    hub.put("o/gguf", {"a.gguf": data})
    hub.hold["a.gguf"] = threading.Event()
    with child("hf:o/gguf") as process:
        wait_for(lambda: any(path.stat().st_size > 100_000 for path in unfinished("o/gguf")))
        process.send_signal(signal.SIGKILL)
    (part,) = unfinished("o/gguf")
    size = part.stat().st_size
    assert cached("hf:o/gguf") is None
    (entry,) = hf.entries()
    assert (entry.name, entry.size, entry.whole) == ("hf:o/gguf", size, False)

    hub.hold.pop("a.gguf").set()
    hub.asked.clear()
    assert pull("hf:o/gguf").read_bytes() == data
    assert [h["range"] for m, p, h in hub.asked if m == "GET" and p.endswith(".gguf")] == [f"bytes={size}-"]
    assert unfinished("o/gguf") == []


@pytest.mark.parametrize("part", [b"garbage" * 1000, b"x" * 99_999], ids=["wrong", "too long"])
def test_part_of_other_bytes_never_becomes_the_file(hub: Any, part: bytes) -> None:
    data = os.urandom(50_000)
    hub.put("o/gguf", {"a.gguf": data})
    folder = hf.Ref("o/gguf").folder / "blobs"
    folder.mkdir(parents=True)
    (folder / f"{hub._etag(data)}.infopt.incomplete").write_bytes(part)
    if len(part) < len(data):
        with pytest.raises(FetchError, match="did not arrive as the hub has it"):
            pull("hf:o/gguf")
        assert cached("hf:o/gguf") is None
    assert pull("hf:o/gguf").read_bytes() == data


def test_two_pulls_at_once_fetch_once_and_both_have_it(hub: Any) -> None:
    data = os.urandom(100_000)
    hub.put("o/gguf", {"a.gguf": data})
    hub.hold["a.gguf"] = threading.Event()
    running = [child("hf:o/gguf") for _ in range(2)]
    api = "/api/models/o/gguf/revision/main"
    wait_for(lambda: sum(path == api for _, path, _ in hub.asked) == 2 and unfinished("o/gguf"))
    time.sleep(0.3)  # the other one has come to the lock
    hub.hold.pop("a.gguf").set()
    printed = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    (place,) = printed
    assert Path(place).read_bytes() == data
    assert sum(method == "GET" and path.endswith(".gguf") for method, path, _ in hub.asked) == 1
    assert unfinished("o/gguf") == []


def test_half_fetched_model_is_not_found_and_is_completed(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("o/sharded", folder("llama_tied"))
    last = "/o/sharded/resolve/" + hub.commits["o/sharded"]["main"] + "/model-00002-of-00002.safetensors"
    hub.answer[last] = (500, {})
    with pytest.raises(FetchError, match="it answers 500"):
        pull("hf:o/sharded")
    assert cached("hf:o/sharded") is None
    hub.answer.clear()
    hub.asked.clear()
    ip.load("hf:o/sharded")
    assert "model-00001-of-00002.safetensors" not in hub.paths()


def test_what_other_programs_fetched_in_part_is_not_taken_for_whole(hub: Any) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "config.json")
    assert cached() is None
    assert hf.entries() == []
    ip.load(NAME)


def test_what_other_programs_fetched_whole_is_used(hub: Any) -> None:
    from huggingface_hub import hf_hub_download

    places = {Path(hf_hub_download(REPO, name)).parent for name in folder("llama")}
    hub.asked.clear()
    assert {names.locate(NAME)} == places
    assert hub.asked == []


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("status", "headers", "message", "fix"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "shows no model owner/tiny", "hf auth login"),
        (401, {}, "refuses", "hf auth login"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "refuses", "HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, "is gated", "accept its terms at"),
        (401, {"X-Error-Code": "GatedRepo"}, "is gated", "accept its terms at"),
        (403, {"X-Error-Message": "Forbidden"}, "refuses", "HF_TOKEN"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "has no revision 'main'", "/commits"),
        (404, {}, "answers 404", "HF_ENDPOINT"),
        (429, {}, "answers 429", "wait a while"),
        (500, {}, "answers 500", "wait a while"),
        (503, {}, "answers 503", "wait a while"),
        (200, {}, "is not a hub", "HF_ENDPOINT"),
    ],
)
def test_answer_of_the_hub_is_explained_and_leaves_nothing(
    hub: Any, status: int, headers: dict[str, str], message: str, fix: str
) -> None:
    hub.answer[API] = (status, headers)
    with pytest.raises(FetchError, match=message) as caught:
        ip.load(NAME)
    assert fix in caught.value.fix
    assert "\n" not in caught.value.one_line
    assert not hf.cache_folder().exists()


@pytest.mark.parametrize("status", [401, 403])
def test_gated_file_of_an_open_listing_is_explained(hub: Any, status: int) -> None:
    """The hub lists a gated model's files to all, and gives them to few."""
    commit = hub.commits[REPO]["main"]
    for name in ("config.json", "model.safetensors"):
        hub.answer[f"/{REPO}/resolve/{commit}/{name}"] = (status, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(FetchError, match="is gated"):
        pull()
    assert blobs() == []


@pytest.mark.parametrize("listing", [{"sha": "../../x"}, {"sha": None}, {"siblings": 3}, {"siblings": [{}]}])
def test_listing_that_cannot_be_is_refused(hub: Any, monkeypatch: pytest.MonkeyPatch, listing: dict[str, Any]) -> None:
    dumps = json.dumps
    monkeypatch.setattr(
        json, "dumps", lambda value, **kw: dumps(value | listing if "siblings" in value else value, **kw)
    )
    with pytest.raises(FetchError, match="is not a hub"):
        pull()
    assert not hf.cache_folder().exists()


def test_no_network_says_so(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match=r"hub at http://127.0.0.1:9 could not be reached") as caught:
        ip.load(NAME)
    assert "HF_ENDPOINT" in caught.value.fix


def test_offline_says_so_and_what_is_here_still_loads(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="the hub is not asked") as caught:
        ip.load(NAME)
    assert "HF_HUB_OFFLINE" in caught.value.why
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    pull()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ip.load(NAME)


def test_model_larger_than_the_disk_is_refused_at_once(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(FetchError, match="does not fit onto the disk") as caught:
        pull()
    assert "1 kB are free" in caught.value.why
    assert len(hub.asked) == 1


@pytest.mark.parametrize(
    ("number", "state"), [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EACCES, "cannot be used")]
)
def test_disk_that_refuses_is_named_and_nothing_is_taken_for_whole(
    hub: Any, monkeypatch: pytest.MonkeyPatch, number: int, state: str
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(hf, "sync", refuse)
        with pytest.raises(FetchError, match=f"hub {state}") as caught:
            pull()
    assert constants.HF_HUB_CACHE in caught.value.what
    assert "HF_HUB_CACHE" in caught.value.fix
    assert cached() is None
    pull()
    ip.load(NAME)


def test_cache_that_cannot_be_made_is_named(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(constants.HF_HUB_CACHE).parent.mkdir()
    Path(constants.HF_HUB_CACHE).write_text("")
    for act in (pull, hf.entries):
        with pytest.raises(FetchError, match="cannot be used"):
            act()


def test_reference_is_written_whole_or_not(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: Any) -> None:
        if Path(target).name == "main":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    real = os.replace
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FetchError, match="is full"):
        pull()
    assert cached() is None
    assert not [path for path in hf.Ref(REPO).folder.rglob("*") if path.name.startswith(".infopt-")]


def test_file_shorter_than_announced_is_refused(hub: Any) -> None:
    hub.sent["model.safetensors"] = folder("llama")["model.safetensors"][:-1]
    with pytest.raises(FetchError, match="not what it had announced"):
        pull()
    assert cached() is None


# -------------------------------------------------------------------------------------------------- listed and deleted


def test_entries_are_what_can_be_loaded(hub: Any) -> None:
    hub.put(REPO, folder("llama") | {"generation_config.json": b"{}"}, "v1")
    hub.put("o/gguf", GGUF)
    hub.put("o/other", {"config.json": b"{}", "tokenizer.json": b"{}"})
    for name in (NAME, NAME + "@v1", *(f"hf:o/gguf:{file}" for file in GGUF)):
        pull(name)
    from huggingface_hub import hf_hub_download

    hf_hub_download("o/other", "config.json")
    found = {entry.name: entry for entry in hf.entries()}
    assert [*found] == ["hf:o/gguf:tiny-Q4_0.gguf", "hf:o/gguf:tiny-Q8_0.gguf", NAME, NAME + "@v1"]
    for name, entry in found.items():
        assert cached(name) == entry.path
        assert time.time() - 600 < entry.modified <= time.time() + 1
    assert found[NAME].size == sum(map(len, folder("llama").values())) + len(NOISE["README.md"])


def test_no_cache_has_no_entries(hub: Any) -> None:
    assert hf.entries() == []


def test_removing_the_last_revision_removes_all_of_it(hub: Any) -> None:
    place = pull()
    size = sum(path.stat().st_size for path in place.iterdir())
    assert remove() == size
    assert not hf.Ref(REPO).folder.exists()
    with pytest.raises(FetchError, match="is not on this machine"):
        remove()


def test_removing_a_revision_keeps_what_another_shares(hub: Any) -> None:
    hub.put(REPO, folder("llama") | {"generation_config.json": b'{"a": 1}'}, "v1")
    pull(NAME + "@v1")
    main = pull()
    assert remove(NAME + "@v1") == len(b'{"a": 1}')
    assert cached(NAME + "@v1") is None
    assert cached() == main
    ip.load(NAME)


def test_removing_keeps_a_copy_of_the_repository_with_the_same_commit(hub: Any) -> None:
    hub.put("o/copy", {})
    commit = hub.commits[REPO]["main"]
    hub.commits["o/copy"] = {"main": commit, commit: commit}
    hub.files["o/copy", commit] = folder("llama")
    pull()
    copy = pull("hf:o/copy")
    remove()
    assert cached("hf:o/copy") == copy


def test_removing_a_gguf_file_keeps_the_others(hub: Any) -> None:
    hub.put("o/gguf", GGUF)
    for file in GGUF:
        pull(f"hf:o/gguf:{file}")
    assert remove("hf:o/gguf:tiny-Q4_0.gguf") == len(GGUF["tiny-Q4_0.gguf"])
    assert cached("hf:o/gguf:tiny-Q4_0.gguf") is None
    assert cached("hf:o/gguf:tiny-Q8_0.gguf") is not None
    with pytest.raises(FetchError, match="is not on this machine"):
        remove("hf:o/gguf:tiny-Q4_0.gguf")
    assert remove("hf:o/gguf:tiny-Q8_0.gguf") == len(GGUF["tiny-Q8_0.gguf"])
    assert not hf.Ref("o/gguf").folder.exists()


def test_removing_takes_what_an_interrupted_pull_left(hub: Any) -> None:
    pull(NAME)
    (left := hf.Ref(REPO).folder / "blobs" / "x.infopt.incomplete").write_bytes(b"x" * 5000)
    before = sum(path.stat().st_size for path in hf.Ref(REPO).folder.glob("blobs/*"))
    assert left.exists()
    assert remove() == before

    begun = hf.Ref("o/begun").folder
    (begun / "blobs").mkdir(parents=True)
    (begun / "blobs" / "x.infopt.incomplete").write_bytes(b"x" * 5000)
    assert remove("hf:o/begun") == 5000
    assert not begun.exists()


def test_removing_a_damaged_repository_removes_its_folder(hub: Any) -> None:
    place = pull()
    (place / "model.safetensors").resolve().unlink()
    with pytest.raises(FetchError, match="is not on this machine"):
        remove(NAME + "@v1")
    assert remove() > 0
    assert not hf.Ref(REPO).folder.exists()


def test_refused_deletion_is_an_error(hub: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    pull()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(FetchError, match="cannot be used") as caught:
        remove()
    assert "cannot be deleted" in caught.value.why
    assert "Traceback" not in capfd.readouterr().err
    assert cached() is not None
