"""`qsun export` and `qsun verify`, the commands, on tiny models as a user has them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from qsun.bundle import read_bundle, write_manifest
from qsun.decode_checkpoint import DecodeCheckpoint, weights_digest
from qsun.errors import IncompatibleError
from qsun.files import digest_folder, link_or_copy
from qsun.records import PICTURE, REPORT
from qsun.verdict import VERDICT, require_verdict
from tests.builders import tiny_model
from tests.command import Outcome, run_qsun
from tests.tuning import tune, write_run

LORA = {"tune__module": "lora", "tune__lora": {"rank": 4, "alpha": 8.0}}


@pytest.fixture(scope="module")
def modules(
    tiny_folder: Path, tiny_module: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What a user has before an export: a decode module, prefill modules, their configs."""
    found = {"decode": tiny_module, "base": tiny_folder}
    for name, changes in (("lora", LORA), ("full", {})):
        config = write_run(tmp_path_factory.mktemp(name), tiny_folder, **changes)
        assert tune(config).exit_code == 0
        found[name] = config.parent / "out" / "module"
        found[f"{name}-config"] = config
    return found


def export_config(modules: dict[str, Path], folder: Path, module: str, **changes: Any) -> Path:
    """The tuning's own config with a section `export`."""
    shutil.copytree(
        modules[f"{module}-config"].parent, folder, ignore=shutil.ignore_patterns("out")
    )
    path = folder / "run.yaml"
    run = yaml.safe_load(path.read_text(encoding="utf-8"))
    run["export"] = {
        "decode": str(modules["decode"]),
        "prefill": [{"task": "task", "module": str(modules[module])}],
        **changes,
    }
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def exported(modules: dict[str, Path], folder: Path, module: str, *options: str) -> Path:
    config = export_config(modules, folder / "config", module)
    outcome = run_qsun("export", config, "--out", folder / "bundle", *options)
    assert outcome.exit_code == 0, outcome.stderr
    return folder / "bundle"


def test_a_link_to_a_file_gives_the_file_another_name(tmp_path: Path) -> None:
    """As in the Hub's cache, where a model's files are symbolic links."""
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "named").symlink_to("blob")
    (tmp_path / "bundle").mkdir()
    link_or_copy(str(tmp_path / "named"), str(tmp_path / "bundle" / "named"))
    assert not (tmp_path / "bundle" / "named").is_symlink()
    assert (tmp_path / "bundle" / "named").samefile(tmp_path / "blob")


def test_linked_modules_are_not_copied_and_stay_as_they_are(
    modules: dict[str, Path], tmp_path: Path
) -> None:
    before = digest_folder(modules["lora"])
    config = export_config(modules, tmp_path / "config", "lora")
    options = ("--out", tmp_path / "bundle", "--set", "export.link=true")
    outcome = run_qsun("export", config, *options)
    assert outcome.exit_code == 0, outcome.stderr
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.base is not None
    for inside, outside in ((bundle.base, "base"), (bundle.decode, "decode")):
        weights = "model.safetensors"
        assert (inside / weights).samefile(modules[outside] / weights)
    assert digest_folder(modules["lora"]) == before
    assert run_qsun("verify", bundle.folder, "--static").exit_code == 0


@pytest.mark.parametrize(("module", "format_"), [("lora", "awq"), ("full", "compressed-tensors")])
def test_a_bundle_is_whole_and_passes(
    modules: dict[str, Path], tmp_path: Path, module: str, format_: str
) -> None:
    folder = exported(modules, tmp_path, module, "--format", format_)
    bundle = read_bundle(folder)
    assert (bundle.base is None) == (module == "full")
    assert bundle.manifest.decode_scheme.endswith(format_)
    (entry,) = bundle.manifest.prefill
    assert (entry.task, entry.module, entry.system) == ("task", module, "sun")
    assert entry.reference_loss is not None
    assert entry.base_loss is not None
    assert entry.reference_loss < entry.base_loss
    for name in (
        "launch.json",
        "workers.json",
        "compose.yaml",
        "kubernetes.yaml",
        "qsun_guard.txt",
    ):
        assert (folder / "serving" / name).is_file()
    assert "task" in (folder / "README.md").read_text(encoding="utf-8")
    for name in (REPORT, PICTURE):
        assert name in bundle.manifest.files
        assert (folder / name).read_bytes() == (modules["decode"] / name).read_bytes()
    assert f"({REPORT})" in (folder / "README.md").read_text(encoding="utf-8")
    with (
        DecodeCheckpoint(folder / "decode") as found,
        DecodeCheckpoint(modules["decode"]) as wanted,
    ):
        assert [one.digest() for one in found.layers()] == [one.digest() for one in wanted.layers()]

    with pytest.raises(IncompatibleError, match="never verified"):
        require_verdict(bundle, ("static",))
    outcome = run_qsun("verify", folder, "--set", "drift_tokens=0")
    assert outcome.exit_code == 0, outcome.stdout + outcome.stderr
    assert "\nCOMPATIBLE" in outcome.stdout
    require_verdict(bundle, ("static", "numeric"))
    with pytest.raises(IncompatibleError, match="lacks the level served"):
        require_verdict(bundle, ("static", "served"))
    assert run_qsun("verify", folder, "--static").exit_code == 0  # its own verdict is no intruder


