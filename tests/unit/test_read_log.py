"""What a job printed is read in the order of its replicates, from few attempts at a time."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from modelops.errors import NotFoundError
from modelops.store import Objects, job_log
from modelops.store.contents import JobContents
from modelops.store.job_log import log_texts, read_log
from modelops.study.ids import attempt_id, new_job_id
from modelops.study.index_line import IndexLine
from modelops.study.spec import JobSpec
from modelops.worker.job_log import JobLog, LogLine

if TYPE_CHECKING:
    from pathlib import Path

N_SETS, N_REPLICATES, N_ATTEMPTS = 3, 20, 12


@pytest.fixture
def contents(tmp_path: Path) -> JobContents:
    """Return a job whose replicates were run by attempts in any order, some twice; each said which it is."""
    objects, job, rng = Objects.open(tmp_path), new_job_id(), random.Random(3)
    runs = [*range(N_SETS * N_REPLICATES), *rng.sample(range(N_SETS * N_REPLICATES), 9)]
    rng.shuffle(runs)
    for n in range(N_ATTEMPTS):
        with JobLog(objects, job, attempt_id(1, n + 1)) as log:
            if not n % 3:
                log.write(None, f"import by {n}\n".encode())
            for index in dict.fromkeys(runs[n::N_ATTEMPTS]):
                log.write(index, f"{index} by {n:02}\n".encode())
    spec = JobSpec(
        name="x", bundle="a" * 64, bundle_name="x", model="x:y", line=IndexLine.of(N_SETS, N_REPLICATES)
    )
    return JobContents(objects, job, spec, [], [])


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_all_text_comes_in_the_order_of_replicates(
    contents: JobContents, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_log, "ATTEMPTS_AT_ONCE", at_once)
    texts = list(log_texts(contents, None, None))
    assert texts[:4] == [f"--- import\nimport by {n}\n" for n in (0, 3, 6, 9)]
    said = [text.split("\n")[1] for text in texts[4:]]
    assert said == sorted(said, key=lambda line: (int(line.split(" ")[0]), line))
    assert Counter(int(line.split(" ")[0]) for line in said).keys() == set(range(N_SETS * N_REPLICATES))
    assert len(said) > N_SETS * N_REPLICATES
    for text in texts[4:]:
        index = int(text.split("\n")[1].split(" ")[0])
        assert text.startswith(
            f"--- parameter set {index // N_REPLICATES}, replicate {index % N_REPLICATES}\n"
        )
    assert read_log(contents, None, None) == "".join(texts)


def test_few_attempts_are_held_at_a_time(contents: JobContents, monkeypatch: pytest.MonkeyPatch) -> None:
    held: Counter[str] = Counter()
    most = 0

    class Counted(list):  # type: ignore[type-arg]
        def __init__(self, name: str, lines: list[LogLine]) -> None:
            nonlocal most
            super().__init__(lines)
            self.name = name
            held[name] += 1
            most = max(most, held.total())

        def __del__(self) -> None:
            held[self.name] -= 1

    read = job_log._lines_of
    monkeypatch.setattr(job_log, "_lines_of", lambda contents, name: Counted(name, read(contents, name)))
    assert len(list(log_texts(contents, None, None))) > N_SETS * N_REPLICATES
    assert 1 < most <= job_log.ATTEMPTS_AT_ONCE + 1


def test_a_set_and_a_replicate_are_read_alone_and_what_is_not_there_is_said_at_once(
    contents: JobContents,
) -> None:
    assert {text.split("\n")[0] for text in log_texts(contents, 1, None)} == {
        f"--- parameter set 1, replicate {r}" for r in range(N_REPLICATES)
    }
    assert set(read_log(contents, 1, 4).splitlines()) <= {f"24 by {n:02}" for n in range(N_ATTEMPTS)}
    assert read_log(contents, 1, 4)
    for place in ((3, None), (0, N_REPLICATES)):
        with pytest.raises(NotFoundError, match="numbered from 0"):
            log_texts(contents, *place)
