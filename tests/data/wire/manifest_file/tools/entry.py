"""A wire function that says what it was given."""

import json
import os


def call(entrypoint, params, seed):
    """Return the call and the working directory: text, bytes and JSON."""
    return {
        "entrypoint": entrypoint,
        "call": {"params": params, "seed": seed},
        "raw": json.dumps([entrypoint, seed]).encode(),
        "here": sorted(os.listdir()),
        "declared": "manifest_file",
    }
