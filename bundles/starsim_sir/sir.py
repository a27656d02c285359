"""An agent-based SIR with starsim: agents in a random network, one replicate per seed."""

import os

# Starsim registers fonts for its plots when it is imported; nothing is plotted here.
os.environ.setdefault("STARSIM_INSTALL_FONTS", "0")

import numpy as np
import starsim as ss

WEEKS = 52


def simulate(params: dict, seed: int) -> dict:
    """Simulate one epidemic.

    Parameters
    ----------
    params
        ``beta``: probability of transmission per contact and week. ``n_agents`` and ``n_contacts`` (mean
        per agent): by default 2,000 and 4.
    seed
        Of this replicate, given to starsim as ``rand_seed``.

    Returns
    -------
        ``prevalence``: share of the agents infected, per week, float64. ``peak``: its largest value, and
        ``peak_week`` when. ``attack_rate``: share infected by the end, those infected at the start included.
    """
    n_agents = params.get("n_agents", 2_000)
    disease = ss.SIR(
        beta=ss.perweek(params["beta"]),
        init_prev=ss.bernoulli(p=0.01),
        dur_inf=ss.lognorm_ex(mean=ss.weeks(4), std=ss.weeks(1)),
        p_death=ss.bernoulli(p=0),
    )
    sim = ss.Sim(
        n_agents=n_agents,
        diseases=disease,
        networks=ss.RandomNet(n_contacts=ss.poisson(params.get("n_contacts", 4))),
        start=ss.date("2025-01-01"),
        dur=ss.weeks(WEEKS),
        dt=ss.weeks(1),
        rand_seed=seed,
        verbose=0,
    )
    sim.run()
    results = sim.results[disease.name]
    prevalence = np.asarray(results.prevalence, dtype=np.float64)
    return {
        "prevalence": prevalence,
        "peak": float(prevalence.max()),
        "peak_week": int(prevalence.argmax()),
        "attack_rate": 1 - float(results.n_susceptible[-1]) / n_agents,
    }


def summarize(replicates: list) -> dict:
    """Average the epidemics of one parameter set.

    ``loss`` is the distance of the mean attack rate from one half: it finds the ``beta`` that infects half.
    """
    prevalence = np.array([replicate["prevalence"] for replicate in replicates])
    attack_rate = float(np.mean([replicate["attack_rate"] for replicate in replicates]))
    return {
        "mean_prevalence": prevalence.mean(axis=0),
        "mean_peak": float(prevalence.max(axis=1).mean()),
        "mean_attack_rate": attack_rate,
        "loss": abs(attack_rate - 0.5),
    }