def verified(folder: Path, *options: str) -> Outcome:
    return run_qsun("verify", folder, "--set", "drift_tokens=0", *options)


def test_a_verdict_is_of_its_bundle_alone(modules: dict[str, Path], tmp_path: Path) -> None:
    folder = exported(modules, tmp_path, "lora")
    assert verified(folder, "--static").exit_code == 0
    bundle = read_bundle(folder)
    require_verdict(bundle, ("static",))
    write_manifest(folder, replace(bundle.manifest, name="another"))
    with pytest.raises(IncompatibleError, match="another bundle"):
        require_verdict(read_bundle(folder), ("static",))


def test_failures_have_their_own_exit_codes(modules: dict[str, Path], tmp_path: Path) -> None:
    folder = exported(modules, tmp_path, "lora")
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "changed\n", encoding="utf-8")
    outcome = verified(folder)
    assert outcome.exit_code == 11
    assert "static.files" in outcome.message
    assert "README.md" in outcome.message
    assert "numeric: an earlier level failed" in outcome.stdout
    verdict = json.loads((folder / VERDICT).read_text(encoding="utf-8"))["result"]
    assert verdict["compatible"] is False
    with pytest.raises(IncompatibleError, match=r"README\.md"):
        require_verdict(read_bundle(folder), ("static",))
    require_verdict(read_bundle(folder), ("static",), allowed=["static.files", "numeric"])

    assert verified(folder, "--static", "--skip", "static.files").exit_code == 0
    with pytest.raises(IncompatibleError, match=r"static\.files"):
        require_verdict(read_bundle(folder), ("static",))

    outcome = run_qsun("verify", tmp_path / "config")
    assert outcome.exit_code == 11
    assert "is no bundle" in outcome.message


def test_a_bare_pair_says_what_it_lacks(modules: dict[str, Path], tmp_path: Path) -> None:
    pair = ("verify", "--prefill", modules["full"], "--decode", modules["decode"])
    outcome = run_qsun(*pair, "--set", "drift_tokens=0")
    assert outcome.exit_code == 12, outcome.stdout
    assert "--references" in outcome.message
    outcome = run_qsun(*pair, "--static", "--out", tmp_path / "verdict")
    assert outcome.exit_code in (0, 12)
    assert (tmp_path / "verdict" / VERDICT).is_file()
    assert run_qsun("verify", "--prefill", modules["full"]).exit_code == 2


def refused(config: Path, exit_code: int, *options: str) -> str:
    out = config.parent / "new" / "bundle"
    outcome = run_qsun("export", config, "--out", out, *options)
    assert outcome.exit_code == exit_code, outcome.stderr
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    return outcome.message


def test_the_folders_of_runs_make_the_same_bundle(modules: dict[str, Path], tmp_path: Path) -> None:
    wanted = read_bundle(exported(modules, tmp_path / "named", "lora"))
    outcome = run_qsun(
        *("export", modules["decode"], modules["lora"], "--out", tmp_path / "bundle"),
        *("--set", "export.references=3"),
    )
    assert outcome.exit_code == 0, outcome.stderr
    found = read_bundle(tmp_path / "bundle")
    assert found.manifest.prefill[0].reference_loss != wanted.manifest.prefill[0].reference_loss
    folders = ("decode/", "prefill/", "tokenizer/")
    same = [
        {name: digest for name, digest in one.manifest.files.items() if name.startswith(folders)}
        for one in (found, wanted)
    ]
    assert same[0] == same[1] != {}


