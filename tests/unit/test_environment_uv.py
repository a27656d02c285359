"""What uv's words mean: final, worth a retry, or a matter of storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelops.environments.uv import explain, shorten, uv_environ
from modelops.errors import IndexUnreachableError, InternalError, ModelOpsError, ResolutionError, StorageError

NO_SUCH = (
    "Resolved 2 packages in 91ms\n"
    "error: No solution found when resolving dependencies\n"
    "  cause: Because nope was not found in the package registry and you require nope, we can conclude that "
    "your requirements are unsatisfiable.\n"
)
BUILD_FAILED = (
    "error: Failed to build `x==1`\n"
    "  cause: The build backend returned an error\n"
    "  cause: Call to `setuptools.build_meta.build_wheel` failed (exit status: 1)\n\n"
    "[stderr]\nConnectionRefusedError: Connection refused\nNo space left on device (os error 28)\n"
)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (NO_SUCH, ResolutionError),
        (BUILD_FAILED, ResolutionError),
        ("error: Hash mismatch for `six==1.17.0`\n", ResolutionError),
        ("", ResolutionError),
        (
            "error: Request failed after 3 retries in 10.7s\n  cause: tcp connect error\n",
            IndexUnreachableError,
        ),
        ("error: Failed to fetch: http://x\n  cause: dns error\n", IndexUnreachableError),
        ("error: HTTP status server error (503 Service Unavailable) for url (x)\n", IndexUnreachableError),
        ("error: HTTP status client error (429 Too Many Requests) for url (x)\n", IndexUnreachableError),
        ("error: HTTP status client error (403 Forbidden) for url (x)\n", ResolutionError),
        (
            "error: x\n\nhint: Packages were unavailable because the network was disabled.\n",
            IndexUnreachableError,
        ),
        ("error: failed to copy file\n  cause: No space left on device (os error 28)\n", StorageError),
        ("error: failed to open file\n  cause: Permission denied (os error 13)\n", StorageError),
        ("error: unexpected argument '--nope' found\n", InternalError),
    ],
)
def test_uvs_output_is_told_apart(output: str, expected: type[ModelOpsError]) -> None:
    error = explain(output, 1, what="m/requirements.txt", volume=Path("/srv/cache"))

    assert type(error) is expected
    assert shorten(output) in str(error)
    if expected is StorageError:
        assert "/srv/cache" in str(error)


def test_a_killed_uv_is_neither_final_nor_the_bundles_fault() -> None:
    error = explain("", -9, what="m", volume=Path("/srv"))

    assert isinstance(error, StorageError)
    assert "SIGKILL" in str(error)


def test_progress_before_the_error_is_left_out() -> None:
    assert shorten(NO_SUCH).startswith("error: No solution")


def test_settings_of_the_user_reach_uv_and_those_of_another_project_do_not() -> None:
    environ = uv_environ(
        {
            "UV_DEFAULT_INDEX": "https://ours",
            "PIP_INDEX_URL": "https://pips",
            "HTTPS_PROXY": "http://proxy",
            "SSL_CERT_FILE": "/certs",
            "VIRTUAL_ENV": "/venv",
            "UV_PROJECT_ENVIRONMENT": "/venv",
            "UV_PREVIEW_FEATURES": "x",
        }
    )

    assert environ["UV_DEFAULT_INDEX"] == "https://ours"
    assert environ["HTTPS_PROXY"] == "http://proxy"
    assert environ["SSL_CERT_FILE"] == "/certs"
    assert not environ.keys() & {"VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT"}
    assert environ["UV_PREVIEW_FEATURES"] == "x,pylock"


def test_pips_indexes_are_used_when_uv_has_none_of_its_own() -> None:
    environ = uv_environ({"PIP_INDEX_URL": "https://a", "PIP_EXTRA_INDEX_URL": "https://b"})

    assert (environ["UV_DEFAULT_INDEX"], environ["UV_INDEX"]) == ("https://a", "https://b")


def test_what_builds_a_package_is_not_handed_the_settings_of_the_server() -> None:
    secrets = {"MODELOPS_TOKEN": "t", "MODELOPS_DATABASE": "postgresql://user:password@host/name"}
    assert uv_environ({**secrets, "UV_DEFAULT_INDEX": "https://user:key@index"}).items() >= {
        ("UV_DEFAULT_INDEX", "https://user:key@index")
    }
    assert not secrets.keys() & uv_environ(secrets).keys()
