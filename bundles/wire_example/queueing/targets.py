"""A target: how far the simulated mean wait is from a wanted one."""

import base64
import json


def mean_wait(sim_returns, target_data=None):
    """Return the squared distance between the mean wait over all replicates and the wanted one.

    ``sim_returns``: ``[{"task_id", "outputs": {name: {"size", "checksum", "inline": base64}}}, ...]``.
    ``target_data``: ``{"mean_wait": float}``; by default 1.0.
    """
    wanted = (target_data or {}).get("mean_wait", 1.0)
    means = []
    for returned in sim_returns:
        summary = json.loads(base64.b64decode(returned["outputs"]["summary"]["inline"]))
        means.append(summary["mean_wait"])
    mean = sum(means) / len(means)
    return {"loss": (mean - wanted) ** 2, "diagnostics": {"mean_wait": mean, "wanted": wanted, "n": len(means)}}
