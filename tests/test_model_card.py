"""The model card: every number out of a record, and what is missing said to be missing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsun import __version__
from qsun.errors import QsunError
from qsun.export.model_card import write_model_card
from tests.manifests import manifest, prefill_module

ROOT = Path(__file__).parent.parent
TUNING = ROOT / "exports/reference/math/records/tuning.json"
FULL_FT = ROOT / "exports/reference/math-full-ft/records/tuning.json"
QUANTIZATION = ROOT / "docs/records/smollm2-135m-w4-awq.json"
MATH = (prefill_module("math", rank=8),)


def card(folder: Path, licence: str | None = "apache-2.0", **changes: Any) -> str:
    write_model_card(folder, manifest(**changes), licence)
    return (folder / "README.md").read_text()


def add(
    folder: Path, source: Path, name: str, change: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Put a real record into the bundle, its result changed; gives the result."""
    value = json.loads(source.read_text())
    value["result"] |= change or {}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))
    result: dict[str, Any] = value["result"]
    return result


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def section(text: str, title: str) -> str:
    return text.partition(f"# {title}\n")[2].partition("\n#")[0]


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    assert front_matter(card(tmp_path)) == {
        "license": "apache-2.0",
        "base_model": "org/base-model",
        "library_name": "qsun",
        "pipeline_tag": "text-generation",
        "quantization": "W4A16 asymmetric, group 64",
        "tags": ["qsun", "vllm", "disaggregated-prefill", "full", "lora"],
    }


@pytest.mark.parametrize("model", ["package:weights/file.gguf", "/home/someone/base", "./base"])
def test_only_a_hub_s_name_is_a_base_model_for_the_hub(tmp_path: Path, model: str) -> None:
    text = card(tmp_path, None, base={"model": model, "revision": None, "sha256": {}})
    assert front_matter(text).keys().isdisjoint({"base_model", "license"})
    assert "someone" not in text
    provenance = section(text, "Provenance")
    assert f"`{Path(model).name}`" in provenance or f"`{model}`" in provenance
    assert "revision not recorded" in provenance
    assert "Licence: not stated" in provenance


def test_provenance_has_the_digests(tmp_path: Path) -> None:
    provenance = section(card(tmp_path), "Provenance")
    assert "`org/base-model`, revision abc123" in provenance
    assert "Base weights `model.safetensors`: SHA-256 `b0`" in provenance
    assert "`decode/model.safetensors`: SHA-256 `d0`" in provenance
    assert "torch 2.13.0" in provenance


@pytest.mark.parametrize("place", ["records/tuning-math.json", "prefill/math/records/tuning.json"])
def test_scores_are_the_record_s(tmp_path: Path, place: str) -> None:
    result = add(tmp_path, TUNING, place)
    found = section(card(tmp_path, prefill=MATH), "math")
    for name, score in result["tests"]["sun"].items():
        low, high = score["interval_95"]
        shared = result["task"]["overlap_with_training"][name]["shared"]
        assert (
            f"| {name} | `sun` | {100 * score['accuracy']:.1f} ({100 * low:.1f} to "
            f"{100 * high:.1f}) | {score['total']} | {shared}, by 13 words in a row |"
        ) in found
    assert f"Tuned on {result['rows']['train']['rows']} rows, seed 1" in found
    losses = result["validation_loss"]
    assert f"`sun` {losses['sun']:.3f}, `base` {losses['base']:.3f}" in found
    assert "tuned for a decoder in full precision; the one here is quantized" in found
    assert "not of this bundle as served" in found


def test_other_scores_in_the_record_are_other_scores_in_the_card(tmp_path: Path) -> None:
    score = {"accuracy": 0.5, "correct": 2, "total": 4, "interval_95": [0.15, 0.85]}
    add(tmp_path, TUNING, "records/tuning-math.json", {"tests": {"qsun": {"fresh": score}}})
    text = card(tmp_path, prefill=MATH)
    assert "| fresh | `qsun` | 50.0 (15.0 to 85.0) | 4 | not recorded |" in text
    recorded = json.loads(TUNING.read_text(encoding="utf-8"))["result"]["tests"]["sun"]["seen"]
    assert f"{100 * recorded['accuracy']:.1f} (" not in text


