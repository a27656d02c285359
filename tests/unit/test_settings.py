"""A setting comes from the first place that has it, and a wrong one is refused by the name of its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from modelops.errors import RequestError
from modelops.home import Home
from modelops.settings import NAMES, Settings, usable_cores

if TYPE_CHECKING:
    from pathlib import Path


def at(home: Path, config: str = "", *, mode: Any = 0o600, **environ: Any) -> dict[str, str]:
    if config:
        (home / "config.toml").write_text(config)
        (home / "config.toml").chmod(mode)
    return {"MODELOPS_HOME": str(home), **environ}


def test_a_flag_wins_over_the_environment_which_wins_over_the_file(tmp_path: Path) -> None:
    both = at(tmp_path, "workers = 2", MODELOPS_WORKERS="3")
    assert Settings.read(both, workers=4).workers == 4
    assert Settings.read(both, workers=None).workers == 3
    assert Settings.read(at(tmp_path)).workers == 2
    (tmp_path / "config.toml").unlink()
    assert Settings.read(at(tmp_path)).workers == usable_cores()


def test_an_empty_variable_is_none(tmp_path: Path) -> None:
    assert Settings.read(at(tmp_path, MODELOPS_SERVER=" ", MODELOPS_WORKERS="")).server is None


WRONG: list[tuple[str, Any, str]] = [
    ("workers", "many", "a whole number from 1 to 10000"),
    ("workers", "0", "a whole number from 1 to 10000"),
    ("workers", "2.5", "a whole number"),
    ("port", "70000", "a whole number from 0 to 65535"),
    ("server", "localhost:8000", "must be a URL"),
    ("server", "ftp://x", "must be a URL"),
    ("server", "http://x:99999", "port"),
    ("server", "http://x:0", "port must not be 0"),
    ("server", "http://no such", "must be a URL"),
    ("server", "http://x/a b", "must be a URL"),
    ("server", "http://:8785", "must be a URL"),
    ("server", "http://a..b", "must be a URL"),
    ("server", "http://[::1", "must be a URL"),
    ("server", "http://*", "must be a URL"),
    ("scheduler", "tcp://x:8786", "tls://"),
    ("scheduler", "tls://x", "tls://"),
    ("database", "modelops.db", "must be a URL"),
    ("database", "sqlite:///jobs.db", "whole path of the file, .*: sqlite:////path/to/jobs.db"),
    ("storage", "objects", "whole path"),
    ("tls", "/no/such/folder", "has no ca.pem"),
    ("host", "http://x", "without a port"),
    ("token", "a b", "no spaces"),
    ("allowed_hosts", "a/b", "host name"),
]


@pytest.mark.parametrize(("name", "value", "why"), WRONG)
def test_a_wrong_value_is_refused_by_where_it_was_written(
    tmp_path: Path, name: str, value: str, why: str
) -> None:
    variable = f"MODELOPS_{name.upper()}"
    with pytest.raises(RequestError, match=why) as in_environ:
        getattr(Settings.read(at(tmp_path, **{variable: value})), name)
    assert variable in str(in_environ.value)
    with pytest.raises(RequestError, match=why) as in_file:
        getattr(Settings.read(at(tmp_path, f'{name} = "{value}"')), name)
    assert f"{name} in {tmp_path / 'config.toml'}" in str(in_file.value)


@pytest.mark.parametrize("name", ["database", "token"])
def test_a_wrong_secret_is_not_shown(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError) as refused:
        getattr(Settings.read(at(tmp_path, **{f"MODELOPS_{name.upper()}": "hush hush"})), name)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("value", ["true", "1.5", "-1", "[1]"])
def test_numbers_in_the_file_are_whole_numbers(tmp_path: Path, value: str) -> None:
    with pytest.raises(RequestError, match="workers in"):
        _ = Settings.read(at(tmp_path, f"workers = {value}")).workers


def test_a_name_that_is_no_setting_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"no setting 'worker'; there are {', '.join(NAMES)}"):
        Settings.read(at(tmp_path, "worker = 2"))


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not TOML"):
        Settings.read(at(tmp_path, "workers: 2"))


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="chmod 600"):
        Settings.read(at(tmp_path, 'token = "abc"', mode=0o644))
    assert Settings.read(at(tmp_path, 'token = "abc"', mode=0o600)).token == "abc"


def test_the_home_knows_another_database_and_storage(tmp_path: Path) -> None:
    plain = Home.from_environ(at(tmp_path))
    assert (plain.database_url, plain.storage) == (
        f"sqlite:///{tmp_path}/modelops.db",
        str(tmp_path / "objects"),
    )
    other = Home.from_environ(
        at(tmp_path, MODELOPS_DATABASE="postgresql+psycopg://u:secret@h/n", MODELOPS_STORAGE="s3://b/f")
    )
    assert other.database_url == "postgresql+psycopg://u:secret@h/n"
    assert other.storage == "s3://b/f"
    assert "secret" not in repr(other)


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:8785",
        "http://[::1]:8785",
        "https://10.0.0.1/m",
        "https://größe.example",
        "http://a_b.",
    ],
)
def test_whatever_can_be_asked_is_a_server_url(tmp_path: Path, url: str) -> None:
    assert Settings.read(at(tmp_path, MODELOPS_SERVER=url)).server == url


def test_a_server_url_has_no_slash_at_its_end(tmp_path: Path) -> None:
    assert Settings.read(at(tmp_path, MODELOPS_SERVER="https://x.org/m/")).server == "https://x.org/m"


@pytest.mark.parametrize(
    ("home", "says"),
    [
        ("~nobody-has-this-name/x", "no user of that name"),
        ("/data/of\nme", "a line break in its name"),
        ("/some/folder" * 41, "SQLite opens no file whose path has more than 500 bytes"),
    ],
)
def test_a_home_that_can_hold_no_data_is_refused_by_name(home: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as refused:
        Home.from_environ({"MODELOPS_HOME": home})
    assert "MODELOPS_HOME" in str(refused.value)
    Home.from_environ({"MODELOPS_HOME": "/some/folder" * 40})
