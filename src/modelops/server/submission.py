"""What makes a submission right: its spec, and how it fits the bundle and the parameter sets. Pure.

The Python client checks the same while a study is written; here nobody is believed. Every refusal is a sentence: a
RequestError for what is wrong by itself, which `SCHEMA` says too, so that a client can know before it asks; a
ConflictError for what does not fit something else.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

from modelops.errors import ConflictError, RequestError
from modelops.states import FAILURES
from modelops.study.canonical import RESERVED
from modelops.study.index_line import MAX_INDICES, IndexLine
from modelops.study.pools import NAME_PATTERN, checked_pools
from modelops.study.quantities import LONGEST_S
from modelops.study.seeds import MAX_EXPLICIT_SEED, MAX_REPLICATES, MAX_STUDY_SEED
from modelops.study.spec import FIRST_PARAMETERS, FORMAT, ISOLATIONS, WITH_POOLS, WITH_UNTIL
from modelops.study.stopping import MAX_OF_UNTIL, checked
from modelops.study.wording import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modelops.bundles import Manifest
    from modelops.study.spec import JobSpec, Limits, RetryPolicy

MAX_NAME = 500  # characters of a job's name and of its bundle's
MAX_WHY = 1000
MAX_SMALL = 2**31
ONE_LINE = r"[^\x00-\x1f\x7f-\x9f]+"


def check_why(why: str) -> None:
    """Refuse a reason that is no line of text. Raises RequestError."""
    if len(why) > MAX_WHY or (why and not re.fullmatch(ONE_LINE, why)):
        raise RequestError(
            f"why must be one line of at most {MAX_WHY} characters, without control characters"
        )


def check_extension(replicates: int | None, seeds: Sequence[int] | None) -> None:
    """Refuse numbers that no job can have. Raises RequestError."""
    if replicates is not None:
        _check_int("replicates", replicates, 1, MAX_REPLICATES)
    for i, seed in enumerate(seeds or ()):
        _check_int(f"seeds[{i}]", seed, 0, MAX_EXPLICIT_SEED)


def check_spec(spec: JobSpec) -> None:
    """Refuse a spec that no job can have, whatever its bundle.

    Raises
    ------
    RequestError
        ``str`` names the key, and what it may be.
    """
    refuse_newer(spec.format)
    if spec.parameters != FIRST_PARAMETERS:
        raise RequestError(f"parameters = {spec.parameters!r} of a new job must be {FIRST_PARAMETERS!r}")
    for key, text in (("name", spec.name), ("bundle_name", spec.bundle_name)):
        _check_text(key, text)
    _check_line(spec)
    _check_seeds(spec)
    _check_until(spec)
    _check_pools(spec)
    if spec.isolation not in ISOLATIONS:
        close = did_you_mean(spec.isolation, ISOLATIONS)
        raise RequestError(f"isolation = {spec.isolation!r} is none of {', '.join(ISOLATIONS)}{close}")
    _check_seconds("timeout_s", spec.timeout_s)
    _check_limits(spec.limits)
    _check_retry(spec.retry)
    _check_min_success(spec)
    if spec.max_failures is not None:
        _check_int("max_failures", spec.max_failures, 0, MAX_SMALL)
    for entry in {a for a in spec.aggregates if spec.aggregates.count(a) > 1}:
        raise RequestError(f"aggregates names {entry!r} twice")


def refuse_newer(form: int) -> None:
    """Refuse a spec of a format that this server does not know. Raises RequestError."""
    if form > FORMAT:
        raise RequestError(
            f"this study was written by a newer ModelOps (study format {form}, this server reads up to {FORMAT}); "
            "upgrade the server"
        )


def check_entries(spec: JobSpec, manifest: Manifest) -> None:
    """Refuse entry points that the bundle does not have.

    Raises
    ------
    ConflictError
        Names those it has.
    """
    try:
        chosen = [("model", spec.model, manifest.model(spec.model))]
        chosen += [("aggregates", entry, manifest.aggregate(entry)) for entry in spec.aggregates]
    except RequestError as e:
        raise ConflictError(str(e)) from e
    for key, given, entry in chosen:
        if given != entry:
            raise ConflictError(f"{key}: {given!r} is a name; write its entry point, {entry!r}")


def check_count(spec: JobSpec, n_params: int) -> None:
    """Refuse another number of parameter sets than the line has."""
    if n_params != spec.line.n_params:
        raise ConflictError(
            f"line has {spec.line.n_params} parameter sets, but {n_params} were given; they must be as many"
        )


def _check_text(key: str, text: str) -> None:
    if not re.fullmatch(ONE_LINE, text) or len(text) > MAX_NAME:
        raise RequestError(
            f"{key} = {text[:50]!r} must be one line of 1 to {MAX_NAME} characters, without control characters"
        )


def _check_line(spec: JobSpec) -> None:
    line = spec.line
    n_params, n_replicates = line.n_params, max((b.n_replicates for b in line.blocks), default=0)
    if not n_params:
        raise RequestError("the study has no parameter sets; give at least one, e.g. parameters=[{}]")
    if line != IndexLine.of(n_params, n_replicates):
        raise ConflictError("the line of a new job is one block: base, p0 and r0 are 0")
    _check_int("replicates", n_replicates, 1, MAX_REPLICATES)
    if line.size > MAX_INDICES:
        raise ConflictError(
            f"{n_params} parameter sets x {n_replicates} replicates are more than one job can hold"
        )


def _check_seeds(spec: JobSpec) -> None:
    _check_int("study_seed", spec.study_seed, 0, MAX_STUDY_SEED)
    if spec.seeds is None:
        return
    n_replicates = spec.line.blocks[0].n_replicates
    if len(spec.seeds) != n_replicates:
        raise ConflictError(
            f"seeds has {len(spec.seeds)}, but there are {n_replicates} replicates; give one seed per replicate"
        )
    if spec.study_seed:
        raise ConflictError(
            "give either study_seed or seeds: explicit seeds are used as they are, and derive from nothing"
        )
    if not 0 <= min(spec.seeds) <= max(spec.seeds) <= MAX_EXPLICIT_SEED:
        at, seed = next((i, s) for i, s in enumerate(spec.seeds) if not 0 <= s <= MAX_EXPLICIT_SEED)
        _check_int(f"seeds[{at}]", seed, 0, MAX_EXPLICIT_SEED)


def _check_until(spec: JobSpec) -> None:
    if spec.until is None:
        return
    checked(spec.until)
    if spec.format < WITH_UNTIL:
        raise ConflictError(f"until needs format {WITH_UNTIL}, not {spec.format}")
    if (n := spec.line.blocks[0].n_replicates) != spec.until.max:
        raise ConflictError(
            f"the line has {n} replicates of each parameter set; with until it has its max, {spec.until.max}"
        )


def _check_pools(spec: JobSpec) -> None:
    if not (pools := checked_pools("pools", spec.asked_pools)):
        return
    if spec.format < WITH_POOLS:
        raise ConflictError(f"pools = {list(pools)} needs format {WITH_POOLS}, not {spec.format}")


def _check_limits(limits: Limits) -> None:
    _check_seconds("limits.replicate_timeout_s", limits.replicate_timeout_s)
    if limits.memory_bytes is not None:
        _check_int("limits.memory_bytes", limits.memory_bytes, 1, 2**63 - 1)
    _check_int("limits.threads", limits.threads, 1, MAX_SMALL)


def _check_retry(retry: RetryPolicy) -> None:
    _check_int("retry.max_retries", retry.max_retries, 0, MAX_SMALL)
    for key, value in (("initial_delay", retry.initial_delay), ("max_delay", retry.max_delay)):
        if value is not None and not 0 <= value < math.inf:
            raise RequestError(f"retry.{key} = {value!r} must be 0 or more seconds")
    if not 1 <= retry.backoff < math.inf:
        raise RequestError(f"retry.backoff must be 1 or more, not {retry.backoff!r}")
    for status in sorted(retry.on - FAILURES):
        raise RequestError(f"retry.on has {str(status)!r}; known are {', '.join(sorted(FAILURES))}")


def _check_min_success(spec: JobSpec) -> None:
    value, n_replicates = spec.min_success, spec.line.blocks[0].n_replicates
    if isinstance(value, float) and not 0 <= value <= 1:
        raise RequestError(f"min_success = {value!r}: a fraction must lie in 0.0..1.0; a count is an integer")
    if isinstance(value, int) and value < 1:
        raise RequestError(f"min_success = {value!r}: a count must be 1 or more")
    if isinstance(value, int) and value > n_replicates:
        raise ConflictError(
            f"min_success = {value!r}, but a parameter set has only {n_replicates} replicates; its aggregate would "
            "never run"
        )


def _check_seconds(key: str, value: float | None) -> None:
    if value is not None and not 0 < value <= LONGEST_S:
        raise RequestError(
            f"{key} = {value!r} must be more than 0 seconds, at most {LONGEST_S:,.0f}; leave it out for no limit"
        )


def _check_int(key: str, value: Any, lo: int, hi: int) -> None:
    if not lo <= value <= hi:
        raise RequestError(f"{key} must be an integer in {lo}..{hi}, not {value!r}")


def _integer(lo: int, hi: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": lo, "maximum": hi}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_LINE_OF_TEXT: Final = {"pattern": r"^[^\u0000-\u001f\u007f-\u009f]+$", "maxLength": MAX_NAME}
_SECONDS: Final = _or_null({"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_S})
_HEX: Final = "^[0-9a-f]{64}$"
_SEEDS: Final = {"type": "array", "items": _integer(0, MAX_EXPLICIT_SEED)}
_NAMES: Final = {"pattern": "^[^$]", "not": {"enum": sorted(RESERVED)}}
_VALUE: Final = {"$ref": "#/components/schemas/ParameterValue"}
_SETS: Final = {
    "type": "array",
    "items": {"type": "object", "propertyNames": _NAMES, "additionalProperties": _VALUE},
}
# What the checks of this module demand of a key by itself, for the schema of the API, by struct and key.
SCHEMA: Final[Mapping[str, Mapping[str, Any]]] = {
    "JobSpec": {
        "format": _integer(1, FORMAT),
        "name": _LINE_OF_TEXT,
        "bundle_name": _LINE_OF_TEXT,
        "bundle": {"pattern": _HEX},
        "aggregates": {"uniqueItems": True},
        "study_seed": _integer(0, MAX_STUDY_SEED),
        "seeds": _or_null({**_SEEDS, "minItems": 1}),
        "isolation": {"enum": list(ISOLATIONS)},
        "timeout_s": _SECONDS,
        "min_success": {
            "anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, _integer(1, MAX_REPLICATES)]
        },
        "max_failures": _or_null(_integer(0, MAX_SMALL)),
        "pools": {"items": {"type": "string", "pattern": NAME_PATTERN}},
    },
    "Limits": {
        "replicate_timeout_s": _SECONDS,
        "memory_bytes": _or_null(_integer(1, 2**63 - 1)),
        "threads": _integer(1, MAX_SMALL),
    },
    "RetryPolicy": {
        "max_retries": _integer(0, MAX_SMALL),
        "initial_delay": {"minimum": 0},
        "max_delay": _or_null({"type": "number", "minimum": 0}),
        "backoff": {"minimum": 1},
        "on": {"items": {"enum": sorted(FAILURES)}},
    },
    "Until": {
        "half_width": {"exclusiveMinimum": 0},
        "of": {"minLength": 1},
        "level": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
        "min": _integer(2, MAX_OF_UNTIL),
        "max": _integer(2, MAX_OF_UNTIL),
    },
    "IndexLine": {"blocks": {"minItems": 1}},
    "Block": {
        "base": {"minimum": 0},
        "p0": {"minimum": 0},
        "r0": {"minimum": 0},
        "n_params": {"minimum": 1},
        "n_replicates": _integer(1, MAX_REPLICATES),
    },
    "NewJobSpec": {"parameters": {"const": FIRST_PARAMETERS}},
    "SubmitRequest": {
        "spec": {"$ref": "#/components/schemas/NewJobSpec"},
        "parameters": _or_null(_SETS),
        "parameters_sha256": _or_null({"type": "string", "pattern": _HEX}),
        "why": {"pattern": r"^[^\u0000-\u001f\u007f-\u009f]*$", "maxLength": MAX_WHY},
    },
    "ExtendRequest": {
        "replicates": _or_null(_integer(1, MAX_REPLICATES)),
        "parameters": _or_null(_SETS),
        "parameters_sha256": _or_null({"type": "string", "pattern": _HEX}),
        "seeds": _or_null(_SEEDS),
    },
}
PARAMETER_VALUE: Final[Mapping[str, Any]] = {
    "title": "ParameterValue",
    "description": "A parameter's value; what is not finite is tagged.",
    "anyOf": [
        {"type": ["null", "boolean", "integer", "number", "string"]},
        {"type": "array", "items": _VALUE},
        {"type": "object", "propertyNames": {"pattern": "^(?!\\$)"}, "additionalProperties": _VALUE},
        {
            "type": "object",
            "properties": {"$float": {"enum": ["nan", "inf", "-inf"]}},
            "required": ["$float"],
            "additionalProperties": False,
        },
    ],
}
