# /// script
# requires-python = ">=3.9"
# dependencies = []
#
# [tool.modelops]
# objective = "distance_from_half"
#
# [tool.modelops.study]
# replicates = 100
# seed = 1
# parameters = { heads = [0.4, 0.5, 0.6], tosses = [100] }
# ///
"""Toss a biased coin: a whole bundle in one file.

    modelops run bundles/coin.py
    modelops bundle run bundles/coin.py -p heads=0.6 -p tosses=100 -n 5
"""

import random


def simulate(params: dict, seed: int) -> dict:
    """Toss ``tosses`` times a coin that shows heads with probability ``heads``."""
    toss = random.Random(seed).random
    shown = [toss() < params["heads"] for _ in range(params["tosses"])]
    longest = current = 0
    for heads in shown:
        current = current + 1 if heads else 0
        longest = max(longest, current)
    return {"share_of_heads": sum(shown) / len(shown), "longest_run": longest}


def summarize(replicates: list) -> dict:
    """Average the replicates of one coin."""
    shares = sorted(replicate["share_of_heads"] for replicate in replicates)
    mean = sum(shares) / len(shares)
    return {
        "mean_share": mean,
        "lowest_share": shares[0],
        "highest_share": shares[-1],
        "mean_longest_run": sum(r["longest_run"] for r in replicates) / len(replicates),
        "distance_from_half": abs(mean - 0.5),
    }
