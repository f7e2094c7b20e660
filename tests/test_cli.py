"""The command line: what it prints and where, its exit codes, and that a mistake costs one line."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import infopt as ip
from infopt import cli
from infopt.errors import FetchError

PROMPT = "The history of the steam engine begins in the first century, when"


def python(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **kwargs)


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a setting of the whole process, which other tests share."""
    monkeypatch.setenv("INFOPT_COMPILE_CACHE", "0")


@dataclasses.dataclass
class Chunk:
    row: int
    text: str
    tokens: list[int]


@dataclasses.dataclass
class Generation:
    text: str = " the Romans"
    tokens: tuple[int, ...] = (260, 12990)
    logprobs: tuple[float, ...] | None = (-0.5, -1.0)
    finish: str = "length"
    prompt_tokens: int = 1
    new_tokens: int = 2
    compile_seconds: float = 1.5
    tokens_per_second: float = 30.0
    prefill_tokens_per_second: float = 200.0
    acceptance: float | None = None
    tokens_per_round: float = 1.0


class FakeModel:
    """Stands for a model, so that what the command line itself does is tested without one."""

    def __repr__(self) -> str:
        return "llama 30 x 576 | bare\n  4 bytes a weight"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the library under `infopt generate`; returns what `ip.generate` was called with."""
    called: dict[str, Any] = {}

    def generate(model: Any, params: Any, prompt: str, *, callback: Callable[[Chunk], None], **options: Any) -> Any:
        called.update(options, prompt=prompt)
        callback(Chunk(0, " the", [260]))
        if "interrupt" in prompt:
            raise KeyboardInterrupt
        callback(Chunk(0, " Romans", [12990]))
        return called.get("out", Generation())

    monkeypatch.setattr(cli, "_prepare_jax", lambda: None)
    monkeypatch.setattr(ip, "load", lambda name, dtype: (FakeModel(), {}), raising=False)
    monkeypatch.setattr(ip, "generate", generate, raising=False)
    return called


def test_text_goes_to_stdout_after_its_prompt_and_figures_to_stderr(
    fake: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "m", "So", "--stack", "none"]) == 0
    out, err = capsys.readouterr()
    assert out == "So the Romans\n"
    assert err.count("\n") == 1
    assert "1 + 2 tokens; " in err
    assert "1.5 s of them compiling; " in err
    assert "prefill 200.0 tokens/s; decode 30.0 tokens/s" in err
    assert "acceptance" not in err


@pytest.mark.parametrize("flags", [["--no-stream"], []])
def test_prompt_is_left_out_on_request(
    fake: dict[str, Any], capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert cli.main(["generate", "m", "So", "--stack", "none", "--no-echo", "--no-stats", *flags]) == 0
    assert capsys.readouterr() == (" the Romans\n", "")


def test_acceptance_is_reported_under_speculation(fake: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    fake["out"] = Generation(acceptance=0.75, tokens_per_round=4.0)
    assert cli.main(["generate", "m", "So", "--stack", "none"]) == 0
    assert "acceptance 0.75, 4.00 tokens a round" in capsys.readouterr().err


def test_every_option_reaches_generate(fake: dict[str, Any]) -> None:
    sampling = {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 3,
        "max_new": 7,
        "max_len": 99,
    }
    flags = [part for key, value in sampling.items() for part in ("--" + key.replace("_", "-"), str(value))]
    assert cli.main(["generate", "m", "So", "--stack", "none", "--stop", "a", "--stop", "b", *flags]) == 0
    assert {key: fake[key] for key in sampling} == sampling
    assert fake["stop"] == ("a", "b")


def test_json_is_one_object_on_stdout_and_nothing_else(
    fake: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "m", "So", "--stack", "none", "--json", "--logprobs"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert err == ""
    assert (record["prompt"], record["text"], record["tokens"]) == ("So", " the Romans", [260, 12990])
    assert record["logprobs"] == [-0.5, -1.0]
    assert fake["logprobs"]


def test_dash_reads_the_prompt_from_standard_input(
    fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("Dear Sir,")
    with open(tmp_path / "prompt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert cli.main(["generate", "m", "-", "--stack", "none"]) == 0
    assert fake["prompt"] == "Dear Sir,"


def test_interrupt_keeps_the_text_so_far_and_exits_130(
    fake: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "m", "interrupt", "--stack", "none"]) == 130
    assert capsys.readouterr() == ("interrupt the", "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "smollm2-135", PROMPT], "did you mean 'smollm2-135m'?"),
        (["generate", "./absent.gguf", PROMPT], "./absent.gguf"),
        (["generate", "smollm2-135m", PROMPT, "--stack", "cache_kv(bits=().__class__)"], "code"),
        (["generate", "smollm2-135m", PROMPT, "--stack", "cash_kv()"], "cache_kv"),
        (["generate", "smollm2-135m", PROMPT, "--stack", "cache_kv("], "cache_kv("),
        (["generate", "smollm2-135m", PROMPT, "--logprobs"], "add --json"),
    ],
)
def test_mistake_costs_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("infopt: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return ip.load("smollm2-135m", "keep")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "prompt 0 is empty"),
        (["So", "--max-new", "9000"], "exceed the model's context of 8192"),
        (["So", "--max-len", "4"], "do not fit max_len=4"),
        (["So", "--temperature", "-1"], "temperature=-1.0 is out of range"),
        (["So", "--top-p", "0"], "top_p=0.0 is out of range"),
        (["So", "--top-p", "1.5"], "top_p=1.5 is out of range"),
        (["So", "--stack", "paged(16)"], "needs a cache"),
        (["So", "--stack", "quantize(bits=4) | gqa(1)"], "needs dense weights"),
        (["So", "--stack", "cache_kv() | cache_kv()"], "has a cache already"),
        (["So", "--stack", "speculative(self_draft())"], "needs a cache"),
    ],
    ids=str,
)
def test_what_a_real_model_cannot_serve_costs_one_line_that_says_what_why_and_the_fix(
    smollm2: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(ip, "load", lambda name, dtype: smollm2, raising=False)
    assert cli.main(["generate", "smollm2-135m", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("infopt: ")
    assert err.count("\n") == 1
    assert message in err
    assert "; why: " in err
    assert "; fix: " in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generat"],
        ["generate"],
        ["generate", "m", "p", "--seed", "x"],
        ["matrix", "--depth", "many"],
        ["matrix", "--processes", "0"],
        ["bench", "generate", "--repeats", "0"],
    ],
    ids=str,
)
def test_misused_option_costs_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "; why: " in err
    assert "--help" in err


def test_stacks_are_of_no_other_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "generate", "--stack", "quantize(bits=8)"]) == 2
    assert "fix: leave it out" in capsys.readouterr().err


def test_prompt_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    with open(tmp_path / "prompt", "rb") as stdin:
        done = python(
            "-m", "infopt", "generate", "smollm2-135m", "-", stdin=stdin,
            env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Unicode" in done.stderr


def test_interrupt_within_an_import_waits_for_its_end() -> None:
    # a shell's background job inherits that the signal is ignored
    before, done = signal.signal(signal.SIGINT, signal.default_int_handler), []
    try:
        with pytest.raises(KeyboardInterrupt), cli._interrupts_held():
            signal.raise_signal(signal.SIGINT)
            done.append(True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done


def test_error_of_the_disk_is_one_line_too(
    fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, dtype: str) -> None:
        raise OSError(5, "Input/output error", name)

    monkeypatch.setattr(ip, "load", fail, raising=False)
    assert cli.main(["generate", "m", "So"]) == 2
    assert capsys.readouterr().err == "infopt: [Errno 5] Input/output error: 'm'\n"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["matrix", "--help"], ["bench", "--help"]])
def test_help_shows_examples(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: infopt" in out
    if arguments != ["--help"]:
        assert f"  infopt {arguments[0]}" in out


def test_help_and_mistakes_do_not_wait_for_jax() -> None:
    code = """
