"""Aliases and names: where they end, which goes before which, and what a damaged file of aliases is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from infopt.errors import CheckpointError, FetchError
from infopt.io import hf, hub, names

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config" / "models.toml"
    path.parent.mkdir()
    monkeypatch.setenv("INFOPT_CONFIG", str(path))
    return path


def write(config: Path, **aliases: str) -> None:
    config.write_text("[models]\n" + "".join(f'"{name}" = "{target}"\n' for name, target in aliases.items()))


def test_alias_ends_at_a_hub_model_a_path_or_a_known_name(config: Path) -> None:
    write(config, a="hf:owner/name@v1", b="smollm2-135m", c="sub/model.gguf", d="/abs/folder", e="~/x.gguf", f="a")
    assert names.follow("a").at == names.follow("f").at == hf.Ref("owner/name", "v1")
    assert names.follow("b").at == "smollm2-135m"
    assert names.follow("c").at == config.parent / "sub" / "model.gguf", "from where it is written"
    assert names.follow("d").at == Path("/abs/folder")
    assert names.follow("e").at == Path.home() / "x.gguf"
    assert all(names.follow(name).alias for name in "abcdef")
    assert not names.follow("smollm2-135m").alias


def test_alias_loads(config: Path) -> None:
    write(config, mine=str(LLAMA))
    assert names.locate("mine") == LLAMA


def test_alias_goes_before_a_known_name(config: Path) -> None:
    write(config, **{"smollm2-135m": "hf:owner/name"})
    assert names.follow("smollm2-135m").at == hf.Ref("owner/name")


def test_what_is_at_a_path_goes_before_a_name(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(config, mine="hf:owner/name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert names.locate("mine") == Path("mine")


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        ({"INFOPT_CONFIG": "/a/own.toml", "XDG_CONFIG_HOME": "/b", "HOME": "/c"}, "/a/own.toml"),
        ({"INFOPT_CONFIG": "", "XDG_CONFIG_HOME": "/b", "HOME": "/c"}, "/b/infopt/models.toml"),
        ({"HOME": "/c"}, "/c/.config/infopt/models.toml"),
        ({"INFOPT_CONFIG": "~/own.toml", "HOME": "/c"}, "/c/own.toml"),
    ],
)
def test_environment_says_where_aliases_are(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], path: str
) -> None:
    for variable in ("INFOPT_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert names.config_file() == Path(path)


def test_no_file_is_no_aliases_unless_it_was_asked_for(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FetchError, match="cannot be read"):
        names.aliases()
    monkeypatch.delenv("INFOPT_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    assert names.aliases() == {}
    assert names.follow("smollm2-135m").at == "smollm2-135m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[models\n", "is not TOML"),
        ('[models]\na = "x"\na = "y"\n', "is not TOML"),
        ("a = " + "[" * 100_000, "is not TOML"),
        ("\udcff", "is not TOML"),
        ('[model]\na = "hf:o/n"\n', "unknown entry 'model'"),
        ('a = "hf:o/n"\n', "unknown entry 'a'"),
        ("models = 3\n", "models is not a table"),
        ("[models]\na = 3\n", "a stands for 3"),
        ('[models]\na = ""\n', "a stands for ''"),
        ("[models.a]\nb = 1\n", "a stands for"),
        ('[models]\n"../a" = "hf:o/n"\n', "'../a' cannot be the name"),
        ('[models]\n"a..b" = "hf:o/n"\n', "'a..b' cannot be the name"),
        ('[models]\n"hf:o/n" = "hf:p/m"\n', "'hf:o/n' cannot be the name"),
        ('[models]\n"" = "hf:p/m"\n', "'' cannot be the name"),
        ('[models]\n"a.gguf" = "hf:p/m"\n', "'a.gguf' cannot be the name"),
    ],
)
def test_damaged_file_of_aliases_is_named(config: Path, text: str, message: str) -> None:
    config.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FetchError, match=message) as caught:
        names.locate("a")
    assert str(config) in caught.value.what
    assert "\n" not in caught.value.one_line


def test_unreadable_file_of_aliases_is_named(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    write(config)
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(FetchError, match=r"cannot be read\n.*Permission denied"):
        names.follow("a")


@pytest.mark.parametrize("aliases", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}])
def test_aliases_in_a_circle_are_shown(config: Path, aliases: dict[str, str]) -> None:
    write(config, **aliases)
    with pytest.raises(FetchError, match="'a' never ends") as caught:
        names.follow("a")
    assert "a -> " in caught.value.why


def test_alias_that_leads_nowhere_suggests_a_near_name(config: Path) -> None:
    write(config, a="smolm2")
    with pytest.raises(FetchError, match="'a' stands for 'smolm2', and no model") as caught:
        names.follow("a")
    assert "did you mean 'smollm2-135m'?" in caught.value.why
    assert str(config) in caught.value.fix


def test_alias_of_an_odd_hub_name_is_refused(config: Path) -> None:
    write(config, a="hf:../x")
    with pytest.raises(FetchError, match="not the name of a model of the hub"):
        names.follow("a")


def test_alias_of_a_path_that_is_not_there_says_who_says_so(config: Path) -> None:
    write(config, a="/nowhere/x.gguf")
    with pytest.raises(FetchError, match=r"stands for /nowhere/x\.gguf") as caught:
        names.locate("a")
    assert str(config) in caught.value.why


def test_unknown_name_suggests_a_near_alias(config: Path) -> None:
    write(config, storyteller="hf:o/n")
    with pytest.raises(FetchError, match="did you mean 'storyteller'"):
        names.follow("story-teller")


@pytest.mark.parametrize(
    "name", ["", "..", "a..b", ".a", "-rf", "a b", "a\n", "a\0", "ä", "a" * 97, "a:b", "$HOME", "*"]
)
def test_odd_name_is_refused(config: Path, name: str) -> None:
    write(config)
    with pytest.raises(FetchError, match="is not a name"):
        names.follow(name)


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "~", "a\\b", "x.gguf"])
def test_path_is_no_name(config: Path, name: str) -> None:
    write(config)
    with pytest.raises(FetchError, match="is not a name") as caught:
        names.follow(name)
    assert "paths are your own" in caught.value.why


def test_path_that_is_not_there_is_told_apart_from_a_name(config: Path) -> None:
    write(config)
    with pytest.raises(CheckpointError, match=r"there is no file or folder '\./x'"):
        names.locate("./x")


def test_path_that_leads_through_a_closed_folder_says_so(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(CheckpointError, match="cannot be told") as caught:
        names.locate("closed/model.gguf")
    assert caught.value.why == "Permission denied" and "permissions" in caught.value.fix


def test_path_longer_than_names_can_be_is_refused(config: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be told|no file or folder"):
        names.locate("x" * 5000 + "/model.gguf")


def test_nothing_is_fetched_where_it_must_not_be(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(config)
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_installed", lambda source: None)
    with pytest.raises(FetchError, match="is not on this machine") as caught:
        names.locate("smollm2-135m", fetch=False)
    assert caught.value.fix == "infopt pull smollm2-135m"
