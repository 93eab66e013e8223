"""What the bundle is: its modules, their digests, and which bundles the records name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qsun.bundle import Bundle, Manifest, PrefillModule
from qsun.kernel_advice import kernel_advice
from qsun.report.amounts import NOT_RECORDED, count
from qsun.report.blocks import Block, Section, Table, Text
from qsun.report.sources import Sources

WEIGHTS = ".safetensors"
BOUNDARIES = {"n-1": "all but the last of a prompt's positions", "n": "all of a prompt's positions"}


def bundle_section(sources: Sources) -> Section | None:
    """The bundle itself, and the names of all bundles where records name several."""
    bundle = sources.bundle
    several = len(sources.bundles) > 1
    if bundle is None:
        if not several:
            return None
        summary = f"records of {len(sources.bundles)} bundles, none of which was given"
        return Section("Bundles", summary, (_names(sources),))
    manifest = bundle.manifest
    tasks = [module.task for module in manifest.prefill]
    blocks: list[Block] = [
        Text(
            "Each task has a prefill module of its own, which writes a prompt's KV cache; one "
            "frozen decode module reads any task's cache and predicts every token of every answer."
        ),
        _facts(bundle),
        _modules(manifest.prefill),
        _digests(manifest),
    ]
    if several:
        blocks.append(_names(sources))
    summary = f"{len(tasks)} tasks ({', '.join(tasks)}), decode module {manifest.decode_scheme}"
    return Section("Bundle", summary, tuple(blocks))


def _facts(bundle: Bundle) -> Table:
    manifest, layout = bundle.manifest, bundle.manifest.kv_layout
    advice = kernel_advice(manifest.decode_scheme, layout, manifest.decode_batch)
    written = BOUNDARIES.get(manifest.boundary, "some of a prompt's positions")
    rows = [
        ("name", manifest.name),
        ("base model", _origin(str(manifest.base.get("model")))),
        ("base model's revision", manifest.base.get("revision") or NOT_RECORDED),
        ("decode module", manifest.decode_scheme),
        ("decode kernels", NOT_RECORDED if advice is None else advice.text),
        ("boundary", f"{manifest.boundary}: a prefill module writes {written}"),
        (
            "KV cache",
            f"{layout.get('layers')} layers, {layout.get('kv_heads')} KV heads of "
            f"{layout.get('head_dim')}, {layout.get('dtype')}",
        ),
        ("prompt and answer", f"at most {count(manifest.max_tokens)} tokens"),
        ("made", manifest.created or NOT_RECORDED),
        ("made with", _versions(manifest.versions)),
        ("manifest's SHA-256", bundle.digest),
    ]
    return Table("What the bundle is, by its manifest", ("", "what"), tuple(rows))


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or NOT_RECORDED


def _origin(model: str) -> str:
    """Where the base model is from; of a local folder no more than its name."""
    if model.startswith((".", "/", "~")):
        return f"a local folder, {Path(model).name}"
    return model


def _modules(modules: tuple[PrefillModule, ...]) -> Table:
    rows = tuple(
        (
            module.task,
            module.module if module.rank is None else f"{module.module}, rank {module.rank}",
            module.system or NOT_RECORDED,
            module.boundary,
            _loss(module.reference_loss),
            _loss(module.base_loss),
        )
        for module in modules
    )
    header = ("task", "prefill module", "tuned as", "boundary", "loss", "base model's loss")
    return Table("Tasks; loss in nats a token of held-back answers", header, rows)


def _loss(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{value:.3f}"


def _digests(manifest: Manifest) -> Table:
    base: Mapping[str, Any] = manifest.base.get("sha256") or {}
    files = [(f"{name} of the base model", str(digest)) for name, digest in base.items()]
    files += [one for one in manifest.files.items() if one[0].endswith(WEIGHTS)]
    return Table("Weights", ("file", "SHA-256"), tuple(files))


def _names(sources: Sources) -> Table:
    def records(digest: str) -> Iterator[str]:
        if sources.bundle is not None and sources.bundle.digest == digest:
            yield "the bundle of this page"
        yield from (source.name for source in sources.records if source.bundle == digest)

    rows = tuple(
        (sources.name_of(digest), ", ".join(records(digest)), digest) for digest in sources.bundles
    )
    return Table("Bundles that the records name", ("", "records", "manifest's SHA-256"), rows)
