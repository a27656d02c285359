"""Customers at one counter: a queue with random arrivals and random service times (M/M/1)."""

import random


def waits(settings: dict, seed: int) -> list:
    """Return how long each customer waits before being served, by Lindley's recursion.

    Source: Lindley (1952), doi:10.1017/S0305004100027638.
    """
    chance = random.Random(seed)
    wait, result = 0.0, []
    for _ in range(settings["customers"]):
        result.append(wait)
        served, until_next = (
            chance.expovariate(settings["service_rate"]),
            chance.expovariate(settings["arrival_rate"]),
        )
        wait = max(0.0, wait + served - until_next)
    return result