import sys
from infopt import cli
try:
    cli.main(sys.argv[1:])
finally:
    print('jax' in sys.modules, file=sys.stderr)
"""
    for arguments in (["--version"], ["--help"], ["generate"]):
        assert python("-c", code, *arguments).stderr.endswith("False\n"), arguments


def test_module_is_the_command() -> None:
    done = python("-m", "infopt", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("infopt ")


def test_reader_that_goes_away_is_no_error() -> None:
    code = """
import sys
from infopt import cli
def write(args):
    for _ in range(10_000):
        print("x" * 100)
    return 0
cli._generate = write
sys.exit(cli.main(["generate", "m", "p"]))
"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_interrupt_of_the_process_leaves_no_traceback() -> None:
    code = """
import signal, sys, time
from infopt import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
def wait(args):
    print("ready", flush=True)
    time.sleep(60)
cli._generate = wait
sys.exit(cli.main(["generate", "m", "p"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "\n")


def test_compilation_cache_lies_in_the_cache_folder_and_can_be_turned_off(tmp_path: Path) -> None:
    code = "from infopt import cli; cli._prepare_jax(); import jax; print(jax.config.jax_compilation_cache_dir)"
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("INFOPT_", "JAX_"))}
    plain["INFOPT_CACHE"] = str(tmp_path)
    for extra, folder in [
        ({}, str(tmp_path / "xla")),
        ({"INFOPT_COMPILE_CACHE": "0"}, "None"),
        ({"JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
    ]:
        assert python("-c", code, env=plain | extra).stdout.strip() == folder


def test_smollm2_tells_of_the_romans(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "smollm2-135m", PROMPT, "--max-new", "16"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(PROMPT + " the Romans built the first steam engine. The first steam engine")
    assert "decode" in err


def test_error_of_the_library_is_shown_with_its_fix(
    fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, dtype: str) -> None:
        raise FetchError("it is gone.", why="of the\nnetwork", fix="wait")

    monkeypatch.setattr(ip, "load", fail, raising=False)
    assert cli.main(["generate", "m", "So"]) == 2
    assert capsys.readouterr().err == "infopt: it is gone; why: of the network; fix: wait\n"
