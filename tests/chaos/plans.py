"""The studies of the soak."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import modelops as mo

BUNDLE = Path(__file__).parents[1] / "data" / "chaos"
MAX_RETRIES = 12
STEP_S = 0.05  # of the model


@dataclass(frozen=True)
class Plan:
    """One study: its name, how long a replicate takes, how many there are.

    ``bearable``: how many runners and workers may die of one replicate before the killer spares it.
    """

    name: str
    seconds: float
    params: int
    replicates: int
    spread: float = 1.0
    checkpoints: bool = False
    isolation: str = "warm"
    bearable: int = 4

    @property
    def is_long(self) -> bool:
        """Whether a replicate takes so long that it cannot be begun again and again."""
        return self.seconds >= 60

    def steps(self, replicate: int) -> int:
        """Return how many steps a replicate walks: the model's own formula."""
        return round(self.seconds * (1 + self.spread * (replicate % 5 - 2) / 4) / STEP_S)

    def study(self, folder: Path) -> mo.Study:
        """Return the study; the same one each time, so that its results are."""
        last = self.params - 1
        return mo.Study(
            bundle=BUNDLE,
            parameters=[
                {
                    "p": p,
                    "folder": str(folder),
                    "seconds": self.seconds,
                    "spread": self.spread,
                    "checkpoints": self.checkpoints,
                    "gate": self.replicates - 2 if p == last else -1,
                }
                for p in range(self.params)
            ],
            replicates=self.replicates,
            seed=7,
            aggregate="model:summarize",
            min_success=0.5,
            isolation=self.isolation,
            # A kill of a runner is a crash like any other. The replicate that always fails ends by the same rule.
            retry=mo.Retry(max_retries=MAX_RETRIES, initial_delay=0.05, on=["crashed", "failed"]),
        )


PLANS = (
    Plan("steady", 0.4, 4, 20),
    Plan("quick", 0.1, 10, 24),
    Plan("forked", 0.4, 2, 30, isolation="fork"),
    Plan("slow", 1.5, 2, 12, checkpoints=True),
)
LONG = Plan("minute", 60.0, 1, 2, spread=0.0, bearable=1)
