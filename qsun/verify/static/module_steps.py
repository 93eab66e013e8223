"""The checks of the decode module and of the base model."""

from __future__ import annotations

from functools import partial

from qsun.errors import ModelError
from qsun.verify.static.contract import (
    compare_layout,
    compare_scheme,
    compare_variant,
    require_full_precision,
    require_model,
)
from qsun.verify.static.expected_tensors import tensor_misfits
from qsun.verify.static.model_folder import CONFIG, ModelFolder
from qsun.verify.static.modules import EXPORT_AGAIN, Modules, remedy
from qsun.verify.static.tokenizer_files import (
    SETTINGS,
    TEMPLATE,
    TOKENIZER,
    TokenizerFolder,
    compare_templates,
    compare_tokenizers,
    require_tokenizer,
)
from qsun.verify.static.tuning_records import compare_base_copy
from qsun.verify.steps import Step, enumerated

DECODE, BASE, REFERENCE = "static.decode", "static.base_model", "static.reference_tokenizer"
TOKENIZER_FILES = (TOKENIZER, SETTINGS)
TEMPLATE_FILES = (TEMPLATE, SETTINGS)
FETCH_MODEL = "Fetch the module again."


def decode_steps(modules: Modules, first: tuple[str, ...]) -> list[Step]:
    """Checks of the decode module; `first` are the checks that all of them need."""
    decode, config = modules.decode, modules.decode.path / CONFIG
    steps = [
        Step(
            f"{DECODE}.config",
            "the decode module's config.json",
            remedy(modules, FETCH_MODEL),
            partial(require_model, decode),
            needs=first,
            reads=(config,),
        ),
        tensor_step(f"{DECODE}.tensors", "decode module", modules, decode, f"{DECODE}.config"),
    ]
    manifest = modules.manifest
    if manifest is not None:
        steps += [
            Step(
                f"{DECODE}.scheme",
                "the decode module's quantization_config, with the manifest's decode_scheme",
                EXPORT_AGAIN,
                lambda: compare_scheme(decode.config, manifest),
                needs=(f"{DECODE}.config",),
                reads=(config,),
            ),
            Step(
                f"{DECODE}.kv_layout",
                "the decode module's KV layout, with the manifest's",
                EXPORT_AGAIN,
                lambda: compare_layout(decode, modules.contract),
                needs=(f"{DECODE}.config",),
                reads=(config,),
            ),
        ]
    return (
        steps
        + _tokenizer_steps(modules, first)
        + text_steps(
            modules,
            decode,
            "decode module",
            (f"{DECODE}.tokenizer", f"{DECODE}.chat_template"),
        )
    )


def base_steps(modules: Modules, first: tuple[str, ...]) -> list[Step]:
    """Checks of the full-precision base model, where the subject has one."""
    base = modules.base
    if base is None:
        return []
    config = base.path / CONFIG
    steps = [
        Step(
            f"{BASE}.config",
            "the base model's config.json",
            remedy(modules, "Fetch the base model again."),
            partial(require_full_precision, base),
            needs=first,
            reads=(config,),
        ),
        tensor_step(f"{BASE}.tensors", "base model", modules, base, f"{BASE}.config"),
        Step(
            f"{BASE}.kv_layout",
            "the base model's KV layout and attention, with those it must have",
            remedy(modules, "Use the base model that the decode module was made of."),
            lambda: same_contract(modules, base),
            needs=(f"{BASE}.config", f"{DECODE}.config"),
            reads=(config, modules.decode.path / CONFIG),
        ),
    ]
    manifest = modules.manifest
    if manifest is not None:
        steps.append(
            Step(
                f"{BASE}.identity",
                "the base checkpoint's digests in the manifest, with those of its origin",
                EXPORT_AGAIN,
                lambda: compare_base_copy(manifest),
                needs=first,
            )
        )
    return steps + text_steps(
        modules, base, "base model", (f"{BASE}.tokenizer", f"{BASE}.chat_template")
    )


def same_contract(modules: Modules, folder: ModelFolder) -> str:
    """What a checkpoint's layout and attention have in common with the contract.

    Raises:
        IncompatibleError: names what differs, with both values.
    """
    message = compare_layout(folder, modules.contract)
    compare_variant(folder.config, modules.decode.config)
    return message


def tensor_step(
    name: str, what: str, modules: Modules, folder: ModelFolder, config_check: str
) -> Step:
    """The check of a checkpoint's tensors against its own config."""
    return Step(
        name,
        f"the {what}'s tensors, with its config.json",
        remedy(modules, FETCH_MODEL),
        partial(_fitting_tensors, folder),
        needs=(config_check,),
        reads=(folder.path,),
    )


def _fitting_tensors(folder: ModelFolder) -> str:
    misfits = tensor_misfits(folder.config, folder.scheme, folder.headers)
    if misfits:
        raise ModelError(f"{enumerated(misfits)} ({_shape(folder)})")
    return f"{len(folder.headers)} tensors of the shapes that the config gives"


def _shape(folder: ModelFolder) -> str:
    fields = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    others = ("head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings")
    given = {field: folder.config.get(field) for field in (*fields, *others)}
    return "config.json: " + ", ".join(f"{field} {value}" for field, value in given.items())


def _tokenizer_steps(modules: Modules, first: tuple[str, ...]) -> list[Step]:
    tokenizer = modules.tokenizer
    if tokenizer is None:
        return []

    def within_vocabulary() -> str:
        highest, vocabulary = tokenizer.highest_id, modules.contract.vocabulary
        if highest >= vocabulary:
            raise ModelError(f"the tokenizer gives id {highest}, vocab_size is {vocabulary}")
        return f"ids up to {highest}, vocab_size {vocabulary}"

    return [
        Step(
            REFERENCE,
            f"the files in {tokenizer.path.name} that make the prompts",
            remedy(modules, "Use the base model's own tokenizer."),
            partial(require_tokenizer, tokenizer),
            needs=first,
            reads=tuple(tokenizer.path / file for file in (*TOKENIZER_FILES, TEMPLATE)),
        ),
        Step(
            "static.vocabulary",
            "the ids that the tokenizer gives, with vocab_size",
            remedy(modules, "Use the base model's own tokenizer."),
            within_vocabulary,
            needs=(REFERENCE, f"{DECODE}.config"),
            reads=(tokenizer.path / TOKENIZER, modules.decode.path / CONFIG),
        ),
    ]


def text_steps(
    modules: Modules, folder: ModelFolder, what: str, names: tuple[str, str]
) -> list[Step]:
    """The checks of a module's tokenizer and chat template; none where it is the reference."""
    reference, own = modules.tokenizer, TokenizerFolder(folder.path)
    if reference is None or reference.path == own.path:
        return []
    ours = "the bundle's" if modules.manifest is not None else f"that of {reference.path.name}"
    return [
        Step(
            names[0],
            f"the {what}'s tokenizer, with {ours}",
            remedy(modules, "Use modules of one tokenizer."),
            partial(compare_tokenizers, own, reference),
            needs=(REFERENCE,),
            reads=tuple(one.path / file for one in (own, reference) for file in TOKENIZER_FILES),
        ),
        Step(
            names[1],
            f"the {what}'s chat template, with {ours}",
            remedy(modules, "Use the chat template that the module was tuned with."),
            partial(compare_templates, own, reference),
            needs=(REFERENCE,),
            reads=tuple(one.path / file for one in (own, reference) for file in TEMPLATE_FILES),
        ),
    ]
