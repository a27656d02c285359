"""The OpenAPI 3.1 document, made from the same operations that the routes are made from."""

from __future__ import annotations

import inspect
import re
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Final

import msgspec

from modelops.server.http.operations import Place, place_of
from modelops.server.http.problems import MEDIA_TYPE, RETRY_AFTER_S, Problem
from modelops.server.submission import PARAMETER_VALUE, SCHEMA
from modelops.store.tokens import TokenScope

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from modelops.server.http.operations import Answer, Body, Operation

_REF: Final = "#/components/schemas/{name}"
_OF_ALL: Final = (400, 401, 421, 500, 503)
_OF_BODIES: Final = (408, 413, 415, 422)
_SAID: Final = {
    400: "The request is not as this document says.",
    401: "No token, or one that is wrong, revoked or expired.",
    403: "The token does not allow it.",
    404: "There is no such job, bundle, file, replicate, ...; the detail says which.",
    408: "The body did not come in time.",
    409: "What is recorded does not allow it.",
    413: "The body is larger than the server takes.",
    415: "The body has another media type.",
    416: "The range begins where the file ends.",
    421: "The request is for another host.",
    422: "Understood, and wrong: the detail says what to change.",
    429: "Too many jobs have not ended.",
    500: "A bug, or damage; the server's log has more.",
    503: "The database, the storage or the workers are away; ask again.",
}


def document(operations: Sequence[Operation], version: str) -> dict[str, Any]:
    """Return the whole document as what JSON can hold."""
    types: dict[Any, None] = {Problem: None}
    for op in operations:
        types.update(dict.fromkeys(answer.type for answer in op.answers.values() if answer.type is not None))
        types.update(dict.fromkeys(f.type for f in msgspec.structs.fields(op.parameters)))
        if op.body is not None and op.body.type is not None:
            types[op.body.type] = None
    schemas, components = msgspec.json.schema_components(list(types), ref_template=_REF)
    schema_of = dict(zip(types, schemas, strict=True))
    components["ParameterValue"] = dict(PARAMETER_VALUE)
    for name, component in components.items():
        component["description"] = inspect.cleandoc(component.get("description", ""))
        _demand_of(component, name)
    # What is asked of the spec of a new job is more than what holds for that of one that was extended.
    components["NewJobSpec"] = {**deepcopy(components["JobSpec"]), "title": "NewJobSpec"}
    _demand_of(components["NewJobSpec"], "NewJobSpec")
    paths: dict[str, dict[str, Any]] = {}
    for op in operations:
        path = re.sub(r":path}", "}", op.path)
        paths.setdefault(path, {})[op.method.lower()] = _operation(op, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ModelOps",
            "version": version,
            "summary": "Submit jobs, watch them, and read their results.",
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _demand_of(component: dict[str, Any], name: str) -> None:
    for key, more in SCHEMA.get(name, {}).items():
        _demand(component["properties"][key], more)


def _demand(schema: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put what is checked of a value into its schema."""
    if "anyOf" in more:
        schema.pop("type", None)
    schema.update(more)


def _operation(op: Operation, schema_of: dict[Any, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "operationId": op.name,
        "summary": op.summary,
        "parameters": list(_parameters(op, schema_of)),
        "responses": {
            **{str(status): _answer(answer, schema_of) for status, answer in op.answers.items()},
            **{str(status): _problem(status, schema_of) for status in sorted(problems_of(op))},
        },
    }
    if op.body is not None:
        out["requestBody"] = _body(op.body, schema_of)
    out["security"] = [] if op.open else [{"token": [str(op.scope)]}]
    return out


def problems_of(op: Operation) -> set[int]:
    """Return every status of a problem that a route may answer."""
    if op.open:
        return {400, 500, *op.problems}
    scoped = () if op.scope is TokenScope.READ else (403,)
    return {*_OF_ALL, *scoped, *op.problems, *(_OF_BODIES if op.body is not None else ())}


def _parameters(op: Operation, schema_of: dict[Any, Any]) -> Iterable[dict[str, Any]]:
    for field in msgspec.structs.fields(op.parameters):
        schema, place = dict(schema_of[field.type]), place_of(field)
        description = schema.pop("description", "")
        default = field.default
        if default is not msgspec.NODEFAULT and default is not msgspec.UNSET and default != "":
            schema["default"] = default
        yield {
            "name": field.encode_name,
            "in": str(place),
            "required": place is Place.PATH or field.required,
            "description": description,
            "schema": schema,
        }


def _body(body: Body, schema_of: dict[Any, Any]) -> dict[str, Any]:
    schema = schema_of[body.type] if body.type is not None else {}
    return {"required": body.required, "content": {body.media_type: {"schema": schema}}}


def _answer(answer: Answer, schema_of: dict[Any, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"description": answer.description}
    if answer.headers:
        out["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in answer.headers.items()
        }
    if answer.media_type is not None:
        out["content"] = {answer.media_type: {"schema": schema_of.get(answer.type, {})}}
    return out


def _problem(status: int, schema_of: dict[Any, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "description": _SAID[status],
        "content": {MEDIA_TYPE: {"schema": schema_of[Problem]}},
    }
    if status in RETRY_AFTER_S:
        out["headers"] = {
            "Retry-After": {
                "description": "Seconds to wait.",
                "schema": {"type": "integer"},
                "required": True,
            }
        }
    return out
