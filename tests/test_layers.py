"""Imports go one way: errors <- config <- models <- stages <- jobs <- cli."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "qsun"
STAGES = (
    "calibrate",
    "tune",
    "quantize",
    "export",
    "verify",
    "evaluate",
    "serve",
    "bench",
    "simulate",
    "report",
)
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__init__", "errors", "files", "progress", "quiet", "figures"),
    (
        *("settings", "config", "records", "kv_layout", "autoawq", "sources", "scheme"),
        "layer_picture",
    ),
    (
        *("checkpoint_files", "skeleton", "models", "gguf_file", "decode_checkpoint", "scoring"),
        *("environments", "ports", "vllm_process", "vllm_server", "inspection", "doctor"),
        *("rows", "calls", "functions", "chats", "tasks", "processes"),
        *("handoff", "generation", "prefill_module", "references", "rounding", "gemm_checkpoint"),
        *("decode_recipe", "packed_checkpoint", "block"),
        *(
            "guard",
            "bundle",
            "verdict",
            "kernel_advice",
            "launch_arguments",
            "launch_spec",
            "hub",
            "workers",
            "worker_counts",
            "disaggregation",
            "policy",
            "room_queue",
            "workload",
            "latency_summary",
        ),
    ),
    STAGES,
    ("jobs",),
    ("cli",),
)
GUARD = "qsun.guard.qsun_guard"
IN_SERVING = {GUARD, "qsun.vllm_process"}
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def unit(module: str) -> str:
    """The part of qsun that a module belongs to: `qsun.cli.main` is of `cli`."""
    return [*module.split("."), "__init__"][1]


def modules() -> dict[str, ast.Module]:
    """Every module of qsun by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Every module that is imported anywhere in `tree`; of qsun, the modules themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in names else str(node.module)


def qsun_imports() -> dict[str, set[str]]:
    trees = modules()
    return {
        name: {other for other in imports(tree, set(trees)) if is_ours(other)} - {name}
        for name, tree in trees.items()
    }


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "qsun"


def test_every_module_has_its_layer() -> None:
    found = {unit(name) for name in modules()}
    assert found == LAYER_OF.keys()


def test_nothing_imports_from_a_higher_layer() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in qsun_imports().items()
        for other in others
        if LAYER_OF[unit(other)] > LAYER_OF[unit(name)]
    ]
    assert wrong == []


def test_no_stage_imports_another() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in qsun_imports().items()
        for other in others
        if unit(name) in STAGES and unit(other) in STAGES and unit(name) != unit(other)
    ]
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    edges = qsun_imports()
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in finished:
            for other in sorted(edges[name]):
                visit(other, (*path, name))
            finished.add(name)

    for name in edges:
        visit(name, ())


def test_vllm_is_imported_by_its_plug_in_alone() -> None:
    importing = {
        name
        for name, tree in modules().items()
        for other in imports(tree, set())
        if other.partition(".")[0] == "vllm"
    }
    assert importing == {GUARD}


def test_what_runs_in_the_serving_environment_imports_nothing_of_qsun() -> None:
    found = qsun_imports()
    assert [name for name in sorted(IN_SERVING) if found[name]] == []
    assert [name for name, others in found.items() if others & IN_SERVING - {name}] == []
