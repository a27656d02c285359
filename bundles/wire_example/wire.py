"""The wire function: by its name and place ModelOps finds it, and calls it once per replicate."""

import csv
import importlib
import io
import json


def wire(entrypoint, params, seed):
    """Run one replicate.

    ``entrypoint`` is ``"module/scenario"`` or ``"module:scenario"``; the working directory is the root of
    the bundle. Returns the outputs by name: bytes as they are, text is encoded, anything else becomes JSON.
    """
    module, _, scenario = entrypoint.replace(":", "/").rpartition("/")
    with open("scenarios.json") as file:  # noqa: PTH123  a relative read, as bundles of this kind do
        settings = {**json.load(file)[scenario], **params}
    waits = importlib.import_module(module).waits(settings, seed)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["customer", "wait"])
    writer.writerows(enumerate(waits))
    summary = {"mean_wait": sum(waits) / len(waits), "longest_wait": max(waits)}
    return {"waits.csv": table.getvalue().encode(), "summary": summary, "scenario": scenario}
