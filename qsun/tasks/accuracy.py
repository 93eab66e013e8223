"""Accuracy: how many responses were right, and how sure that makes one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

CONFIDENCE_Z = 1.96  # 95 %


@dataclass(frozen=True)
class Accuracy:
    """Right responses of all; its interval is Wilson's, 95 %, over the test's examples."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        """Right responses of all, 0 to 1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval (1927), which holds near 0 and 1 too."""
        n, p, z = self.total, self.share, CONFIDENCE_Z
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def summary(self) -> dict[str, Any]:
        """What a record keeps."""
        low, high = self.interval
        return {
            "accuracy": self.share,
            "correct": self.correct,
            "total": self.total,
            "interval_95": [low, high],
        }
