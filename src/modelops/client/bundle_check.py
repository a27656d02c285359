"""Look at a bundle before anything is submitted: one `Check` after another, as soon as each is known.

Every question is answered by real processes in the bundle's own environment, started and fed as in a job.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from modelops.bundles import check as judge
from modelops.bundles import job_spec, load_manifest, probe, take_snapshot
from modelops.bundles.check import FRESH, REORDERED, TWICE, Digests
from modelops.bundles.missing import line_to_add
from modelops.checks import Check, CheckStatus, failed, ok
from modelops.client.local_runner import LocalRunner
from modelops.client.study_arguments import with_axes
from modelops.client.study_files import completed
from modelops.environments import Environments, dependency_inputs
from modelops.errors import (
    BundleEnvironmentError,
    BundleError,
    NotFoundError,
    ProcessError,
    RemoteError,
    RequestError,
)
from modelops.processes import Row
from modelops.settings import usable_cores
from modelops.states import ReplicateStatus
from modelops.study.canonical import param_id, parse_canonical
from modelops.study.index_line import IndexLine
from modelops.worker.sets import replicate_set

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from modelops.home import Home
    from modelops.processes import Outcome, ReplicateSet, RunnerSpec, SpooledFile
    from modelops.study.spec import JobSpec
    from modelops.study.study import Study

N_SEEDS = 3
SLOW_S = 5.0  # a model slower than this is run half as often
Asked = tuple[int, int]  # position of a parameter set, number of a replicate


class _CannotGoOnError(Exception):
    """A check failed, and the ones behind it have nothing to look at."""

    def __init__(self, check: Check) -> None:
        super().__init__(check)
        self.check = check


def check_bundle(
    study: Study,
    home: Home,
    *,
    axes: Mapping[str, list[Any]] | None = None,
    upgrade: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Iterator[Check]:
    """Check the bundle of a study, with the parameters, replicates and limits of that study.

    Parameters
    ----------
    study
        As it was given; what it leaves open is taken from the bundle.
    axes
        Values of parameters, instead of those of the study (`modelops.client.study_arguments.with_axes`).
    upgrade
        Resolve the dependencies anew.
    on_progress
        Told what is being done.

    Raises
    ------
    NotFoundError
        There is no bundle at that path.
    ClusterError
        This machine stands in the way, not the bundle.
    """
    source = Path(study.bundle)
    if not source.exists():
        raise NotFoundError(f"there is no bundle at {source}: no such file or folder")
    try:
        yield from _checks(study, source, home, axes or {}, upgrade, on_progress or (lambda _text: None))
    except _CannotGoOnError as end:
        yield end.check


def _checks(
    study: Study,
    source: Path,
    home: Home,
    axes: Mapping[str, list[Any]],
    upgrade: bool,
    on_progress: Callable[[str], None],
) -> Iterator[Check]:
    try:
        manifest = load_manifest(source)  # a folder without a pyproject.toml gives its name
        digest, snapshot = take_snapshot(source, home.cache / "bundles")
        files = [p for p in snapshot.rglob("*") if p.is_file()]
        size = sum(p.stat().st_size for p in files)
        study = completed(study, manifest, snapshot)
        if axes:
            study = replace(study, parameters=with_axes(study.sets(), axes))
        spec = job_spec(study, manifest, digest)
    except (BundleError, RequestError) as e:
        raise _CannotGoOnError(failed("bundle", str(e), "correct what it names")) from e
    yield ok(
        "bundle",
        f"{manifest.name}: {len(files)} file{'s' if len(files) != 1 else ''}, {judge.shown_bytes(size)}",
        name=manifest.name, digest=digest, files=len(files), bytes=size,
    )  # fmt: skip
    environments = Environments(home.cache)
    began = time.monotonic()
    try:
        lock = environments.resolve(snapshot, upgrade=upgrade, on_progress=on_progress)
        environment = environments.ensure(
            lock, bundle_root=snapshot, retry_failed=upgrade, on_progress=on_progress
        )
    except BundleEnvironmentError as e:
        raise _CannotGoOnError(failed("environment", str(e), _environment_advice(e))) from e
    n, seconds = len(lock.packages), time.monotonic() - began
    yield ok(
        "environment",
        f"Python {environment.interpreter.version}, {n} package{'s' if n != 1 else ''}, "
        f"{'built' if environment.built else 'ready'} in {judge.shown_seconds(seconds)}",
        key=environment.key, python=environment.interpreter.version, packages=n, built=environment.built,
        seconds=seconds,
    )  # fmt: skip
    runner = LocalRunner(snapshot, digest, manifest, environment, home)
    with runner:
        yield from _Looker(runner, spec, _some_sets(study), on_progress).checks()


def _some_sets(study: Study) -> list[bytes]:
    """Return the canonical forms of the first, the middle and the last parameter set."""
    sets = study.sets()
    chosen = sorted({0, len(sets) // 2, len(sets) - 1})
    return [sets.canonical(i, i + 1)[0] for i in chosen]


def _environment_advice(error: BundleEnvironmentError) -> str:
    if isinstance(error, BundleError):
        return "correct the dependencies in the file that is named; nothing was run"
    return "nothing is known about the bundle's dependencies; try again when this is mended"


@dataclass
class _Looker:
    """Runs the bundle in all the ways that the questions need."""

    runner: LocalRunner
    spec: JobSpec
    sets: list[bytes]
    on_progress: Callable[[str], None]
    _asked: dict[int, Asked] = field(default_factory=dict)
    _outcomes: list[Outcome] = field(default_factory=list)
    _passes: list[dict[Asked, Digests]] = field(default_factory=list)  # what each run in a row gave
    _first_s: float = 0.0
    _slow: bool = False

    def __post_init__(self) -> None:
        self._few = _with_few_replicates(self.spec)

    @property
    def listed_in(self) -> str:
        return dependency_inputs(self.runner.snapshot).listed_in

    @property
    def process(self) -> RunnerSpec:
        return self.runner.spec(isolation=self.spec.isolation, limits=self.spec.limits)

    def checks(self) -> Iterator[Check]:
        yield self._imports()
        reference, again = self._replicates()
        yield judge.runs(
            self._outcomes, {i: self._named(asked) for i, asked in self._asked.items()}, self.listed_in
        )
        if reference:
            found = judge.reproducible(reference, again, self.spec.isolation)
            yield found
            if len(reference) > 1:
                yield judge.seeds_differ(reference, judge.unreliable_outputs(found))
        yield from self._aggregates()
        if reference:
            yield self._isolations()
        yield from self._observed()

    def _imports(self) -> Check:
        """Import every entry point in a fresh process."""
        self.on_progress("importing")
        manifest = self.runner.manifest
        models = dict.fromkeys([self.spec.model, *manifest.models.values()])
        entries = [("model", entry) for entry in models]
        entries += [(self._kind(e), e) for e in self.spec.aggregates]
        entries += [("report", manifest.report)] if manifest.report else []
        call, args = probe.call_of(
            "import_all", [list(e) for e in entries], manifest.wire is not None, str(self.runner.snapshot)
        )
        try:
            errors = self.runner.pool.call(self.process, call, args)
        except ProcessError as e:
            raise _CannotGoOnError(
                failed("imports", f"a process ended while importing {', '.join(e for _, e in entries)}: {e}",
                       "find what ends the process when the module is imported")
            ) from e  # fmt: skip
        found = judge.imports(entries, errors, self.listed_in)
        if found.status is CheckStatus.FAILED:
            raise _CannotGoOnError(found)
        return found

    def _kind(self, entry: str) -> str:
        return "target" if self.runner.manifest.is_target(entry) else "aggregate"

    # --- replicates ------------------------------------------------------------------------------------

    def _replicates(self) -> tuple[dict[int, Digests], dict[str, dict[int, Digests]]]:
        """Run a few seeds in one process twice, in a fresh one, and in another order."""
        self.on_progress("running replicates")
        self.runner.start_afresh()
        began = time.monotonic()
        first = self._run([(0, 0)])
        self._first_s = time.monotonic() - began
        self._slow = slow = first[0].seconds > SLOW_S
        some: list[Asked] = [(0, r) for r in range(2 if slow else N_SEEDS)]
        reference = _digests(some, [*first, *self._run(some[1:])])
        again = {TWICE: _digests(some, self._run(some[: 1 if slow else None]))}
        others: list[Asked] = [(i, 0) for i in range(1, len(self.sets))]
        ended = zip(others, self._run(others), strict=True)
        others = self._to_compare([one for one, outcome in ended if outcome_digests(outcome)])
        self.on_progress("running replicates in fresh processes")
        self.runner.start_afresh()
        again[FRESH] = _digests(some, self._run(some[: 1 if slow else None]))
        self.runner.start_afresh()
        backwards = some[::-1]
        after = self._run([*others[::-1], *backwards])[len(others) :]
        again[REORDERED] = _digests(backwards, after)
        whole = {r: digests for r, digests in reference.items() if digests}
        seen = {how: {r: d for r, d in by.items() if r in whole} for how, by in again.items()}
        seeds = {r: self._set((0, r)).seeds[0] for r in whole}
        return (
            {seeds[r]: d for r, d in whole.items()},
            {how: {seeds[r]: d for r, d in by.items()} for how, by in seen.items()},
        )

    def _to_compare(self, others: list[Asked]) -> list[Asked]:
        """Return which of the other sets that succeeded are compared: of a slow model the last one only."""
        return others[-1:] if self._slow else others

    def _isolations(self) -> Check:
        """Run what succeeded with the other isolations, too: seeds of the first set, and the other sets."""
        first: dict[Asked, Digests] = {}
        for one_pass in self._passes:
            first = {**one_pass, **first}
        good = sorted(one for one, digests in first.items() if digests)
        some = [one for one in good if one[0] == 0]
        others = self._to_compare([one for one in good if one[0] > 0])
        not_forked = self.runner.pool.not_forked(self.process)
        seen = {}
        for isolation in ("warm", "fork", "spawn"):
            if isolation == self.spec.isolation:
                seen[isolation] = [first] if isolation == "spawn" else self._passes
                continue
            self.on_progress(f'running replicates with isolation = "{isolation}"')
            spec = self.runner.spec(isolation=isolation, limits=self.spec.limits)
            if isolation == "warm":
                self.runner.start_afresh()
                again = some[:1] if self._slow else some
                seen[isolation] = [self._pass(spec, asked) for asked in (some, again, others)]
                self.runner.start_afresh()
                seen[isolation].append(self._pass(spec, [*others[::-1], *some[::-1]]))
            elif isolation == "fork":
                seen[isolation] = [self._pass(spec, [*some, *others])]
            else:
                # Each costs a whole start, and the first one has had a fresh process in any case.
                had = [one for one in some if one == (0, 0)]
                alone = self._pass(spec, [*some[len(had) :], *others] or some)
                seen[isolation] = [{**{one: first[one] for one in had}, **alone}]
            not_forked = self.runner.pool.not_forked(spec) or not_forked
        named = {one: (self._params(one), self._set(one).seeds[0]) for one in good}
        return judge.isolations(
            {how: [{named[one]: d for one, d in one_pass.items() if one in named} for one_pass in passes]
             for how, passes in seen.items()},
            self.spec.isolation, not_forked,
        )  # fmt: skip

    def _pass(self, spec: RunnerSpec, asked: Sequence[Asked]) -> dict[Asked, Digests]:
        """Run replicates in this order as ``spec`` says."""
        if not asked:
            return {}
        sets = [msgspec.structs.replace(self._set(one), index=i) for i, one in enumerate(asked)]
        try:
            outcomes = self.runner.replicates(spec, self.spec.model, sets)
        except ProcessError as e:
            raise _CannotGoOnError(
                failed("isolation", f"no replicate could begin with {spec.isolation}: {e}",
                       "find what ends the process")
            ) from e  # fmt: skip
        return {one: outcome_digests(o) for one, o in zip(asked, outcomes, strict=True)}

    def _run(self, asked: Sequence[Asked]) -> list[Outcome]:
        """Run replicates in this order; remember what was asked. Indices only have to rise."""
        if not asked:
            return []
        at = len(self._asked)
        sets = []
        for position, one in enumerate(asked):
            sets.append(msgspec.structs.replace(self._set(one), index=at + position))
            self._asked[at + position] = one
        try:
            outcomes = self.runner.replicates(self.process, self.spec.model, sets)
        except ProcessError as e:
            advice = "mend the model" if isinstance(e, RemoteError) else "find what ends the process"
            raise _CannotGoOnError(failed("runs", f"no replicate could begin: {e}", advice)) from e
        self._outcomes += outcomes
        self._passes.append({one: outcome_digests(o) for one, o in zip(asked, outcomes, strict=False)})
        return outcomes

    def _set(self, asked: Asked) -> ReplicateSet:
        position, replicate = asked
        canonical = self.sets[position]
        return replicate_set(
            self._few, 0, param_id(canonical), canonical, index=replicate, replicate=replicate, n=1
        )

    def _params(self, asked: Asked) -> str:
        params = parse_canonical(self.sets[asked[0]])
        return ", ".join(f"{k}={v!r}" for k, v in params.items()) or "no parameters"

    def _named(self, asked: Asked) -> str:
        return f"{self._params(asked)}, seed {self._set(asked).seeds[0]}"

    # --- aggregates, and what a replicate leaves behind --------------------------------------------------

    def _aggregates(self) -> Iterator[Check]:
        rows = [
            Row(i, o.returned_dict, o.outputs)
            for i, o in enumerate(self._outcomes)
            if o.status is ReplicateStatus.SUCCEEDED and self._asked[o.index][0] == 0
        ]
        for entry in self.spec.aggregates if rows else ():
            self.on_progress(f"aggregating with {entry}")
            yield self._aggregate(entry, rows)

    def _aggregate(self, entry: str, rows: list[Row]) -> Check:
        name = "aggregate" if len(self.spec.aggregates) == 1 else f"aggregate {entry}"
        try:
            outcome = self.runner.pool.aggregate(
                self.process, entry, params=self.sets[0], param=0, n=len(rows), rows=rows,
                target=self.runner.manifest.is_target(entry), target_data=self.runner.manifest.target_data,
            )  # fmt: skip
        except ProcessError as e:
            return failed(name, f"{entry} of {len(rows)} replicates: {e}", "mend the aggregate")
        if outcome.error is None:
            names = [name for name, _, _ in outcome.outputs]
            fed = ", fed one by one" if outcome.incremental else ""
            return ok(name, f"{entry} of {len(rows)} replicates{fed} gives {', '.join(names) or 'nothing'}",
                      outputs=names, seconds=outcome.seconds, incremental=outcome.incremental)  # fmt: skip
        error = outcome.error
        place = f" at {error.file}:{error.line}" if error.file else ""
        advice = "mend the aggregate; it gets the list of what the model returned, in order"
        if error.missing_module:
            advice = line_to_add(error.missing_module, self.listed_in)
        return failed(
            name, f"{entry} of {len(rows)} replicates {outcome.status}: {error.type}: {error.message}{place}",
            advice,
            type=error.type, error=error.message, traceback=error.traceback, stderr=error.stderr,
        )  # fmt: skip

    def _observed(self) -> Iterator[Check]:
        if self._outcomes[0].status is not ReplicateStatus.SUCCEEDED:
            return
        self.on_progress("looking at what a replicate leaves behind")
        self.runner.start_afresh()
        one = self._set((0, 0))
        manifest = self.runner.manifest
        params = parse_canonical(self.sets[0])
        call, args = probe.call_of(
            "observe",
            self.spec.model,
            manifest.wire is not None,
            str(self.runner.snapshot),
            params,
            one.seeds[0],
        )
        n_replicates = self.spec.line.size
        try:
            seen = self.runner.pool.call(self.process, call, args)
        except ProcessError as e:
            yield failed(
                "stdout", f"a replicate ended its process when stdout was a file: {e}", "mend the model"
            )
            return
        yield judge.prints(seen, n_replicates)
        yield judge.random_state(seen)
        yield judge.leaves(seen)
        peaks = [o.max_rss_bytes or 0 for o in self._outcomes]
        yield from judge.cost(
            first_s=self._first_s,
            seconds=[o.seconds for o in self._outcomes if o.status is ReplicateStatus.SUCCEEDED][1:]
            or [self._outcomes[0].seconds],
            peak_bytes=max(seen["peak_bytes"], *peaks),
            n_replicates=n_replicates,
            cores=usable_cores(),
            available_bytes=available_bytes(),
        )


def _with_few_replicates(spec: JobSpec) -> JobSpec:
    """Return the spec with as many replicates as are looked at, also where the job itself has fewer."""
    given = spec.seeds
    seeds = None
    if given is not None:
        others = islice((seed for seed in count() if seed not in given), N_SEEDS)
        seeds = (*given, *others)[:N_SEEDS]
    return msgspec.structs.replace(spec, line=IndexLine.of(1, N_SEEDS), seeds=seeds)


def _digests(asked: Sequence[Asked], outcomes: Sequence[Outcome]) -> dict[int, Digests]:
    """Return what each replicate number gave: a digest of each of its outputs."""
    return {replicate: outcome_digests(o) for (_, replicate), o in zip(asked, outcomes, strict=False)}


def outcome_digests(outcome: Outcome) -> Digests:
    """Return kind and SHA-256 of each output; empty if there is none because it did not succeed."""
    if outcome.status is not ReplicateStatus.SUCCEEDED:
        return {}
    found = {"(what it returns)": "dict" if outcome.returned_dict else "value"}
    for name, kind, data in outcome.outputs:
        found[name] = f"{kind}:{_sha256(data)}"
    return found


def _sha256(data: bytes | SpooledFile) -> str:
    return hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else data.sha256


def available_bytes() -> int | None:
    """Return the memory that processes can still get on this machine, None if the system does not tell."""
    try:
        with Path("/proc/meminfo").open("rb") as meminfo:
            for line in meminfo:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
