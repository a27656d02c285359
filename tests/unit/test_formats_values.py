"""The test vectors of docs/reference/values.md, both ways."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from doc_tables import rows_below
from test_values import same

from modelops_runner.values import KINDS, decode, encode

JSON = rows_below("values.md", "| value | `json` |")
F8 = rows_below("values.md", "| value | `f8`, hexadecimal |")
NPY = rows_below("values.md", "| array | kind | header |")


def bits(n: int) -> float:
    found: float = struct.unpack(">d", n.to_bytes(8))[0]
    return found


def value_of(expression: str) -> Any:
    return eval(expression, {"np": np, "bits": bits, "float": float})  # the page's own Python


@pytest.mark.parametrize(("expression", "text"), JSON, ids=[row[0] for row in JSON])
def test_a_value_is_this_json_and_this_json_that_value(expression: str, text: str) -> None:
    value = value_of(expression)
    assert encode(value) == ("json", text.encode())
    assert same(decode("json", text.encode()), value)
    json.loads(text)  # any parser can read it


@pytest.mark.parametrize(("expression", "kind", "header", "data"), NPY, ids=[row[0] for row in NPY])
def test_an_array_is_these_bytes_and_these_bytes_that_array(
    expression: str, kind: str, header: str, data: str
) -> None:
    value = value_of(expression)
    stored = b"\x93NUMPY\x01\x00v\x00" + header.encode().ljust(117) + b"\n" + bytes.fromhex(data)
    assert encode(value) == (kind, stored)
    assert same(decode(kind, stored), value)
    nested = json.loads(encode({"nested": value})[1])["nested"]
    assert nested.keys() == {f"${kind}"}
    assert same(decode("json", json.dumps(nested).encode()), value)


@pytest.mark.parametrize(("expression", "data"), F8)
def test_a_float_is_these_eight_bytes(expression: str, data: str) -> None:
    value = value_of(expression)
    assert struct.pack("<d", value).hex() == data
    assert same(decode("f8", bytes.fromhex(data)), value)
    with pytest.raises(ValueError, match="8 bytes, not 7"):
        decode("f8", bytes.fromhex(data)[:7])


@pytest.mark.parametrize("kind", ["bytes", "bytearray"])
def test_bytes_are_themselves(kind: str) -> None:
    value = {"bytes": bytes, "bytearray": bytearray}[kind](range(256))
    assert encode(value) == (kind, bytes(range(256)))
    assert same(decode(kind, bytes(range(256))), value)


def test_the_page_lists_exactly_the_kinds_that_are_read() -> None:
    listed = [kind for row in rows_below("values.md", "| kind | bytes |") for kind in row[0].split("`, `")]
    assert sorted(listed) == sorted(KINDS)


def test_every_tag_has_a_vector_or_is_a_nested_kind() -> None:
    tags = {row[0].partition('"')[2].partition('"')[0] for row in rows_below("values.md", "| tag | value |")}
    shown = {tag for tag in tags if any(f'{{"{tag}":' in text for _, text in JSON)}
    assert tags - shown == {"$npy", "$arrow"}, (
        "a nested array is checked above, a table in test_formats_stored"
    )
