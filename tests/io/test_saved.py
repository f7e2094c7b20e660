"""Saved stacks: what is loaded is what was saved, whatever the transform; a save is whole or not at all."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import infopt as ip
from infopt import cli, ops
from infopt.errors import CheckpointError, InfoptError, ParamsError
from infopt.io import saved
from infopt.io.chat_template import ChatTemplate
from infopt.io.tokenizer import Tokenizer
from infopt.model import FAMILIES as DEFINED
from infopt.model import params_digest, stream_of
from infopt.spec import Config
from infopt.testing import EXAMPLES, FAMILIES, FULL, base_of

FIXTURE = Path(__file__).parents[1] / "fixtures"
PROMPTS = [[5, 17, 2, 44, 9, 30, 8], [3, 3, 51]]


def same_params(a: Any, b: Any) -> bool:
    """Equal in structure, formats, types and bits."""
    (one, tree), (two, other) = jax.tree.flatten(a), jax.tree.flatten(b)
    return tree == other and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(one, two))


def tiny(**sizes: int) -> ip.Model:
    """One layer: a save of it is quick."""
    base = {"layers": 1, "dim": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp": 8, "vocab": 11, "context": 32}
    return ip.models.llama(**(base | sizes))


def words(count: int) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, (count - 1, 3))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ip.Model, Any]:
    """A saved stack with packed weights, a draft and a tokenizer. Not to be changed: `damaged` gives copies."""
    model = ip.Model(tiny().spec, tokenizer=words(11))
    model = (ip.quantize(bits=4, group=4) | ip.cache_kv() | ip.speculative(ip.self_draft(), k=2))(model)
    params = model.init(jax.random.key(0))
    folder = tmp_path_factory.mktemp("stack") / "stack"
    ip.save(folder, model, params)
    return folder, model, params


@pytest.fixture
def damaged(stack: tuple[Path, ip.Model, Any], tmp_path: Path) -> Callable[..., Path]:
    """`damaged(change)`: a copy of the saved stack after `change(folder, data folder)`."""

    def make(change: Callable[[Path, Path], object]) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(stack[0], folder)
        change(folder, next(folder.glob("data-*")))
        return folder

    return make


def edit(path: Path, change: Callable[[Any], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# --------------------------------------------------------------------------------------------------- what comes back


TAKEN = [
    (family, transform)
    for family in FULL
    for transform in EXAMPLES
    if transform.name != "rotate" or not stream_of(base_of(family)[0].spec).unrotatable
]


@pytest.mark.parametrize(("family", "transform"), TAKEN, ids=lambda x: x if isinstance(x, str) else repr(x))
def test_a_saved_stack_generates_the_same_tokens(family: str, transform: ip.Transform, tmp_path: Path) -> None:
    base, base_params = base_of(family)
    try:
        model = transform(base)
    except ip.TransformOrderError:
        model = transform(ip.cache_kv()(base))
    params = model.convert(base_params)
    ip.save(tmp_path / "stack", model, params)
    loaded, loaded_params = ip.load(tmp_path / "stack")
    assert loaded.spec == model.spec
    assert loaded.recipe == model.recipe
    assert loaded.exact == model.exact
    assert repr(loaded) == repr(model)
    assert same_params(loaded_params, params)
    options: dict[str, Any] = dict(max_new=6, temperature=[0.0, 0.9], seed=4)
    want = ip.generate(model, params, PROMPTS, **options)
    assert ip.generate(loaded, loaded_params, PROMPTS, **options).tokens == want.tokens


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in FULL])
def test_every_family_is_saved_bit_for_bit(family: str, tmp_path: Path) -> None:
    base, base_params = base_of(family)
    model = (ip.quantize(bits=4, group=16) | ip.cache_kv(bits=8))(base)
    params = model.convert(base_params)
    ip.save(tmp_path / "stack", model, params)
    loaded, loaded_params = ip.load(tmp_path / "stack")
    assert (loaded.spec, loaded.recipe) == (model.spec, model.recipe)
    assert same_params(loaded_params, params)


@pytest.mark.parametrize("version", [1, 2])
def test_the_stack_of_an_older_version_is_still_read(version: int) -> None:
    folder = FIXTURE / f"saved_stack_v{version}"
    golden = json.loads((folder / "golden.json").read_text())
    model, params = ip.load(folder / "stack")
    for one in (params["target"], params["draft"]):  # what version 1 did not keep is not known
        assert np.isnan(one["segments"][0][0]["attn.q"].error).all() == (version == 1)
    assert (str(model.recipe), model.exact) == (golden["recipe"], False)
    assert repr(model).splitlines()[0] == golden["repr"].splitlines()[0]  # its figures, as they were printed then
    assert model.tokenizer.digest == golden["tokenizer"]
    out = ip.generate(model, params, golden["prompt"], max_new=len(golden["tokens"]), stop_tokens=())
    assert out.tokens == golden["tokens"]
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 200_000


def test_the_tokenizer_comes_back_with_its_digest_and_ends(stack: tuple[Path, ip.Model, Any]) -> None:
    folder, model, _ = stack
    tokenizer = ip.load(folder)[0].tokenizer
    assert tokenizer.digest == model.tokenizer.digest
    assert tokenizer.eos_ids == (10, 3)
    assert tokenizer.encode("w4 w9 w1") == [4, 9, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_params_keep_their_type(dtype: str, tmp_path: Path) -> None:
    model = tiny()
    params = jax.tree.map(lambda x: x.astype(dtype), model.init(jax.random.key(1)))
    params["embed"] = params["embed"].astype(jnp.float32)
    ip.save(tmp_path / "stack", model, params)
    assert same_params(ip.load(tmp_path / "stack")[1], params)
    with pytest.raises(CheckpointError, match=r"keep the types in which they were saved"):
        ip.load(tmp_path / "stack", dtype="bfloat16")


def test_a_draft_of_another_model_is_saved_with_its_target(tmp_path: Path) -> None:
    target, draft = ip.cache_kv()(tiny(layers=2)), ip.cache_kv()(tiny())
    model = ip.speculative(draft, k=2)(target)
    params = model.convert(target.init(jax.random.key(0)), draft=draft.init(jax.random.key(1)))
    ip.save(tmp_path / "stack", model, params)
    loaded, loaded_params = ip.load(tmp_path / "stack")
    assert loaded == model
    assert same_params(loaded_params, params)
    assert same_params(loaded.convert(loaded_params), params), "it is its own base: no draft is asked for again"
    random_pair = loaded.init(jax.random.key(2))
    assert jax.tree.structure(random_pair) == jax.tree.structure(params)


def test_a_restored_stack_takes_further_transforms(tmp_path: Path) -> None:
    base, base_params = base_of("llama")
    quantized = ip.quantize(bits=8)(base)
    ip.save(tmp_path / "stack", quantized, quantized.convert(base_params))
    loaded, params = ip.load(tmp_path / "stack")
    rest = ip.cache_kv() | ip.speculative(ip.self_draft(ip.quantize(bits=4, group=16)), k=2)
    model, want = rest(loaded), rest(quantized)
    assert model == want
    assert repr(model) == repr(want)
    assert same_params(model.convert(params), want.convert(base_params))
    assert same_params(want.convert(params, source=loaded), want.convert(base_params)), "an equal model is the ancestor"


def test_a_restored_stack_is_a_base_and_remembers_whether_it_was_exact(tmp_path: Path) -> None:
    base, base_params = base_of("llama")
    for transform, exact in ((ip.gqa(1), False), (ip.cache_kv(), True)):
        model = transform(base)
        params = model.convert(base_params)
        ip.save(tmp_path / "stack", model, params)
        loaded = ip.load(tmp_path / "stack")[0]
        assert loaded.base is loaded
        assert loaded.exact == exact
        assert ip.sliding_window(4)(loaded).exact is False
        assert same_params(loaded.convert(params), params)
    pooled = ip.cache_kv()(dataclasses.replace(ip.gqa(1)(base), parent=None, transform=None, restored_exact=False))
    assert not pooled.exact, "an exact transform does not make an inexact stack exact"
    with pytest.raises(ParamsError, match="another model or stack"):
        pooled.convert(base_params)


def test_a_family_of_ones_own_is_saved_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = DEFINED["llama"]
    monkeypatch.setitem(DEFINED, "own", dataclasses.replace(llama, name="own"))
    model = ip.Model.of(DEFINED["own"], tiny().spec.config)
    params = model.init(jax.random.key(0))
    ip.save(tmp_path / "stack", model, params)
    assert ip.load(tmp_path / "stack")[0] == model
    monkeypatch.delitem(DEFINED, "own")
    with pytest.raises(CheckpointError, match=r"no family named 'own'"):
        ip.load(tmp_path / "stack")


def test_the_librarys_families_are_known_to_a_process_that_only_loads(stack: tuple[Path, ip.Model, Any]) -> None:
    code = "import sys, infopt as ip; print(ip.load(sys.argv[1])[0])"
    run = subprocess.run([sys.executable, "-c", code, str(stack[0])], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == repr(stack[1])
    assert run.stderr == "", "nothing is remarked on"


def test_the_arrays_are_an_orbax_checkpoint_of_logical_names(stack: tuple[Path, ip.Model, Any]) -> None:
    import orbax.checkpoint as ocp

    folder, _, params = stack
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(next(folder.glob("data-*")) / "arrays")
    np.testing.assert_array_equal(arrays["embed"], params["target"]["embed"])
    stacked = params["draft"]["segments"][0][0]["attn.q"]
    np.testing.assert_array_equal(arrays["draft.layers.0.attn.q"]["scale"], stacked.scale[0])


def test_a_stack_is_saved_and_loaded_inside_a_running_event_loop(tmp_path: Path) -> None:
    model = tiny()
    params = model.init(jax.random.key(0))

    async def notebook() -> Any:  # cells run inside one
        ip.save(tmp_path / "stack", model, params)
        return ip.load(tmp_path / "stack")[1]

    assert same_params(asyncio.run(notebook()), params)


def test_loading_takes_the_memory_of_the_params_and_few_stacks(
    tmp_path: Path, anonymous_memory: Callable[[Path, str], tuple[int, int]]
) -> None:
    model = ip.models.llama(layers=12, dim=384, vocab=512, tied=False)
    ip.save(tmp_path / "stack", model, model.init(jax.random.key(0)))
    peak, own = anonymous_memory(tmp_path / "stack", "float32")
    config = model.spec.config
    stack = config.layers * config.dim * config.mlp * 4
    assert own > 4 * stack, "so that a second copy of all is seen"
    assert peak < own + 4 * stack


def test_the_command_line_continues_with_a_saved_stack(
    stack: tuple[Path, ip.Model, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFOPT_COMPILE_CACHE", "0")
    assert cli.main(["generate", str(stack[0]), "w4 w9", "--max-new", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["stack"] == repr(stack[1])


# ------------------------------------------------------------------------------------------------------ what is saved


def test_another_stacks_params_are_not_saved(tmp_path: Path) -> None:
    model = ip.quantize(bits=8)(tiny())
    with pytest.raises(ParamsError, match="dense"):
        ip.save(tmp_path / "stack", model, tiny().init(jax.random.key(0)))
    assert list(tmp_path.iterdir()) == []


def test_arrays_that_the_spec_does_not_describe_are_not_saved(tmp_path: Path) -> None:
    model = ip.quantize(bits=8)(tiny())
    params = model.init(jax.random.key(0))
    stack = params["segments"][0][0]["attn.q"]
    params["segments"][0][0]["attn.q"] = dataclasses.replace(stack, scale=stack.scale[..., :0])
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.q\.scale cannot be saved"):
        ip.save(tmp_path / "stack", model, params)
    ids = jax.tree.map(lambda x: x.astype(jnp.int32), tiny().init(jax.random.key(0)))
    with pytest.raises(CheckpointError, match=r"it is int32\[11, 8\], not float32"):
        ip.save(tmp_path / "stack", tiny(), ids)
    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class OddConfig(Config):
    """A config with a field that JSON does not bring back."""

    mlp: int
    odd: Any = None


@pytest.mark.parametrize("odd", [object(), frozenset({1}), np.float32(1)])
def test_a_config_that_json_does_not_bring_back_is_refused_at_once(
    odd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(c: Any, key: Any) -> dict[str, Any]:
        return ops.random_weights(key, {"embed": (c.vocab, c.dim), "final_norm": (c.dim,)})

    family = dataclasses.replace(DEFINED["llama"], name="odd", config=OddConfig, init=init)
    monkeypatch.setitem(DEFINED, "odd", family)
    sizes = dict(vocab=5, dim=4, layers=1, heads=1, kv_heads=1, head_dim=4, context=8, mlp=4)
    model = ip.Model.of(family, OddConfig(**sizes, odd=odd))
    with pytest.raises(CheckpointError, match="the Spec of this odd cannot be saved"):
        ip.save(tmp_path / "stack", model, model.init(jax.random.key(0)))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    model = dataclasses.replace(tiny(), tokenizer="bytes")
    with pytest.raises(CheckpointError, match="a str cannot be saved as the model's tokenizer"):
        ip.save(tmp_path / "stack", model, model.init(jax.random.key(0)))


# --------------------------------------------------------------------------------------------------- where it is saved


def test_a_saved_stack_is_replaced_and_nothing_is_left_over(tmp_path: Path) -> None:
    model = tiny()
    for seed in (0, 1):
        params = model.init(jax.random.key(seed))
        ip.save(tmp_path / "new" / "stack", model, params)
        assert same_params(ip.load(tmp_path / "new" / "stack")[1], params)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["stack"]
    assert len(list((tmp_path / "new" / "stack").iterdir())) == 2


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    model = tiny()
    params = model.init(jax.random.key(0))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ip.save(tmp_path / "link", model, params)
    assert (tmp_path / "link").is_symlink()
    assert same_params(ip.load(tmp_path / "real")[1], params)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: p.write_text("mine"), "Not a directory"),
        (lambda p: (p.mkdir(), (p / "notes.txt").write_text("mine")), "No such file"),
        (
            lambda p: (p.mkdir(), (p / "stack.json").write_text('{"mine": 1}')),
            "does not say that it is an infopt stack",
        ),
        (lambda p: (p.mkdir(), (p / "stack.json").write_text("mine")), "cannot be read"),
        (
            lambda p: (p.mkdir(), (p / "stack.json").write_text('{"format": "infopt stack", "version": 99}')),
            "newer version",
        ),
    ],
)
def test_what_is_not_a_saved_stack_is_left_alone(make: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    make(folder)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="left alone") as refused:
        ip.save(folder, tiny(), tiny().init(jax.random.key(0)))
    assert why in refused.value.why
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# A process that saves over and over, each time hindered at another of its own file operations. Each attempt is a fork,
# made before JAX has threads. An audit hook sees the operations of Python's whole standard library, orbax included.
HINDERED = """
import json, os, shutil, signal, sys
from pathlib import Path
import jax, numpy, orbax.checkpoint, infopt as ip, infopt.models, infopt.io.saved
from infopt.errors import InfoptError

