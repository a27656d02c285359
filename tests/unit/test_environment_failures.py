"""Whom a remembered failure answers, and for how long."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from modelops.environments.failures import REMEMBER_S, Failures
from modelops.errors import IndexUnreachableError, ResolutionError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def failures(tmp_path: Path) -> Failures:
    return Failures(tmp_path / "failures")


def test_what_is_final_answers_every_caller_with_uvs_words(failures: Failures) -> None:
    failures.remember("a", ResolutionError("m", "error: no six"))

    recalled = failures.recall("a", time.time())
    assert isinstance(recalled, ResolutionError)
    assert (recalled.what, recalled.uv_output) == ("m", "error: no six")
    assert failures.recall("b", time.time()) is None


def test_what_is_final_is_forgotten_after_a_while(
    failures: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures.remember("a", ResolutionError("m", "x"))
    later = time.time() + REMEMBER_S + 1
    monkeypatch.setattr(time, "time", lambda: later)

    assert failures.recall("a", later) is None


def test_an_unreachable_index_answers_only_those_who_had_asked_before(failures: Failures) -> None:
    before = time.time()
    failures.remember("a", IndexUnreachableError("m", "x"))

    assert isinstance(failures.recall("a", before), IndexUnreachableError)
    assert failures.recall("a", time.time() + 0.001) is None


@pytest.mark.parametrize("error", [ResolutionError("m", "x"), IndexUnreachableError("m", "x")])
def test_a_clock_that_was_put_back_lets_no_failure_answer_for_longer(
    failures: Failures, monkeypatch: pytest.MonkeyPatch, error: ResolutionError | IndexUnreachableError
) -> None:
    failures.remember("a", error)
    back = time.time() - 86_400
    monkeypatch.setattr(time, "time", lambda: back)

    assert failures.recall("a", back) is None


def test_forgetting_and_damage_lead_to_a_new_try(failures: Failures, tmp_path: Path) -> None:
    failures.forget("a")
    failures.remember("a", ResolutionError("m", "x"))
    failures.forget("a")
    assert failures.recall("a", 0.0) is None

    failures.remember("a", ResolutionError("m", "x"))
    (tmp_path / "failures" / "a.json").write_text("{")
    assert failures.recall("a", 0.0) is None
