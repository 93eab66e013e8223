"""The address of a served bundle's router, and whether it serves what is to be evaluated."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from qsun.bundle import Bundle
from qsun.errors import ConfigError, ServingEnvironmentError, bullet_list

TIMEOUT_S = 600.0
UNNAMED = "names no bundle: an older qsun's router, or none of qsun's"


@dataclass(frozen=True)
class RouterAddress:
    """Where a bundle's router listens, and the key that it asks for."""

    url: str
    key: str | None = None

    def client(self) -> httpx.Client:
        """A client of it."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S, trust_env=False)


def require_router(address: RouterAddress, bundle: Bundle, tasks: list[str]) -> None:
    """See whether all tasks are served there, and are this bundle's.

    Raises:
        ServingEnvironmentError: nothing answers, or with an error.
        ConfigError: names every task that is not served, or is another or an unnamed bundle's.
    """
    try:
        with address.client() as client:
            answer = client.get("/v1/models")
            answer.raise_for_status()
            served = [(str(one["id"]), one.get("bundle")) for one in answer.json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ServingEnvironmentError(
            f"no router answers at {address.url}: {error!r}. Start it: qsun serve BUNDLE"
        ) from error
    names = [task for task, _ in served]
    missing = [task for task in tasks if task not in names]
    if missing:
        raise ConfigError(f"{address.url} serves {', '.join(names)}, not {', '.join(missing)}")
    # Modules of other bundles have the same tasks: their answers would be scored as this one's.
    others = [
        f"{task}: {UNNAMED if digest is None else f'bundle {digest}'}"
        for task, digest in served
        if task in tasks and digest != bundle.digest
    ]
    if others:
        raise ConfigError(
            f"{address.url} does not say that it serves {bundle.folder}, bundle {bundle.digest}:\n"
            f"{bullet_list(others)}\n"
            f"Serve it: qsun serve {bundle.folder}. Or evaluate the bundle that is served there."
        )
