"""The checks of a bundle as a whole: its files, and what its manifest promises for all modules."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qsun.bundle import Manifest
from qsun.errors import IncompatibleError
from qsun.launch_spec import LAUNCH_SPEC
from qsun.verify.static.bundle_files import BundleFiles, code_maps
from qsun.verify.static.contract import compare_cache_dtypes, compare_lengths
from qsun.verify.static.model_folder import CONFIG
from qsun.verify.static.modules import EXPORT_AGAIN, FETCH_AGAIN, Modules
from qsun.verify.static.serving_files import compare_served_lengths, compare_serving
from qsun.verify.static.tokenizer_files import SETTINGS
from qsun.verify.steps import Step, enumerated
from qsun.verify.subject import Subject

PATHS, LISTING, FILES, CODE = "static.paths", "static.listing", "static.files", "static.code"


def file_steps(files: BundleFiles) -> list[Step]:
    """Checks of a bundle's files, before any of them is taken for what it says."""
    return [
        Step(
            PATHS,
            "the manifest's paths and every link, with the bundle's folder",
            "Do not use this bundle: it reaches outside its folder. Export it again.",
            files.check_paths,
        ),
        Step(
            LISTING,
            "the files in the folder, with those that the manifest lists",
            FETCH_AGAIN,
            files.check_listing,
            needs=(PATHS,),
        ),
        Step(
            FILES,
            "the SHA-256 of every file, with the manifest's",
            FETCH_AGAIN,
            files.check_digests,
            needs=(PATHS,),
        ),
        Step(
            CODE,
            "every file's kind, and auto_map in every tokenizer's config",
            "Do not load this bundle: remove what runs code and export it again.",
            files.check_code,
            needs=(PATHS,),
        ),
    ]


def pair_steps(subject: Subject) -> list[Step]:
    """What stands for a bundle's file checks where there is no manifest."""
    folders = [subject.decode, subject.base, *subject.prefill.values()]
    paths = {f"{path.name}/{SETTINGS}": path / SETTINGS for path in folders if path is not None}
    return [
        Step(
            CODE,
            "auto_map in every tokenizer's config",
            "Use a tokenizer that transformers has built in.",
            partial(_require_no_code, paths),
        )
    ]


def _require_no_code(paths: dict[str, Path]) -> str:
    wrong = code_maps(paths)
    if wrong:
        raise IncompatibleError(enumerated(wrong))
    return "no auto_map"


def agreement_steps(modules: Modules, bundle: Path, manifest: Manifest) -> list[Step]:
    """Checks of what the manifest promises for all modules and workers."""
    configs = tuple(folder.path / CONFIG for folder in modules.checkpoints.values())
    based = () if modules.base is None else ("static.base_model.config",)
    tasks = tuple(f"static.module.{task}" for task in modules.full)
    configured = ("static.decode.config", *based, *tasks)
    return [
        Step(
            "static.cache_dtype",
            "the manifest's kv_cache_dtype, with every config's dtype and kv_cache_scheme",
            "Export the bundle again with the cache dtype that its modules were tuned with.",
            partial(compare_cache_dtypes, modules.checkpoints, manifest),
            needs=(PATHS, *configured),
            reads=configs,
        ),
        Step(
            "static.lengths",
            "the manifest's max_tokens, with every max_position_embeddings and --max-model-len",
            "Export the bundle again with a smaller max_tokens.",
            partial(_lengths, modules, bundle, manifest),
            needs=(PATHS, *configured),
            reads=(*configs, bundle / LAUNCH_SPEC),
        ),
        Step(
            "static.serving",
            f"the workers in {LAUNCH_SPEC}, with the manifest",
            f"{EXPORT_AGAIN} Its serving files come with it.",
            partial(compare_serving, bundle, manifest),
            needs=(PATHS,),
            reads=(bundle / LAUNCH_SPEC,),
        ),
    ]


def _lengths(modules: Modules, bundle: Path, manifest: Manifest) -> str:
    within = compare_lengths(modules.checkpoints, manifest.max_tokens)
    return within + compare_served_lengths(bundle, manifest)