def test_a_fine_tuned_module_shows_the_hand_off_beside_it(tmp_path: Path) -> None:
    add(tmp_path, FULL_FT, "records/tuning-math.json")
    found = section(card(tmp_path, prefill=MATH), "math")
    assert "| seen | `full-ft` |" in found
    assert "| seen | `naive` |" in found
    assert "which this bundle does not hold" in found


def test_without_tests_there_is_no_table(tmp_path: Path) -> None:
    add(tmp_path, TUNING, "records/tuning-math.json", {"tests": {}})
    found = section(card(tmp_path, prefill=MATH), "math")
    assert "No test was run." in found
    assert "| test |" not in found


def test_licences_of_the_data_are_those_of_the_manifest(tmp_path: Path) -> None:
    add(tmp_path, TUNING, "records/tuning-math.json")
    assert "Licences of its task data: none in its definition." in card(tmp_path, prefill=MATH)
    licences = {"org/calls": "CC-BY-4.0", "own": "MIT"}
    licensed = tuple(replace(module, licences=licences) for module in MATH)
    assert "org/calls (CC-BY-4.0), own (MIT)." in card(tmp_path, prefill=licensed)


def test_perplexity_is_the_record_s(tmp_path: Path) -> None:
    result = add(tmp_path, QUANTIZATION, "records/quantization.json")
    found = section(card(tmp_path), "The decode module")
    perplexity = result["quantization"]["perplexity"]
    cells = (perplexity[one] for one in ("full_precision", "round_to_nearest", "quantized"))
    assert f"| {' | '.join(f'{cell:.2f}' for cell in cells)} |" in found
    assert f"on {result['heldout']['samples']} held-out samples" in found
    assert "W4A16 asymmetric, group 64" in found


def test_missing_records_are_said_to_be_missing_and_no_score_is_made_up(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "quantization record is missing" in section(text, "The decode module")
    for task in ("math", "tools", "code.v2", "SQL"):
        assert "tuning record is missing" in section(text, task)
    assert re.findall(r"\d+\.\d+ \(", text) == []
    assert "| full precision |" not in text


@pytest.mark.parametrize("scheme", ["bfloat16", "full precision"])
def test_a_decoder_in_full_precision_is_not_called_quantized(tmp_path: Path, scheme: str) -> None:
    add(tmp_path, TUNING, "records/tuning-math.json")
    text = card(tmp_path, prefill=MATH, decode_scheme=scheme)
    assert "quantization" not in front_matter(text)
    assert "weights in full precision, bfloat16." in section(text, "The decode module")
    assert "the one here is quantized" not in text
    assert "is missing" not in text


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    add(tmp_path, QUANTIZATION, "records/tuning-math.json")
    with pytest.raises(QsunError, match="not a tuning"):
        card(tmp_path, prefill=MATH)
    shutil.rmtree(tmp_path / "records")
    (tmp_path / "records").mkdir()
    (tmp_path / "records/tuning-math.json").write_text("{")
    with pytest.raises(QsunError, match="is not a qsun record"):
        card(tmp_path, prefill=MATH)


def test_the_card_says_how_to_verify_and_serve(tmp_path: Path) -> None:
    found = section(card(tmp_path), "Verify and serve")
    for what in (
        "qsun verify",
        "docker compose -f serving/compose.yaml up",
        "serving/kubernetes.yaml",
        "serving/launch.json",
        "`vllm/vllm-openai:v",
        f"`qsun:{__version__}`, is not published",
        "Clients must never reach them",
    ):
        assert what in found
    assert "at most 2048 tokens" in section(card(tmp_path), "Limits")
