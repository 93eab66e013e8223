"""The address of a served bundle's router, and whether it serves what is to be evaluated."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from qsun.errors import ConfigError, ServingEnvironmentError

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class RouterAddress:
    """Where a bundle's router listens, and the key that it asks for."""

    url: str
    key: str | None = None

    def client(self) -> httpx.Client:
        """A client of it."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S, trust_env=False)


def require_router(address: RouterAddress, tasks: list[str]) -> None:
    """See whether all tasks are served there.

    Raises:
        ServingEnvironmentError: nothing answers, or with an error.
        ConfigError: names every task that is not served.
    """
    try:
        with address.client() as client:
            answer = client.get("/v1/models")
            answer.raise_for_status()
            served = [str(one["id"]) for one in answer.json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ServingEnvironmentError(
            f"no router answers at {address.url}: {error!r}. Start it: qsun serve BUNDLE"
        ) from error
    missing = [task for task in tasks if task not in served]
    if missing:
        raise ConfigError(f"{address.url} serves {', '.join(served)}, not {', '.join(missing)}")
