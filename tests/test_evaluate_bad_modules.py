"""Modules and routers that `qsun evaluate` refuses, before it opens a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from qsun.bundle import read_bundle
from qsun.errors import ConfigError
from qsun.evaluate.routed import RoutedModules
from qsun.ports import free_ports
from tests.builders import tiny_model, write_config
from tests.bundles import write_decode, write_tuning_record
from tests.command import run_qsun
from tests.evaluating import evaluate, write_definitions
from tests.lm_eval_tasks import local_task
from tests.refusing import Refused, bundle, hurry, own_task, refused, shared

__all__ = ["bundle", "hurry", "refused", "shared"]

OTHER = "0" * 64  # another bundle's digest


@contextmanager
def router_of(*tasks: str, digest: str | None = None, key: str | None = None) -> Iterator[str]:
    """The address of what says that it serves these tasks of a bundle, to who has the key."""
    named = {} if digest is None else {"bundle": digest}
    body = json.dumps({"data": [{"id": task, **named} for task in tasks]}).encode()

    class Models(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = key is None or self.headers["Authorization"] == f"Bearer {key}"
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_said: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Models)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_dead_router_is_told_how_to_start_one(bundle: Path, refused: Refused) -> None:
    (port,) = free_ports(1)
    message = refused(8, bundle, "--served", f"http://127.0.0.1:{port}")
    assert f"no router answers at http://127.0.0.1:{port}" in message
    assert "Start it: qsun serve BUNDLE" in message
    assert "no router answers at nowhere" in refused(8, bundle, "--served", "nowhere")


def test_a_router_that_serves_other_tasks_is_refused(bundle: Path, refused: Refused) -> None:
    with router_of("math", "quiz") as url:
        message = refused(3, bundle, "--served", url)
        assert f"{url} serves math, quiz, not code" in message
        message = refused(3, bundle, "--served", url, "--systems", "base")
        assert "the router answers with no such system" in message
        message = refused(3, bundle, "--served", url, "--systems", "sun")
        assert "task math: sun needs sun" in message


def test_another_bundle_with_the_same_tasks_is_refused(bundle: Path, refused: Refused) -> None:
    own = read_bundle(bundle).digest
    for served, told in ((OTHER, f"bundle {OTHER}"), (None, "names no bundle: an older qsun's")):
        with router_of("math", "code", digest=served) as url:
            message = refused(3, bundle, "--served", url)
            assert f"{url} does not say that it serves {bundle}, bundle {own}:" in message
            assert f"- math: {told}" in message
            assert f"- code: {told}" in message
            assert f"Serve it: qsun serve {bundle}." in message
            # lm-eval's command builds the model by itself.
            with pytest.raises(ConfigError, match=f"math: {told}"):
                RoutedModules(str(bundle), "math", url)


def test_a_router_of_the_same_bundle_is_taken(bundle: Path, tmp_path: Path) -> None:
    with router_of("code", "math", "poems", digest=read_bundle(bundle).digest) as url:
        outcome = evaluate(bundle, "--served", url, "--dry-run", out=tmp_path / "out")
        assert outcome.exit_code == 0, outcome.stderr
        RoutedModules(str(bundle), "math", url)


def test_log_likelihoods_are_not_asked_of_a_router(
    bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_task(monkeypatch, local_task("multiple_choice"))
    with router_of("math", "code", digest=read_bundle(bundle).digest) as url:
        message = refused(6, bundle, "--served", url, "--tasks", "math:own")
    assert "math.own: a router gives no log-likelihoods of prompts: leave --served out" in message


def test_a_router_wants_its_key(bundle: Path, refused: Refused, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    with router_of("math", key="right") as url:
        options = ("--served", url, "--api-key-file", keys)
        assert "cannot be read" in refused(3, bundle, *options)
        keys.write_text("\n", encoding="utf-8")
        assert f"there is no key in {keys}" in refused(3, bundle, *options)
        keys.write_text("us wrong\n", encoding="utf-8")
        assert "401" in refused(8, bundle, *options)
        for line in ("us right\n", "right\n"):
            keys.write_text(line, encoding="utf-8")
            assert "serves math, not code" in refused(3, bundle, *options)


def config_of(folder: Path, **modules: Path) -> Path:
    """A config over a tiny model and its decode module, for task math."""
    tiny_model(folder / "base")
    write_decode(folder / "base", folder / "decode", "compressed-tensors")
    write_definitions(folder)
    named = {name: str(path) for name, path in modules.items()}
    return write_config(
        folder,
        "./base",
        tasks=["math.yaml"],
        evaluate__decode="decode",
        evaluate__modules=[{"task": "math"} | named],
    )


def tuned(folder: Path, system: str, seed: int, **record: Any) -> Path:
    tiny_model(folder, seed=seed)
    write_tuning_record(folder, "full", {}, system=system, **record)
    return folder


def test_modules_that_are_not_what_they_are_called_are_all_named(
    tmp_path: Path, refused: Refused
) -> None:
    config = config_of(
        tmp_path / "run",
        sun=tuned(tmp_path / "sun", "qsun", 1, decode_digest="0" * 64),
        qsun=tuned(tmp_path / "qsun", "sun", 2),
        full_ft=tuned(tmp_path / "full", "full-ft", 3),
        awq_full_ft=tuned(tmp_path / "dense", "full-ft", 4),
    )
    message = refused(4, config)
    assert f"task math, sun: {tmp_path / 'sun'} was tuned as qsun" in message
    assert f"task math, qsun: {tmp_path / 'qsun'} was tuned as sun" in message
    assert f"task math, awq_full_ft: {tmp_path / 'dense'} is not quantized" in message
    assert "full_ft: " in message
    assert "math, full_ft" not in message


def test_a_module_of_another_decode_module_or_boundary_or_shape_is_refused(
    tmp_path: Path, refused: Refused
) -> None:
    other = tuned(tmp_path / "qsun", "qsun", 1, decode_digest="0" * 64, boundary="n")
    wide = tmp_path / "wide"
    tiny_model(wide, kv_heads=4)
    config = config_of(tmp_path / "run", qsun=other, full_ft=wide)
    message = refused(4, config)
    assert "task math, qsun: tuned through another decode module than" in message
    assert "task math, full_ft: another KV layout than the base model's" in message
    config = config_of(tmp_path / "two", qsun=other, sun=tuned(tmp_path / "sun", "sun", 2))
    assert "modules were tuned for different boundaries: ['n', 'n-1']" in refused(4, config)


def test_a_config_needs_an_output_modules_and_no_router(tmp_path: Path, refused: Refused) -> None:
    config = config_of(tmp_path / "run", sun=tuned(tmp_path / "sun", "sun", 1))
    outcome = run_qsun("evaluate", config, "--set", "evaluate.tpot=skip")
    assert outcome.exit_code == 3
    assert "needs --out, the folder of its scorecard" in outcome.message
    message = refused(3, config, "--served", "http://127.0.0.1:1")
    assert "--served needs the BUNDLE that the router serves" in message
    bare = write_config(tmp_path / "bare", tmp_path / "run" / "base")
    assert "name each task's folders under evaluate.modules" in refused(3, bare)
    text = config.read_text(encoding="utf-8").replace("sun:", "sum:")
    config.write_text(text, encoding="utf-8")
    assert "sum: no such setting (did you mean sun?)" in refused(3, config)
