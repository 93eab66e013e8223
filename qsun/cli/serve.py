"""`qsun serve BUNDLE`: one shared decode pool for every task of a bundle."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from qsun.jobs.serve import Prepared


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    from qsun.files import bytes_of

    if value is None:
        return None
    try:
        found = bytes_of(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if not found:
        raise click.BadParameter(f"{value}: a cache of no size holds no prompt")
    return found


def _counts(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    found = {}
    for value in values:
        task, equals, count = value.partition("=")
        if not equals or not count.isdecimal() or task in found:
            raise click.BadParameter(f"{value}: give TASK=NUMBER, each task once")
        found[task] = int(count)
    return found


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--decode", type=int, default=1, show_default=True, help="Decode workers.")
@click.option(
    "--prefill",
    multiple=True,
    metavar="TASK=N",
    callback=_counts,
    help="Prefill workers for a task [default: 1; LoRA tasks share theirs].",
)
@click.option(
    "--kv-cache",
    metavar="SIZE",
    callback=_bytes,
    help="Each worker's KV cache, as 6GiB [default: what vLLM finds free].",
)
@click.option(
    "--external",
    type=click.Path(path_type=Path),
    help="Start no workers: a file that says where they are.",
)
@click.option("--host", help="[default: 127.0.0.1, or as --external says]")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="[default: 8000, or as --external says]"
)
@click.option("--api-keys", type=click.Path(path_type=Path), help="Who may ask: NAME KEY a line.")
@click.option(
    "--admin-keys", type=click.Path(path_type=Path), help="Who may add and drain workers."
)
@click.option("--logs", type=click.Path(path_type=Path), help="Where workers' logs go.")
@click.option("--allow", multiple=True, metavar="CHECK", help="Serve although this check failed.")
@click.option("--dry-run", is_flag=True, help="Say what would be started, and stop.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
def command(
    bundle: Path,
    decode: int,
    prefill: dict[str, int],
    kv_cache: int | None,
    external: Path | None,
    host: str | None,
    port: int | None,
    api_keys: Path | None,
    admin_keys: Path | None,
    logs: Path | None,
    allow: tuple[str, ...],
    dry_run: bool,
    overrides: tuple[str, ...],
) -> None:
    """Serve BUNDLE's tasks behind one OpenAI-compatible address.

    Starts vLLM workers (prefill workers for the tasks, decode workers shared by all) and a router;
    with --external only the router. Ask for a task by its name as the `model`. BUNDLE must have
    passed `qsun verify`. SIGTERM and Ctrl-C let answers end first.
    """
    if external is not None and (prefill or decode != 1 or logs or kv_cache):
        raise click.UsageError(
            "--external starts no workers: no --decode, --prefill, --kv-cache or --logs"
        )
    from qsun.config import ServeConfig
    from qsun.jobs.serve import Request, prepare_serve, run_serve
    from qsun.settings import settings_from

    limits = settings_from(ServeConfig, {}, overrides)
    prepared = prepare_serve(
        Request(
            bundle=bundle,
            decode=decode,
            prefill=prefill,
            external=external,
            host=host,
            port=port,
            api_keys=api_keys,
            admin_keys=admin_keys,
            logs=logs,
            cache_bytes=kv_cache,
            allowed=allow,
        )
    )
    if dry_run:
        click.echo(_plan_text(prepared))
        return
    tasks = ", ".join(sorted(prepared.bundle.prefill))
    run_serve(prepared, limits, lambda url: click.echo(f"{tasks} at {url}"))


def _plan_text(prepared: Prepared) -> str:
    """Every worker's command, and where the router would listen."""
    lines = []
    if prepared.plan is not None:
        from qsun.vllm_server import SERVER_MODULE
        from qsun.workers import worker_commands

        commands = worker_commands(prepared.bundle.folder, prepared.plan)
        for worker, command in zip(prepared.plan.workers, commands, strict=True):
            tasks = "all tasks" if worker.role == "decode" else ", ".join(worker.tasks)
            variables = [f"{name}={value}" for name, value in sorted(command.environment.items())]
            words = [*variables, str(prepared.python), "-m", SERVER_MODULE, *command.arguments]
            lines.append(f"{worker.name}: {worker.role}, {tasks}, in {command.folder}")
            lines.append(f"  {shlex.join(words)}")
    if prepared.external is not None:
        for entry in prepared.external.workers:
            lines.append(
                f"{entry.name}: {entry.role}, {', '.join(sorted(entry.tasks))}, {entry.url}"
            )
    keys = "with keys" if prepared.keys.required else "without keys"
    return "\n".join([*lines, f"router: {prepared.host}:{prepared.port}, {keys}"])