root, how, old, new = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
SEEN = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}

def attempt(place, at):
    if old != "none":
        shutil.copytree(old, place / "stack")
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    events, armed = [], False
    def hook(event, args):
        if not armed or event not in SEEN or not str(args[0]).startswith(str(place)):
            return
        events.append(event)
        if len(events) == at + 1:
            if how == "KILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(int(how), os.strerror(int(how)))
    model, params = ip.load(new)
    sys.addaudithook(hook)
    code, armed = 0, True
    try:
        ip.save(place / "stack", model, params)
    except InfoptError as error:
        code = 3
    except BaseException as error:
        print(type(error), error, file=sys.stderr)
        code = 4
    armed = False
    (root / "events").write_text(" ".join(events))
    os._exit(code)

(root / "probe").mkdir()
assert attempt(root / "probe", -9) == 0
events = (root / "events").read_text().split()
points = {at + more for at, event in enumerate(events) for more in (0, 1) if event == "os.rename"}
points = sorted({0, len(events) - 1, *points, *range(1, len(events), max(1, len(events) // 4))})
done = []
for at in points:
    place = root / f"at{at:04}"
    place.mkdir()
    done.append([place.name, attempt(place, at)])
print(json.dumps(done))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the attempts are forks")
@pytest.mark.parametrize(
    ("how", "there"),
    [("KILL", "a stack"), ("KILL", "nothing"), (str(errno.ENOSPC), "a stack"), (str(errno.EACCES), "nothing")],
    ids=["killed", "killed first", "no space", "no permission at first"],
)
def test_a_save_that_ends_anywhere_leaves_the_old_stack_or_the_new_one(how: str, there: str, tmp_path: Path) -> None:
    model = tiny()
    for i, name in enumerate(("old", "new")):
        ip.save(tmp_path / name, model, model.init(jax.random.key(i)))
    digests = {name: params_digest(ip.load(tmp_path / name)[1]) for name in ("old", "new")}
    params = model.init(jax.random.key(2))
    (tmp_path / "runs").mkdir()
    old = tmp_path / "old" if there == "a stack" else "none"
    command = [sys.executable, "-c", HINDERED, str(tmp_path / "runs"), how, str(old), str(tmp_path / "new")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    attempts = json.loads(run.stdout)
    assert len(attempts) >= 8
    found = set()
    for name, code in attempts:
        place = tmp_path / "runs" / name
        assert code == -9 if how == "KILL" else code in (0, 3), f"{name}: {run.stderr}"
        if there == "nothing" and not (place / "stack").exists():
            found.add("nothing")
        else:
            digest = params_digest(ip.load(place / "stack")[1])
            found |= {name for name in digests if digests[name] == digest}
            assert digest in digests.values(), name
        left = [p.name for p in place.iterdir() if p.name != "stack"]
        if code == 3:
            assert left == [], "an error leaves nothing beside"
        assert all(p.startswith(".stack.saving-") for p in left)
        ip.save(place / "stack", model, params)  # and the next save is not hindered
        assert [p.name for p in place.iterdir()] == ["stack"], "it removes what was left"
        (data,) = place.glob("stack/data-*")
        assert data.name == json.loads((place / "stack" / "stack.json").read_text())["data"]
    assert found == ({"old", "new"} if there == "a stack" else {"nothing", "new"})


def test_a_disk_that_refuses_bytes_is_told_and_the_old_stack_stays(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    model = tiny(vocab=4000)
    params = model.init(jax.random.key(0))
    ip.save(tmp_path / "stack", model, params)
    code = (
        "import resource, sys, infopt as ip; model, params = ip.load(sys.argv[1]);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY));"
        "ip.save(sys.argv[1], model, params)"
    )
    # The embedding's 128 kB are written by orbax's own threads, where no hook of Python's sees them.
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "stack")], capture_output=True, text=True)
    assert "infopt.errors.CheckpointError" in run.stderr, run.stderr
    assert "could not be written" in run.stderr
    assert same_params(ip.load(tmp_path / "stack")[1], params)
    assert [p.name for p in tmp_path.iterdir()] == ["stack"]


# ----------------------------------------------------------------------------------------------------- hostile folders


def header(change: Callable[[Any], object]) -> Callable[[Path, Path], None]:
    return lambda folder, data: edit(folder / "stack.json", change)


def spec(change: Callable[[Any], object]) -> Callable[[Path, Path], None]:
    return header(lambda values: change(values["spec"]))


def array(change: Callable[[Any], object], name: str = "embed") -> Callable[[Path, Path], None]:
    return lambda folder, data: edit(data / "arrays" / name / ".zarray", change)


def set_(**values: Any) -> Callable[[Any], object]:
    return lambda x: x.update(values)


def linked(folder: Path, data: Path) -> None:
    shutil.move(data / "arrays" / "embed" / "0.0", folder.parent / "outside")
    (data / "arrays" / "embed" / "0.0").symlink_to(folder.parent / "outside")


def linked_folder(folder: Path, data: Path) -> None:
    shutil.move(data, folder.parent / "outside")
    data.symlink_to(folder.parent / "outside")


def piped(folder: Path, data: Path) -> None:
    (data / "arrays" / "embed" / ".zarray").unlink()
    os.mkfifo(data / "arrays" / "embed" / ".zarray")


DAMAGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "future version": (header(set_(version=3)), "newer infopt: its format has version 3, here at most 2"),
    "no version": (header(lambda x: x.pop("version")), "gives no version"),
    "version 0": (header(set_(version=0)), "gives no version"),
    "another format": (header(set_(format="zip")), "does not say that it is an infopt stack"),
    "cut JSON": (lambda f, d: (f / "stack.json").write_text((f / "stack.json").read_text()[:99]), "cannot be read"),
    "not UTF-8": (lambda f, d: (f / "stack.json").write_bytes(b"\xff" * 20), "cannot be read"),
    "a list": (lambda f, d: (f / "stack.json").write_text("[]"), "not a JSON object"),
    "nested": (lambda f, d: (f / "stack.json").write_text("[" * 200_000), "cannot be read"),
    "huge JSON": (lambda f, d: os.truncate(f / "stack.json", 1 << 40), "has 1099511627776 bytes"),
    "no Spec": (header(lambda x: x.pop("spec")), "KeyError: 'spec'"),
    "Spec of text": (header(set_(spec="llama")), "a value is of another kind"),
    "recipe of numbers": (header(set_(recipe=[[1, 2]])), "a value is of another kind"),
    "exact by text": (header(set_(exact="yes")), "a value is of another kind"),
    "ends by text": (header(lambda x: x["tokenizer"].update(eos_ids=["a"])), "a value is of another kind"),
    "data above": (header(set_(data="../stack")), "a value is of another kind"),
    "data elsewhere": (header(set_(data="/etc")), "a value is of another kind"),
    "no such data": (header(set_(data="data-0123456789abcdef")), "no folder data-0123456789abcdef"),
    "unknown family": (spec(set_(family="gpt9")), "no family named 'gpt9'"),
    "unknown field": (spec(lambda x: x["config"].update(tail=1)), "tail"),
    "config of text": (spec(set_(config="big")), "not a Spec"),
    "heads by text": (spec(lambda x: x["config"].update(norm_eps="a")), "of another kind"),
    "endless eps": (spec(lambda x: x["config"].update(norm_eps=float("inf"))), "of another kind"),
    "no heads": (spec(lambda x: x["config"].update(heads=0)), "not a positive whole number"),
    "many layers": (spec(lambda x: x["config"].update(layers=10**9)), "too few for 1000000000 layers"),
    "great vocabulary": (spec(lambda x: x["config"].update(vocab=2**31 - 1)), "2147483647"),
    "beyond bounds": (spec(lambda x: x["config"].update(dim=10**30)), "beyond all bounds"),
    "no windows": (spec(set_(window=[])), "0 windows for 1 layers"),
    "empty window": (spec(set_(window=[{"size": 0, "sinks": 0}])), "a window is empty"),
    "window of text": (spec(set_(window=[{"size": "a", "sinks": 0}])), "of another kind"),
    "packed twice": (spec(lambda x: x["weights"].append(x["weights"][-1])), "packs a weight twice"),
    "packed unknown": (spec(lambda x: x["weights"].append(["zzz", x["weights"][0][1]])), "no matrix of this model"),
    "packed norm": (
        spec(lambda x: x["weights"].append(["layers.0.mlp_norm", x["weights"][0][1]])),
        "packs a weight twice, or one that is no matrix",
    ),
    "unknown packing": (spec(lambda x: x["weights"][0][1].update(name="int7")), "unknown weight format"),
    "group that divides not": (spec(lambda x: x["weights"][0][1].update(group=6)), "does not divide"),
    "scales of text": (spec(lambda x: x["weights"][0][1].update(scale="string")), "scales of an unknown type"),
    "a table's inputs": (
        spec(lambda x: x["weights"].insert(0, ["embed", x["weights"][0][1] | {"activations": 8}])),
        "rounds the inputs of a table",
    ),
    "inputs of 4 bits": (spec(lambda x: x["weights"][0][1].update(activations=4)), "activations of 4 bits"),
    "another group": (spec(lambda x: x["weights"][0][1].update(group=8)), "and its Spec says [4, 1]"),
    "pages of nothing": (spec(set_(page=0)), "pages of 0 slots"),
    "turned norm": (spec(set_(online=["attn_norm"])), "turns the input of what is no matrix"),
    "turned twice": (spec(set_(online=["mlp.down", "mlp.down"])), "turns the input of what is no matrix"),
    "turned number": (spec(set_(online=[1])), "of another kind"),
    "guesses nothing": (spec(lambda x: x["program"].update(k=0)), "guesses nothing"),
    "draft's words": (spec(lambda x: x["program"]["draft"]["config"].update(vocab=12)), "12 words, the model 11"),
    "draft's draft": (
        spec(lambda x: x["program"]["draft"].update(program=copy.deepcopy(x["program"]))),
        "speculative itself",
    ),
    "checksums by number": (header(set_(checksums=7)), "a value is of another kind"),
    "a checksum untold": (header(lambda x: x["checksums"].pop("embed")), "embed holds other values than were saved"),
    "another checksum": (
        header(lambda x: x["checksums"].update(embed="0")),
        "embed holds other values than were saved",
    ),
    "no tokenizer": (lambda f, d: (d / "tokenizer.json").unlink(), "tokenizer.json: No such file"),
    "damaged tokenizer": (lambda f, d: (d / "tokenizer.json").write_text("{}"), "not a tokenizer"),
    "another tokenizer": (
        lambda f, d: (d / "tokenizer.json").write_text(words(12).backend.to_str()),
        "another vocabulary than was saved",
    ),
    "no arrays": (lambda f, d: shutil.rmtree(d / "arrays"), "no folder arrays"),
    "a missing array": (lambda f, d: shutil.rmtree(d / "arrays" / "embed"), "no folder embed"),
    "a missing chunk": (lambda f, d: (d / "arrays" / "embed" / "0.0").unlink(), "0.0: No such file"),
    "a missing table": (lambda f, d: (d / "arrays" / "_METADATA").unlink(), "_METADATA: No such file"),
    "a cut chunk": (lambda f, d: os.truncate(d / "arrays" / "embed" / "0.0", 8), "embed has 8 bytes, not 352"),
    "a grown chunk": (
        lambda f, d: os.truncate(d / "arrays" / "embed" / "0.0", 1 << 40),
        "embed has 1099511627776 bytes",
    ),
    "another shape": (array(set_(shape=[11, 9])), "embed has shape [11, 9], and its Spec says [11, 8]"),
    "great chunks": (array(set_(chunks=[1 << 20, 1 << 20])), "stored in another way"),
    "compression": (array(set_(compressor={"id": "zstd"})), "stored in another way"),
    "another type": (array(set_(dtype="<i4")), "of type '<i4'"),
    "floats for codes": (array(set_(dtype="<f4"), "layers.0.attn.q.codes"), "of type '<f4', not uint8"),
    "type by number": (array(set_(dtype=3)), "of type 3"),
    "an array too many": (
        lambda f, d: edit(
            d / "arrays" / "_METADATA",
            lambda x: x["tree_metadata"].update(
                more={"key_metadata": [{"key": "../../x"}], "value_metadata": {"value_type": "np.ndarray"}}
            ),
        ),
        "does not use, '../../x'",
    ),
    "an array untold": (
        lambda f, d: edit(d / "arrays" / "_METADATA", lambda x: x["tree_metadata"].popitem()),
        "which its Spec asks for",
    ),
    "another storage": (
        lambda f, d: edit(d / "arrays" / "_METADATA", set_(use_ocdbt=True)),
        "stored in another way than save writes",
    ),
    "a table of text": (lambda f, d: (d / "arrays" / "_METADATA").write_text('{"tree_metadata": 3}'), "_METADATA"),
    "a link": (linked, "0.0 is not a plain file"),
    "a link for the data": (linked_folder, "no folder data-"),
    "a pipe": (piped, ".zarray is not a plain file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_hostile_folder_is_refused_with_its_reason(damage: str, damaged: Callable[..., Path]) -> None:
    change, reason = DAMAGES[damage]
    folder = damaged(change)
    with pytest.raises(CheckpointError) as refused:
        ip.load(folder)
    assert reason in refused.value.one_line
    assert refused.value.fix


def test_one_bit_of_any_array_that_flips_is_an_error(damaged: Callable[..., Path]) -> None:
    folder = damaged(lambda f, d: None)
    rng = random.Random(1)
    files = sorted(folder.glob("data-*/arrays/*/[0-9]*"))
    assert {f.parent.name for f in files} >= {"embed", "layers.0.attn.q.codes", "draft.layers.0.mlp.up.scale"}
    for path in files:
        before = path.read_bytes()
        after = bytearray(before)
        after[rng.randrange(len(after))] ^= 1 << rng.randrange(8)
        path.write_bytes(after)
        with pytest.raises(CheckpointError) as refused:
            ip.load(folder)
        assert f"{path.parent.name} holds other values than were saved" in refused.value.why
        path.write_bytes(before)
    ip.load(folder)


def test_a_checksum_is_that_of_the_arrays_file(stack: tuple[Path, ip.Model, Any]) -> None:
    folder, _, _ = stack
    sums = json.loads((folder / "stack.json").read_text())["checksums"]
    files = {path.parent.name: path for path in folder.glob("data-*/arrays/*/[0-9]*")}
    assert sums == {name: f"{zlib.crc32(path.read_bytes()):08x}" for name, path in files.items()}


def test_a_stack_without_checksums_is_read_unverified(damaged: Callable[..., Path]) -> None:
    assert "checksums" not in json.loads((FIXTURE / "saved_stack_v1" / "stack" / "stack.json").read_text())
    folder = damaged(header(lambda x: x.pop("checksums")))
    chunk = next(folder.glob("data-*/arrays/embed/0.0"))
    chunk.write_bytes(bytes(352))
    assert not np.any(ip.load(folder)[1]["target"]["embed"])


def test_the_undamaged_copy_loads(damaged: Callable[..., Path], stack: tuple[Path, ip.Model, Any]) -> None:
    assert same_params(ip.load(damaged(lambda f, d: None))[1], stack[2])


def test_random_damage_gives_our_error_or_a_whole_stack(damaged: Callable[..., Path]) -> None:
    folder = damaged(lambda f, d: None)
    files = [folder / "stack.json", *folder.glob("data-*/arrays/_*"), *folder.glob("data-*/arrays/*/.zarray")]
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        path = rng.choice(files[:3] * 8 + files)
        before = path.read_bytes()
        after = bytearray(before)
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(len(after))
            kind = rng.randrange(3)
            if kind == 0:
                after[at] = rng.randrange(256)
            elif kind == 1:
                del after[at : at + rng.randrange(1, 9)]
            else:
                after[at:at] = rng.choice((b"9", b"-", b"null", b'"', b"[", b"{}", b"1e999", b"true", b"0"))
        path.write_bytes(after)
        try:
            ip.load(folder)
        except InfoptError as error:
            refused += 1
            assert error.fix
        path.write_bytes(before)
    assert refused > 100
    assert saved.load(folder, "float32")


def test_the_chat_template_comes_back(tmp_path: Path) -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", "{{ tools }}", {"bos_token": "<s>"})
    model = dataclasses.replace(tiny(), tokenizer=dataclasses.replace(words(11), template=template))
    ip.save(tmp_path / "stack", model, model.init(jax.random.key(0)))
    tokenizer = ip.load(tmp_path / "stack")[0].tokenizer
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == "<s>Hi"
    assert tokenizer.template.tool_use == "{{ tools }}"


@pytest.mark.parametrize("template", [3, {"source": "x"}, {"source": 1, "tool_use": None, "special": {}}], ids=str)
def test_a_damaged_chat_template_is_refused(template: Any, tmp_path: Path) -> None:
    model = dataclasses.replace(tiny(), tokenizer=words(11))
    ip.save(tmp_path / "stack", model, model.init(jax.random.key(0)))
    header = json.loads((tmp_path / "stack" / "stack.json").read_text())
    header["tokenizer"]["template"] = template
    (tmp_path / "stack" / "stack.json").write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match="the chat template"):
        ip.load(tmp_path / "stack")
