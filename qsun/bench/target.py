"""Whom a bench asks: a router's address, what it serves, and what its workers have done so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from qsun.errors import ConfigError, ServingEnvironmentError, bullet_list, nearest

TIMEOUT_S = 30.0


class NotReady(ConfigError):
    """Workers that may not be asked yet, or no more."""


@dataclass(frozen=True)
class Work:
    """What one worker has done since it started: tokens generated, and steps of its engine."""

    role: str
    generated: float
    steps: float


@dataclass(frozen=True)
class Target:
    """A router of qsun's. `bundle` is its bundle's digest; `decode` and `policy` are in words.

    Prompt and answer have at most `max_tokens` tokens; `workers` are names with their roles.
    """

    url: str
    key: str | None
    tasks: tuple[str, ...]
    bundle: str
    decode: str
    policy: str
    max_tokens: int
    workers: Mapping[str, str]

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def count(self, role: str) -> int:
        """How many workers of a role there are."""
        return sum(one == role for one in self.workers.values())


def find_target(url: str, key: str | None, tasks: Sequence[str]) -> Target:
    """Ask a router what it is. Without `tasks`, all that it serves are asked for.

    Raises:
        ServingEnvironmentError: nothing answers there, or no router of qsun's.
        ConfigError: tasks that it does not serve; names all.
        NotReady: not all workers may be asked; names them.
    """
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(
            base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False
        ) as client:
            models, metrics = client.get("/v1/models"), client.get("/metrics")
            for answer in (models, metrics):
                answer.raise_for_status()
            served = {str(one["id"]): int(one["max_model_len"]) for one in models.json()["data"]}
    except httpx.HTTPStatusError as error:
        raise ServingEnvironmentError(
            f"{error.request.url} answers with status {error.response.status_code}"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ServingEnvironmentError(
            f"no router answers at {url}: {error!r}. Start it: qsun serve BUNDLE"
        ) from error
    info = samples(metrics.text, "qsun_router_info")
    if len(info) != 1:
        raise ServingEnvironmentError(f"{url} is no router of qsun's: it counts no decode steps")
    missing = [task for task in tasks if task not in served]
    if missing:
        listed = bullet_list(f"{task} is not served ({nearest(task, served)})" for task in missing)
        raise ConfigError(f"{url} serves {', '.join(served)}:\n{listed}")
    ready = samples(metrics.text, "qsun_worker_ready")
    waiting = [labels["worker"] for labels, value in ready if not value]
    if waiting:
        raise NotReady(f"{url}: not ready yet, or lost: {', '.join(waiting)}")
    about = info[0][0]
    return Target(
        url,
        key,
        tuple(tasks or served),
        about["bundle"],
        about["decode"],
        about["policy"],
        min(served.values()),
        {labels["worker"]: labels["role"] for labels, _ in ready},
    )


def work_of(metrics: str) -> dict[str, Work]:
    """What every worker has done so far, out of a router's `/metrics`."""
    generated = {one["worker"]: value for one, value in samples(metrics, "qsun_worker_generated")}
    return {
        labels["worker"]: Work(labels["role"], generated[labels["worker"]], steps)
        for labels, steps in samples(metrics, "qsun_worker_steps")
    }


def samples(metrics: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Labels and values of one metric of a `/metrics` page."""
    return [
        (dict(sample.labels), float(sample.value))
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == name
    ]