def test_folders_that_make_no_bundle(modules: dict[str, Path], tmp_path: Path) -> None:
    def message(*folders: Path) -> str:
        outcome = run_qsun("export", *folders, "--out", tmp_path / "bundle")
        assert outcome.exit_code == 3
        assert not (tmp_path / "bundle").exists()
        return outcome.message

    found = message(modules["lora"], modules["full"], modules["base"])
    assert "one folder must be a decode module's, of `qsun quantize`; given: none" in found
    assert f"{modules['full']} was tuned by" in found
    assert f"{modules['base']} has neither" in found
    assert "no folder is of `qsun tune`" in message(modules["decode"])
    shutil.copytree(modules["lora"] / "records", tmp_path / "old" / "records")
    path = tmp_path / "old" / "records" / "tuning.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | {"command": record["command"] + " --gone"}))
    (tmp_path / "broken" / "records").mkdir(parents=True)
    (tmp_path / "broken" / "records" / "tuning.json").write_text("{")
    found = message(modules["decode"], tmp_path / "old", tmp_path / "broken")
    assert "--gone" in found
    assert "is not a qsun record" in found
    kept = modules["lora-config"].read_text(encoding="utf-8")
    modules["lora-config"].write_text(kept.replace("task.yaml", "other.yaml"), encoding="utf-8")
    try:
        assert "names another base or tasks since" in message(modules["decode"], modules["lora"])
    finally:
        modules["lora-config"].write_text(kept, encoding="utf-8")


def test_every_offender_is_named_before_the_work(modules: dict[str, Path], tmp_path: Path) -> None:
    tiny_model(tmp_path / "wide", kv_heads=4)
    prefill = [
        {"task": "unknown", "module": str(modules["lora"])},
        {"task": "task", "module": str(tmp_path / "wide")},
        {"task": "task", "module": str(tmp_path / "nowhere")},
    ]
    changes = {"prefill": prefill, "decode": str(tmp_path)}
    message = refused(export_config(modules, tmp_path / "c", "lora", **changes), 4)
    for part in ("unknown", "kv_heads: 2, 4", "nowhere", "export.decode", "named twice"):
        assert part in message


def test_what_cannot_be_served_is_refused(modules: dict[str, Path], tmp_path: Path) -> None:
    config = export_config(modules, tmp_path / "c", "lora")
    record = tmp_path / "module"
    shutil.copytree(modules["lora"], record)
    path = record / "records" / "tuning.json"
    tuning = json.loads(path.read_text(encoding="utf-8"))
    tuning["result"]["boundary"] = "n"
    path.write_text(json.dumps(tuning), encoding="utf-8")
    changed = f"export.prefill=[{{task: task, module: {record}}}]"
    assert "boundary" in refused(config, 11, "--set", changed)
    assert "reference_tokens" in refused(config, 6, "--set", "export.reference_tokens=16")
    assert "has no section `export`" in refused(modules["lora-config"], 3)


def test_a_module_is_of_the_decode_module_that_it_was_tuned_through(
    modules: dict[str, Path], tmp_path: Path
) -> None:
    """Either format of it, but not another quantization of the same base."""
    module = tmp_path / "module"
    shutil.copytree(modules["lora"], module)
    path = module / "records" / "tuning.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["result"]["decode_digest"] = weights_digest(modules["decode"])
    path.write_text(json.dumps(record), encoding="utf-8")
    changed = f"export.prefill=[{{task: task, module: {module}}}]"
    folder = exported(modules, tmp_path, "lora", "--set", changed, "--format", "awq")
    outcome = verified(folder)
    assert outcome.exit_code == 0, outcome.stderr
    assert "numeric.tuned_through.task: the same" in outcome.stdout

    other = tmp_path / "other"
    shutil.copytree(modules["decode"], other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("weight_scale"))
    weights[name][0] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = tmp_path / "config" / "run.yaml"
    options = ("--set", changed, "--set", f"export.decode={other}")
    assert "tuned through another decode module" in refused(config, 4, *options)

    record["result"]["decode_digest"] = "0" * 64
    path = folder / "prefill" / "task" / "records" / "tuning.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    outcome = verified(folder, "--skip", "static.files")
    assert outcome.exit_code == 11
    assert "numeric.tuned_through.task: another" in outcome.message


def test_a_used_folder_stays_as_it_was(modules: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    config = export_config(modules, tmp_path / "c", "lora")
    outcome = run_qsun("export", config, "--out", tmp_path / "out")
    assert outcome.exit_code == 7
    assert "reading the tasks" not in outcome.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_no_token_no_push(
    modules: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config = export_config(modules, tmp_path / "c", "lora")
    assert "HF_TOKEN" in refused(config, 7, "--push", "org/name")
