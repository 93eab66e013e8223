"""The definition of a text set: which sources, how many samples, how long, which seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from qsun.errors import ConfigError, bullet_list
from qsun.settings import load_settings
from qsun.sources import SourceDefinition, source_problems


@dataclass(frozen=True)
class TextDefinition:
    """A set of samples for calibration or held-out measurement, mixed from its sources."""

    description: str
    sources: tuple[SourceDefinition, ...]
    samples: int = field(default=128, metadata={"minimum": 1})
    min_tokens: int = field(default=16, metadata={"minimum": 2})
    max_tokens: int = field(default=512, metadata={"minimum": 2})
    seed: int = 0

    def samples_of(self) -> list[int]:
        """Samples that each source gives: shares by weight, largest remainders rounded up."""
        total = sum(source.weight for source in self.sources)
        shares = [self.samples * source.weight / total for source in self.sources]
        counts = [int(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for index in by_remainder[: self.samples - sum(counts)]:
            counts[index] += 1
        return counts


def load_definition(path: Path) -> TextDefinition:
    """Read a definition from `calib/`.

    Raises:
        ConfigError: every mistake, each named.
    """
    definition = load_settings(TextDefinition, path)
    problems = [] if definition.sources else ["sources: at least one is needed"]
    if definition.min_tokens > definition.max_tokens:
        problems.append("min_tokens is above max_tokens: no sample could ever fit")
    if definition.sources and not sum(source.weight for source in definition.sources):
        problems.append("sources: every weight is 0")
    for source in definition.sources:
        problems += source_problems(source)
    if problems:
        raise ConfigError(f"{path} has {len(problems)} mistake(s):\n{bullet_list(problems)}")
    return definition
