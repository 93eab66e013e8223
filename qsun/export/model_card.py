"""The model card of a bundle: what it is, what was measured, how to verify and serve it.

Its numbers come from the bundle's records alone; where one is missing, the card says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qsun import __version__
from qsun.bundle import Manifest
from qsun.export.containers import ROUTER_IMAGE, VLLM_IMAGE
from qsun.export.kubernetes import BUNDLE_CLAIM, DECODE_REPLICAS
from qsun.export.scores import task_section
from qsun.export.serving_files import COMPOSE_FILE, KUBERNETES_FILE
from qsun.kernel_advice import kernel_advice
from qsun.kv_layout import DTYPE_BYTES
from qsun.launch_spec import LAUNCH_SPEC, NOTE
from qsun.records import REPORT, Record, read_record

MODEL_CARD = "README.md"
# Where a record may lie: among the bundle's, or with its module.
QUANTIZATION_RECORDS = ("records/quantization.json", "{path}/records/quantization.json")
TUNING_RECORDS = ("records/tuning-{task}.json", "{path}/records/tuning.json")
NOT_QUANTIZED = (*DTYPE_BYTES, "full precision")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHTS = ".safetensors"
BOUNDARIES = {"n-1": "all but the last", "n": "all"}


def write_model_card(folder: Path, manifest: Manifest, licence: str | None) -> None:
    """Write the card of the bundle in `folder`; `licence` is the Hub's name of its licence.

    Raises:
        QsunError: a record that is there but cannot be read.
    """
    places = [name.format(path=manifest.decode_path) for name in QUANTIZATION_RECORDS]
    quantization = _record(folder, places, "quantization")
    tuning = {}
    for module in manifest.prefill:
        places = [name.format(path=module.path, task=module.task) for name in TUNING_RECORDS]
        tuning[module.task] = _record(folder, places, "tuning")
    sections = (
        _introduction(manifest),
        _provenance(manifest, licence),
        _decode_module(manifest, quantization),
        _prefill_modules(manifest),
        *(
            task_section(module, tuning[module.task], _is_quantized(manifest))
            for module in manifest.prefill
        ),
        _use(),
        _limits(manifest),
    )
    lines = [line for section in sections for line in (*section, "")]
    text = f"---\n{_front_matter(manifest, licence)}---\n\n" + "\n".join(lines).rstrip() + "\n"
    (folder / MODEL_CARD).write_text(text, encoding="utf-8")


def _record(folder: Path, places: Sequence[str], kind: str) -> Record | None:
    """The first of these records that is there."""
    found = (folder / place for place in places if (folder / place).is_file())
    return next((read_record(path, kind) for path in found), None)


def _front_matter(manifest: Manifest, licence: str | None) -> str:
    quantized = _is_quantized(manifest)
    origin = str(manifest.base.get("model"))
    kinds = sorted({module.module for module in manifest.prefill})
    value: dict[str, Any] = {
        "license": licence,
        "base_model": origin if HUB_ID.fullmatch(origin) else None,
        "library_name": "qsun",
        "pipeline_tag": "text-generation",
        "quantization": manifest.decode_scheme if quantized else None,
        "tags": ["qsun", "vllm", "disaggregated-prefill", *kinds],
    }
    kept = {key: entry for key, entry in value.items() if entry is not None}
    return str(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))


def _is_quantized(manifest: Manifest) -> bool:
    return manifest.decode_scheme not in NOT_QUANTIZED


def _introduction(manifest: Manifest) -> Iterator[str]:
    count = len(manifest.prefill)
    yield f"# {manifest.name}"
    yield ""
    yield (
        f"{count} task{'s' if count > 1 else ''}, one shared decoder. A task's prefill module "
        "writes the prompt's KV cache; one frozen decode module reads any task's cache and "
        "predicts every token of every response (SUN, arXiv 2603.02599). Made by "
        f"qsun {__version__}; served by vLLM with prefill and decode workers."
    )


def _provenance(manifest: Manifest, licence: str | None) -> Iterator[str]:
    base = manifest.base
    yield "## Provenance"
    yield ""
    revision = base.get("revision") or "not recorded"
    yield f"- Base model: {_origin(str(base.get('model')))}, revision {revision}."
    for name, digest in (base.get("sha256") or {}).items():
        yield f"- Base weights `{name}`: SHA-256 `{digest}`."
    for name, digest in manifest.files.items():
        if name.endswith(WEIGHTS):
            yield f"- `{name}`: SHA-256 `{digest}`."
    yield f"- Licence: {licence or 'not stated; see those of the base model and of the task data'}."
    if manifest.created:
        yield f"- Made: {manifest.created}."
    if manifest.versions:
        named = (f"{name} {version}" for name, version in manifest.versions.items())
        yield f"- With {', '.join(named)}."
    yield "- `bundle.json` has the SHA-256 of every file; `records/` holds what made each module."


def _origin(model: str) -> str:
    """Where the base model is from; of a local folder no more than its name."""
    if model.startswith((".", "/", "~")):
        return f"a local folder, `{Path(model).name}`"
    return f"`{model}`"


def _decode_module(manifest: Manifest, record: Record | None) -> Iterator[str]:
    yield "## The decode module"
    yield ""
    what = f"`{manifest.decode_path}/`: the base model's weights"
    if not _is_quantized(manifest):
        yield f"{what} in full precision, {manifest.kv_layout['dtype']}."
        return
    yield f"{what}, quantized: {manifest.decode_scheme}."
    advice = kernel_advice(manifest.decode_scheme, manifest.kv_layout, manifest.decode_batch)
    if advice is not None:
        yield f"Its {advice.text}."
    if record is None:
        yield "Its quantization record is missing: what quantizing cost is not known."
        return
    result = record.result
    calibration, heldout = result["calibration"], result["heldout"]
    perplexity = result["quantization"]["perplexity"]
    yield (
        f"Calibrated on {calibration['samples']} samples ({calibration['tokens']} tokens). "
        f"Perplexity of the module alone, on {heldout['samples']} held-out samples "
        f"({heldout['tokens']} tokens):"
    )
    yield ""
    yield "| full precision | round-to-nearest | this module |"
    yield "|---|---|---|"
    yield (
        f"| {perplexity['full_precision']:.2f} | {perplexity['round_to_nearest']:.2f} "
        f"| {perplexity['quantized']:.2f} |"
    )
    if REPORT in manifest.files:
        yield ""
        yield f"How each layer fared, and why the worst did: [`{REPORT}`]({REPORT})."


def _prefill_modules(manifest: Manifest) -> Iterator[str]:
    yield "## The prefill modules"
    yield ""
    yield "| task | folder | module | LoRA rank | tuned as | boundary |"
    yield "|---|---|---|---|---|---|"
    for module in manifest.prefill:
        rank, system = module.rank or "", module.system or "not recorded"
        cells = (module.task, f"`{module.path}/`", module.module, rank, system, module.boundary)
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    positions = BOUNDARIES.get(manifest.boundary, "some")
    yield f"Boundary {manifest.boundary}: P writes {positions} of a prompt's n positions."


def _use() -> Iterator[str]:
    yield "## Verify and serve"
    yield ""
    yield "`qsun verify FOLDER` says whether these modules belong together: `records/verdict.json`."
    yield ""
    yield "- `qsun serve FOLDER --decode 2`: workers and router on this machine, one address."
    yield f"- `{LAUNCH_SPEC}`: the workers of one host without a GPU, with their arguments."
    yield (
        f"- `docker compose -f {COMPOSE_FILE} up`: one host, one GPU for each worker; the router "
        "listens on loopback unless QSUN_ADDRESS names another address."
    )
    yield (
        f"- `kubectl apply --namespace NAME -f {KUBERNETES_FILE}`: one GPU for each worker, "
        f"{DECODE_REPLICAS} decode workers; a namespace of its own, in which the claim "
        f"`{BUNDLE_CLAIM}` holds this folder."
    )
    yield (
        f"- Workers run `{VLLM_IMAGE}`. The router's image, `{ROUTER_IMAGE}`, is not published: "
        "build it from qsun's source."
    )
    yield ""
    yield NOTE


def _limits(manifest: Manifest) -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield f"- Prompt and response together have at most {manifest.max_tokens} tokens."
    yield "- A task has the languages and domain of its training data; nothing else was tested."
    yield "- These weights are one set: with another decode or prefill module, answers are wrong."
    yield "- The Compose file and the manifests assume NVIDIA GPUs, TCP between workers, no RDMA."
    yield (
        "- They are checked against Compose's and Kubernetes' schemas and vLLM's own argument "
        "parser; no cluster has run them."
    )
