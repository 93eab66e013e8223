"""A request for an evaluation: a bundle or a config, and what of it the user asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsun.bundle import read_bundle
from qsun.config import EvaluateConfig, RunConfig, load_config
from qsun.errors import ConfigError
from qsun.evaluate.router_address import RouterAddress
from qsun.jobs.api_key import read_api_key
from qsun.settings import settings_from


@dataclass(frozen=True)
class Request:
    """What the user asks for: a bundle or a config with its path, and what of it."""

    settings: EvaluateConfig
    out: Path
    bundle: Path | None = None
    run: RunConfig | None = None
    config: Path | None = None
    systems: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    limit: int | None = None
    floors: Path | None = None
    compare: Path | None = None
    base: Path | None = None
    allowed: tuple[str, ...] = ()
    served: str | None = None
    api_key: Path | None = None
    resume: bool = False
    dry_run: bool = False


def request_of(
    subject: Path, overrides: Sequence[str], *, out: Path | None, **options: Any
) -> Request:
    """The request for a bundle's folder or a config's file, its settings overridden.

    Raises:
        ConfigError: neither a bundle nor a config; or wrong settings, all named.
    """
    if subject.is_dir():
        bundle = read_bundle(subject.absolute())
        run = settings_from(_Settings, {}, overrides)
        return Request(run.evaluate, out or subject, bundle=bundle.folder, **options)
    run_config = load_config(subject, overrides)
    if out is None and not options.get("dry_run"):
        raise ConfigError("an evaluation of a config needs --out, the folder of its scorecard")
    folder = out or Path("exports")
    return Request(run_config.evaluate, folder, run=run_config, config=subject, **options)


@dataclass(frozen=True)
class _Settings:
    """What an override of a bundle's evaluation may name: the same keys as in a config."""

    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def router_address(request: Request) -> RouterAddress:
    """Where the router is, with its key.

    Raises:
        ConfigError: the file of the key cannot be read, or holds none.
    """
    return RouterAddress(str(request.served), read_api_key(request.api_key))
