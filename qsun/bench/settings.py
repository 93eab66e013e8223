"""What a bench is asked to do: loads, how long, how often, and what counts as good."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product

from qsun.errors import ConfigError, bullet_list
from qsun.workload import Workload, problems_of


@dataclass(frozen=True)
class BenchConfig:
    """Every pair of a load (`rates` a second, or `concurrency` users) and an `alpha` is a point.

    A point is run `repeats` times of `seconds` each, with another seed every time; before each run
    every task is asked `warmup` times. Lengths, arrivals and alpha are a `Workload`'s. A request is
    good if its TTFT and TPOT are within `ttft_s` and `tpot_s`, seconds.
    """

    rates: tuple[float, ...] = field(default=(), metadata={"minimum": 1e-6})
    concurrency: tuple[int, ...] = field(default=(), metadata={"minimum": 1})
    alphas: tuple[float, ...] = field(default=(0.0,), metadata={"minimum": 0.0, "maximum": 20.0})
    arrivals: str = "poisson"
    prompt_tokens: str = "fixed:256"
    output_tokens: str = "fixed:64"
    seconds: float = field(default=60.0, metadata={"minimum": 1.0})
    repeats: int = field(default=3, metadata={"minimum": 1})
    seed: int = 0
    warmup: int = field(default=2, metadata={"minimum": 0})
    ttft_s: float = field(default=1.0, metadata={"minimum": 0.0})
    tpot_s: float = field(default=0.05, metadata={"minimum": 0.0})

    def workloads(self, max_tokens: int) -> list[Workload]:
        """The points' workloads, with lengths cut off at `max_tokens`.

        Raises:
            ConfigError: no load, or forms that cannot be drawn; all are named.
        """
        common = Workload(
            arrivals=self.arrivals,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            max_tokens=max_tokens,
        )
        loads = [replace(common, rate_per_s=rate) for rate in self.rates]
        loads += [replace(common, concurrency=users) for users in self.concurrency]
        found = [replace(load, alpha=alpha) for load, alpha in product(loads, self.alphas)]
        problems = [problem for one in found for problem in problems_of(one)]
        problems += [] if found else ["no load: give --rate or --concurrency, or a --trace"]
        problems += [] if self.alphas else ["alphas: at least one"]
        if problems:
            listed = bullet_list(dict.fromkeys(problems))
            raise ConfigError(f"this load cannot be made:\n{listed}")
        return found


def name_of(workload: Workload) -> str:
    """A point's name, unique among a bench's, fit for a file: `rate-2-alpha-1`."""
    if workload.concurrency is not None:
        return f"users-{workload.concurrency}-alpha-{workload.alpha:g}"
    return f"rate-{workload.rate_per_s:g}-alpha-{workload.alpha:g}"
