"""The checks of one task's prefill module."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qsun.bundle import Manifest, PrefillModule
from qsun.errors import IncompatibleError, UncheckedError
from qsun.launch_spec import LAUNCH_SPEC
from qsun.prefill_module import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qsun.verify.static.adapters import Adapter, compare_adapter, is_adapter
from qsun.verify.static.contract import require_full_precision
from qsun.verify.static.model_folder import CONFIG, ModelFolder
from qsun.verify.static.module_steps import BASE, DECODE, same_contract, tensor_step, text_steps
from qsun.verify.static.modules import EXPORT_AGAIN, Modules, remedy
from qsun.verify.static.serving_files import compare_ranks
from qsun.verify.static.tuning_records import (
    QUANTIZATION_RECORD,
    base_of_decode,
    compare_base,
    compare_boundary,
    compare_system,
    known_base,
    require_record,
)
from qsun.verify.steps import Step
from qsun.verify.subject import TUNING_RECORD

NAME_BASE = "Name the base model that it was tuned on, in full precision."
TUNE_AGAIN = "Tune the module by `qsun tune` through this decode module."


def prefill_steps(modules: Modules, task: str, first: tuple[str, ...]) -> list[Step]:
    """Checks of a task's module; `first` are the checks that all of them need."""
    folder = ModelFolder(modules.folder(task))
    steps = (
        _lora_steps(modules, task, first)
        if modules.lora(task)
        else _full_steps(modules, task, first)
    )
    names = (f"static.tokenizer.{task}", f"static.chat_template.{task}")
    steps += text_steps(modules, folder, f"{task} module", names)
    return steps + _record_steps(modules, task, first)


def _full_steps(modules: Modules, task: str, first: tuple[str, ...]) -> list[Step]:
    folder, module = modules.full[task], f"static.module.{task}"
    return [
        Step(
            module,
            f"the {task} module's config.json, with what the manifest says it is",
            remedy(modules, "Fetch the module again."),
            partial(_checkpoint, folder),
            needs=first,
            reads=(folder.path / CONFIG, folder.path / ADAPTER_CONFIG),
        ),
        tensor_step(f"static.tensors.{task}", f"{task} module", modules, folder, module),
        Step(
            f"static.kv_layout.{task}",
            f"the {task} module's KV layout and attention, with those it must have",
            remedy(modules, TUNE_AGAIN),
            partial(same_contract, modules, folder),
            needs=(module, f"{DECODE}.config"),
            reads=(folder.path / CONFIG, modules.decode.path / CONFIG),
        ),
    ]


def _checkpoint(folder: ModelFolder) -> str:
    if is_adapter(folder.path):
        raise IncompatibleError(f"the manifest says full, but it holds an {ADAPTER_CONFIG}")
    return require_full_precision(folder)


def _lora_steps(modules: Modules, task: str, first: tuple[str, ...]) -> list[Step]:
    adapter, module = Adapter(modules.folder(task)), f"static.module.{task}"
    based = () if modules.base is None else (f"{BASE}.kv_layout",)
    fitted = () if modules.base is None else (f"{BASE}.tensors",)
    files = (adapter.path / ADAPTER_CONFIG, adapter.path / ADAPTER_WEIGHTS)
    launch = () if modules.subject.folder is None else (modules.subject.folder / LAUNCH_SPEC,)
    return [
        Step(
            module,
            f"the {task} module's {ADAPTER_CONFIG}, with what the manifest says it is",
            remedy(modules, "Fetch the module again."),
            lambda: f"a {adapter.config['peft_type']} adapter",
            needs=first,
            reads=files[:1],
        ),
        Step(
            f"static.tensors.{task}",
            f"the {task} module's {ADAPTER_WEIGHTS}, with its own header",
            remedy(modules, "Fetch the module again."),
            lambda: f"{len(adapter.headers)} tensors",
            needs=(module,),
            reads=files[1:],
        ),
        Step(
            f"static.kv_layout.{task}",
            f"the KV layout of the base model under {task}'s adapter, with what it must be",
            remedy(modules, NAME_BASE),
            partial(_layout_of_base, modules),
            needs=(module, *based),
        ),
        Step(
            f"static.lora.{task}",
            f"the {task} module's adapter, with the base model, its rank and what vLLM computes",
            remedy(modules, NAME_BASE),
            partial(_fitting_adapter, modules, task, adapter),
            needs=(f"static.tensors.{task}", *fitted),
            reads=launch,
        ),
    ]


def _layout_of_base(modules: Modules) -> str:
    if modules.base is not None:
        return "the base model's, which an adapter cannot change"
    return _require_base(modules)


def _require_base(modules: Modules) -> str:
    if modules.manifest is not None:
        raise IncompatibleError("an adapter, but the manifest names no base_path to put it on")
    raise UncheckedError("an adapter is compared on its base model, and there is none")


def _fitting_adapter(modules: Modules, task: str, adapter: Adapter) -> str:
    if modules.base is None:
        raise UncheckedError("an adapter is compared with its base model, and there is none")
    entry, bundle = modules.entry(task), modules.subject.folder
    promised = adapter.config.get("r") if entry is None else entry.rank
    fits = compare_adapter(adapter, modules.base.shapes, promised)
    if entry is None or bundle is None:
        return fits
    return fits + compare_ranks(bundle, entry, int(adapter.config["r"]))


def _record_steps(modules: Modules, task: str, first: tuple[str, ...]) -> list[Step]:
    """Checks of what the module's tuning record says."""
    folder, entry, manifest = modules.folder(task), modules.entry(task), modules.manifest
    system = Step(
        f"static.system.{task}",
        f"what the {task} module was tuned as, with what the hand-off needs",
        f"{TUNE_AGAIN} A fine-tuned model's prefill cannot be handed to another decode module.",
        partial(compare_system, folder, entry.system if entry else None),
        needs=first,
        reads=(folder / TUNING_RECORD,),
    )
    if entry is None or manifest is None:
        return [_pair_base_step(modules, task), system]
    return [*_bundle_record_steps(folder, entry, manifest, first), system]


def _pair_base_step(modules: Modules, task: str) -> Step:
    decode, folder = modules.decode.path, modules.folder(task)
    return Step(
        f"static.base.{task}",
        f"the base model in {TUNING_RECORD}, with the one in D's {QUANTIZATION_RECORD}",
        TUNE_AGAIN,
        lambda: compare_base(folder, base_of_decode(decode)),
    )


def _bundle_record_steps(
    folder: Path, entry: PrefillModule, manifest: Manifest, first: tuple[str, ...]
) -> list[Step]:
    task, record = entry.task, folder / TUNING_RECORD
    return [
        Step(
            f"static.record.{task}",
            f"the digests of the {task} module's weights, with those in its {TUNING_RECORD}",
            EXPORT_AGAIN,
            partial(require_record, folder, entry.path, entry, manifest.files),
            needs=(f"static.tensors.{task}",),
            reads=(record,),
        ),
        Step(
            f"static.base.{task}",
            f"the base model in the {task} module's {TUNING_RECORD}, with the manifest's",
            TUNE_AGAIN,
            lambda: compare_base(folder, known_base(manifest)),
            needs=first,
            reads=(record,),
        ),
        Step(
            f"static.boundary.{task}",
            "the boundary in the manifest, in its entry for the task and in the tuning record",
            "Tune the module at the boundary that the bundle serves, or export it for its own.",
            partial(compare_boundary, folder, entry, manifest),
            needs=first,
            reads=(record,),
        ),
    ]
