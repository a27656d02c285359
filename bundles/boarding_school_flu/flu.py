"""Influenza in an English boarding school, January 1978: a stochastic SIR.

763 boys; on each of 14 days the number confined to bed was counted. The data are from "Influenza in a
boarding school", British Medical Journal, 4 March 1978, p. 587.
"""

import math

import numpy as np

BOYS = 763
CONFINED_TO_BED = np.array([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4])
DAYS = len(CONFINED_TO_BED)
STEPS_PER_DAY = 8
LEVELS = {"low95": 0.025, "low50": 0.25, "median": 0.5, "high50": 0.75, "high95": 0.975}


def simulate(params: dict, seed: int) -> dict:
    """Simulate one outbreak as a chain-binomial SIR, from the three boys in bed on day 1.

    In a step of 1/8 day each susceptible boy is infected with probability
    ``1 - exp(-transmission * infected / 763 / 8)``, and each infected boy recovers with probability
    ``1 - exp(-recovery / 8)``. An infected boy is not in bed at exactly the hours in which he is infectious:
    the number confined to bed is Poisson around the number infected.

    Parameters
    ----------
    params
        ``transmission`` and ``recovery``, rates per day. Their quotient is the basic reproduction number.
    seed
        Of this replicate.

    Returns
    -------
        ``infected`` and ``confined``: counts on days 1 to 14, shape ``(14,)``. ``attack_rate``: share of the
        boys infected by day 14. ``peak_day``: the day (1 to 14) on which most are confined.
    """
    random = np.random.default_rng(seed)
    infected = int(CONFINED_TO_BED[0])
    susceptible = BOYS - infected
    recovers = -math.expm1(-params["recovery"] / STEPS_PER_DAY)
    force = params["transmission"] / BOYS / STEPS_PER_DAY
    daily = [infected]
    for _ in range(DAYS - 1):
        for _ in range(STEPS_PER_DAY):
            new = random.binomial(susceptible, -math.expm1(-force * infected))
            infected += new - random.binomial(infected, recovers)
            susceptible -= new
        daily.append(infected)
    confined = random.poisson(daily)
    return {
        "infected": np.array(daily),
        "confined": confined,
        "attack_rate": 1 - susceptible / BOYS,
        "peak_day": int(confined.argmax()) + 1,
    }


def summarize(replicates: list[dict]) -> dict:
    """Compare the replicates of one parameter set with the data.

    Returns
    -------
        ``loss``: the mean over days of `crps`, in boys; lower is better. ``loss_of_mean``: the same loss for a
        predictor that says the observed mean on every day. ``days_covered``: on how many of the 14 days
        the data lie in the 95% band. ``low95``, ``low50``, ``median``, ``high50``, ``high95``: quantiles
        of the number confined to bed, shape ``(14,)``; they are predictive, observation noise included.
    """
    confined = np.array([replicate["confined"] for replicate in replicates], dtype=float)
    bands = {name: np.quantile(confined, level, axis=0) for name, level in LEVELS.items()}
    inside = (bands["low95"] <= CONFINED_TO_BED) & (CONFINED_TO_BED <= bands["high95"])
    always_the_mean = np.full((1, DAYS), CONFINED_TO_BED.mean())
    return {
        "loss": float(crps(confined, CONFINED_TO_BED).mean()),
        "loss_of_mean": float(crps(always_the_mean, CONFINED_TO_BED).mean()),
        "days_covered": int(inside.sum()),
        **bands,
    }


def crps(ensemble: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Return the continuous ranked probability score of an ensemble of predictions, day by day.

    ``mean |x - y| - mean |x - x'| / 2``: a proper score in the unit of the data, the absolute error when
    the prediction is a single number, so that a distribution and a number can be compared.

    Parameters
    ----------
    ensemble
        Shape ``(n, days)``.
    observed
        Shape ``(days,)``.

    Source
    ------
    Gneiting & Raftery (2007), equation 21, doi:10.1198/016214506000001437.
    """
    n = len(ensemble)
    rank = np.arange(1, n + 1)[:, np.newaxis]
    # Sum over all pairs of |x - x'|, from the sorted ensemble in n log n.
    spread = ((2 * rank - n - 1) * np.sort(ensemble, axis=0)).sum(axis=0) / n**2
    return np.abs(ensemble - observed).mean(axis=0) - spread
