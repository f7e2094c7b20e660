"""`infopt pull`, `list`, `show` and `rm`: what they print, what they delete, and what they refuse to."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infopt import cli
from infopt.errors import human
from infopt.io import hf, hub

FIXTURES = Path(__file__).parent / "fixtures"
FILE = b"GGUF" * 500


def files(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (FIXTURES / name).iterdir() if path.suffix != ".npz"}


@pytest.fixture
def server(hub_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub with `hf:owner/tiny`, and one name of infopt's own, "own-1b", that is not here yet."""
    hub_server.put("owner/tiny", files("llama"))
    digest = hashlib.sha256(FILE).hexdigest()
    source = hub.Source("own-model", "1.0", "own_model/own.gguf", digest, 0, digest, len(FILE))
    monkeypatch.setattr(hub, "NAMES", {"own-1b": source})
    return hub_server


@pytest.fixture
def config(server: Any, tmp_path: Path) -> Path:
    return tmp_path / "models.toml"


def put_own() -> Path:
    path = hub.kept("own-1b")
    path.parent.mkdir(parents=True)
    path.write_bytes(FILE)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that works prints."""
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command which does not work prints."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "; why: " in err
    assert "; fix: " in err
    return err


def test_pulled_model_is_listed_shown_and_removed(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    name, size = "hf:owner/tiny", sum(map(len, files("llama").values()))
    assert run(capsys, "pull", name).startswith(f"{name}: {human(size)} in {hf.cache_folder()}")

    head, *lines = run(capsys, "list").splitlines()
    assert head.split() == ["NAME", "SIZE", "MODIFIED", "WHERE"]
    (line,) = [line.split() for line in lines if line.startswith(name)]
    assert line[1:3] == human(size).split()
    assert line[3] == time.strftime("%Y-%m-%d")
    assert Path(line[5]) == hf.cached(hf.Ref.parse(name))

    assert "family      llama" in run(capsys, "show", name)
    assert run(capsys, "rm", name) == f"{name}: {human(size)} freed\n"
    assert name not in run(capsys, "list")
    assert "is not on this machine" in fail(capsys, "rm", name)


def test_show_says_what_the_file_says(server: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in files("llama_tied").items():
        (folder / name).write_bytes(data)
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\nlicense: other\n")
    shown = dict(line.split(maxsplit=1) for line in run(capsys, "show", str(folder)).splitlines())
    config = json.loads(files("llama_tied")["config.json"])
    assert shown["licence"] == "apache-2.0"
    assert shown["context"] == f"{config['max_position_embeddings']:,} tokens"
    assert shown["tokenizer"] == "none"
    assert f"dim={config['hidden_size']}, layers={config['num_hidden_layers']}" in shown["config"]
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * 4 * config["num_hidden_layers"] * heads * head_dim
    assert shown["cache"].startswith(f"{token:,} bytes a token in float32, ")

    from infopt.io import load

    _, params = load(folder)
    import jax

    assert shown["parameters"] == f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"


@pytest.mark.parametrize(
    ("cards", "licence"),
    [
        ({"README.md": "---\ntags: [x]\nlicense: apache-2.0\n---\nlicense: mit\n"}, "apache-2.0"),
        ({"README.md": "---\r\nlicense: 'mit'\r\n---\r\n"}, "mit"),
        ({"README.md": "---\nlicense: other\nlicense_name: llama3.1\n---\n"}, "other (llama3.1)"),
        ({"README.md": "---\ntags: [x]\n---\n", "LICENSE": "\n  MIT License\n\nof 2020"}, "MIT License"),
        ({"LICENSE.txt": "\x1b[2J" + "A" * 300}, "[2J" + "A" * 96),
        ({"README.md": "license: mit", "LICENSE": " \n"}, None),
        ({}, None),
    ],
    ids=["card", "other line ends", "a name of its own", "text", "hostile", "nothing said", "none"],
)
def test_licence_of_a_pulled_model_is_printed(
    cards: dict[str, str], licence: str | None, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("owner/tiny", files("llama") | {name: text.encode() for name, text in cards.items()})
    pulled = run(capsys, "pull", "hf:owner/tiny")
    assert pulled.partition("; licence: ")[2] == (f"{licence}\n" if licence else "")
    shown = dict(line.split(maxsplit=1) for line in run(capsys, "show", "hf:owner/tiny").splitlines())
    assert shown["licence"] == (licence or "the files do not say")


def test_show_counts_the_bytes_of_each_type(server: Any, capsys: pytest.CaptureFixture[str], smollm2: Path) -> None:
    from infopt.io import gguf

    shown = dict(line.split(maxsplit=1) for line in run(capsys, "show", str(smollm2)).splitlines())
    assert shown["weights"].startswith("Q4_1 66.4 MB (210), Q8_0 30.1 MB (1), F32 141 kB (61)")
    assert shown["licence"] == "apache-2.0"
    assert shown["parameters"] == "134,515,008"
    assert shown["tokenizer"] == "49,152 tokens, ends a text at [2]"
    tensors = gguf.open_file(smollm2).tensors.values()
    assert sum(tensor.rows.nbytes for tensor in tensors) < smollm2.stat().st_size


SAVED = {
    "gqa(1) | quantize(bits=8, where='*.mlp.*') | cache_kv(bits=8)": ["int8 ", "float32 "],
    "cache_kv() | speculative(draft=self_draft(quantize(bits=4, group=16)), k=2)": ["float32 ", "int4 "],
    "sliding_window(8)": ["float32 "],
}


@pytest.mark.parametrize("stack", SAVED)
def test_show_says_what_a_saved_stack_is_without_its_arrays(
    stack: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    import infopt as ip
    from infopt.io.checkpoint import LazyWeights

    model = ip.parse_stack(stack)(ip.models.llama(layers=2, dim=32, heads=2, kv_heads=2, head_dim=16, mlp=32, vocab=61))
    params = model.init(jax.random.key(0))
    ip.save(tmp_path / "stack", model, params)
    monkeypatch.setattr(LazyWeights, "__getitem__", lambda self, key: pytest.fail(f"{key} was read"))
    shown = dict(line.split(maxsplit=1) for line in run(capsys, "show", str(tmp_path / "stack")).splitlines())
    assert shown["stack"] == f"{model.recipe}, {'exact' if model.exact else 'not exact'}"
    assert shown["family"] == "llama" and "layers=2" in shown["config"]
    cached = model if model.spec.cache else ip.cache_kv()(model)
    assert shown["cache"].startswith(f"{cached.token_bytes():,} bytes a token")
    listed, _, _ = shown["weights"].partition(":")
    kinds = {kind for kind in SAVED[stack] if kind in f"{listed} "}
    assert kinds == {*SAVED[stack]}
    assert ("of its draft" in shown["parameters"]) == ("speculative" in stack)
    from infopt.io import saved

    stored = saved.open_stack(tmp_path / "stack", "keep").stored
    assert sum(size for _, size in stored.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_show_fetches_nothing(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("hf:owner/tiny", "own-1b"):
        assert f"fix: infopt pull {name}" in fail(capsys, "show", name)
    assert server.asked == []


def test_own_name_is_listed_before_and_after_it_is_here(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not here: infopt pull own-1b" in run(capsys, "list")
    path = put_own()
    assert str(path) in run(capsys, "list")
    assert run(capsys, "pull", "own-1b") == f"own-1b: 2 kB in {path}\n"
    assert run(capsys, "rm", "own-1b") == "own-1b: 2 kB freed\n"
    assert not path.exists()
    assert "own-1b is not on this machine" in fail(capsys, "rm", "own-1b")


def test_installed_package_is_listed_and_not_deleted(
    server: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "site" / "own_model" / "own.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(FILE)
    (path.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert str(path) in run(capsys, "list")
    assert "fix: pip uninstall own-model" in fail(capsys, "rm", "own-1b")
    assert path.exists()


def test_alias_is_pulled_listed_and_its_model_removed(
    config: Path, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text('[models]\ntiny = "hf:owner/tiny"\nlost = "nowhere"\n')
    assert "hf:owner/tiny (not here)" in run(capsys, "list")
    run(capsys, "pull", "tiny")
    lines = [line.split() for line in run(capsys, "list").splitlines()]
    assert ["tiny", "hf:owner/tiny"] in [[line[0], line[-1]] for line in lines]
    assert any(line[0] == "lost" and "no model is called that" in " ".join(line) for line in lines)
    assert cli.main(["rm", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("tiny: ")
    assert str(config) in err, "the alias stays"
    assert hf.entries() == []


def test_users_own_files_are_neither_fetched_nor_deleted(
    config: Path, server: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_bytes(files("llama")["config.json"])
    config.write_text(f'[models]\nmine = "{own}"\n')
    assert str(own) in run(capsys, "list")
    for command in ("rm", "pull"):
        assert "your own files are not infopt's" in fail(capsys, command, "mine")
        assert "paths are your own" in fail(capsys, command, str(own))
    assert (own / "config.json").exists()


@pytest.mark.parametrize("command", ["pull", "rm"])
@pytest.mark.parametrize("name", ["../x", "a/../b", "hf:../x/y", "hf:a/..", "a b", "", "hf:a/b@..", "-"])
def test_odd_names_are_refused(server: Any, capsys: pytest.CaptureFixture[str], command: str, name: str) -> None:
    assert "not " in fail(capsys, command, name)
    assert server.asked == []


@pytest.mark.parametrize("command", ["pull", "rm", "show"])
def test_unknown_name_suggests_a_near_one(server: Any, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert "did you mean 'own-1b'?" in fail(capsys, command, "own1b")


def test_unfinished_pull_is_listed_and_removed(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hf.Ref("owner/tiny").folder / "blobs"
    folder.mkdir(parents=True)
    (folder / "x.infopt.incomplete").write_bytes(FILE)
    assert "unfinished: infopt pull hf:owner/tiny" in run(capsys, "list")
    assert run(capsys, "rm", "hf:owner/tiny") == "hf:owner/tiny: 2 kB freed\n"


def test_several_names_stop_at_the_first_that_fails(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pull", "hf:owner/tiny", "hf:owner/none", "own-1b"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("hf:owner/tiny: ")
    assert "shows no model owner/none" in err


def test_list_pull_and_rm_need_no_jax(server: Any) -> None:
    code = (
        "import sys\nfrom infopt import cli\n"
        "for line in (['pull', 'hf:owner/tiny'], ['list'], ['rm', 'hf:owner/tiny']):\n"
        "    assert cli.main(line) == 0\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FIXTURES.parents[1])
    assert (done.returncode, done.stderr) == (0, "")
    assert "hf:owner/tiny" in done.stdout


def test_progress_bars_are_for_terminals(server: Any) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("a terminal is made by Linux's pty")
    import pty
    import termios

    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    command = [sys.executable, "-m", "infopt", "pull", "hf:owner/tiny"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=follower, cwd=FIXTURES.parents[1])
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 4096):
            shown += chunk
    except OSError:  # how Linux tells that the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0
    assert b"model.safetensors" in shown
    assert b"100%" in shown
