"""Is poison told apart sample by sample where classes are of very different sizes?"""

from __future__ import annotations

from typing import Any

from doorward.bench.suite import Claim, Data, Group, ScanSettings, Suite
from doorward.bench.suites.training_data import DETECTORS, LARGE, SMOKE, sets

RPP = "Lin et al. 2026, arXiv 2602.00183, its FPR unknown"


def imbalanced(*ratios: float, rows: int, epochs: int, models: int) -> list[Group]:
    """Return CIFAR-10 with nine classes thinned, 5 % of all poisoned."""
    patch: dict[str, Any] = {"colour": (255, 255, 0), "poison_rate": 0.05}
    return [
        sets(
            Data(name="cifar10", rows=rows),
            "badnets",
            patch | ({"imbalance": (0.9, ratio)} if ratio > 1 else {}),
            name=f"rho-{ratio:g}" if ratio > 1 else "balanced",
            about=f"mu .9, rho {ratio:g}" if ratio > 1 else "balanced",
            epochs=epochs,
            architecture=LARGE,
            models=models,
        )
        for ratio in ratios
    ]


SUITE = Suite(
    name="imbalanced-data",
    title="Inspect imbalanced training data",
    about="Poisoned training sets, balanced and not, each with a model that was trained on it and on nothing "
    "else. No trusted data are given. What counts is how well samples are told apart.",
    scan_settings=ScanSettings(detectors=DETECTORS),
    scales={
        "smoke": (
            sets(
                SMOKE,
                "badnets",
                {"poison_rate": 0.05, "imbalance": (0.5, 5)},
                about="white 3x3 patch, half of the classes thinned",
                epochs=6,
            ),
        ),
        "cpu": tuple(imbalanced(1, 10, 100, rows=20_000, epochs=14, models=3)),
        "full": tuple(imbalanced(1, 2, 10, 100, 200, rows=20_000, epochs=30, models=3)),
    },
    claims=tuple(
        Claim(
            text=f"TPR {theirs} with {who}",
            source=RPP,
            measure="samples_ranked",
            groups=(f"cifar10-badnets-{name}",),
            at_least=least,
        )
        for name, who, theirs, least in (
            ("balanced", "activation clustering", "97.8 %", 0.978),
            ("balanced", "RPP", "98.5 %", 0.965),
            ("rho-10", "RPP", "96.7 %", 0.947),
            ("rho-100", "activation clustering", "39.2 %", 0.392),
            ("rho-100", "RPP", "100 %", 0.98),
        )
    ),
)
