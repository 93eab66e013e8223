"""The contract: what P's cache and D's must have in common, compared from configs alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsun.bundle import Manifest
from qsun.errors import IncompatibleError, ModelError
from qsun.kv_layout import KvLayout
from qsun.verify.static.model_folder import ModelFolder, scheme_text
from qsun.verify.steps import enumerated

# Beside the KV layout: which attention reads the cache. A missing `attention_bias` means none.
VARIANT_FIELDS = ("model_type", "architectures", "attention_bias")
# Written out by some versions of transformers, implied by others: compared where both give it.
SPELLED_OUT_FIELDS = ("layer_types", "no_rope_layers", "attention_chunk_size")
FLOAT_CACHES = ("float32", "float16", "bfloat16")
FP8_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla")
ROPE = "rope_parameters"


def manifest_layout(manifest: Manifest) -> KvLayout:
    """The KV layout that a manifest promises, its fields being those of one."""
    fields = dict(manifest.kv_layout)
    rope = fields[ROPE]
    fields[ROPE] = _tuples(sorted(rope.items()) if isinstance(rope, Mapping) else rope)
    return KvLayout(**fields)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def compare_layout(folder: ModelFolder, contract: KvLayout) -> str:
    """What the module's KV layout has in common with the contract.

    Raises:
        IncompatibleError: names each field that differs, with both values.
    """
    differences = [
        f"{name}: {found} here, {expected} expected"
        for name, expected in vars(contract).items()
        if (found := getattr(folder.layout, name)) != expected
    ]
    if differences:
        raise IncompatibleError(enumerated(differences, at_most=10))
    layout = folder.layout
    return (
        f"{layout.layers} layers, {layout.kv_heads} KV heads of {layout.head_dim}, {layout.dtype}, "
        f"rope theta {layout.rope_theta:g} ({layout.rope_type}), {layout.max_tokens} positions, "
        f"vocabulary {layout.vocabulary}: the same"
    )


def compare_variant(config: Mapping[str, Any], decode: Mapping[str, Any]) -> None:
    """Whether two configs mean the same kind of attention.

    Raises:
        IncompatibleError: names each field that differs, with both values.
    """
    differences = [
        f"{field}: {config.get(field)} here, {decode.get(field)} in the decode module"
        for field in VARIANT_FIELDS
        if (config.get(field) or False) != (decode.get(field) or False)
    ]
    differences += [
        f"{field}: {config[field]} here, {decode[field]} in the decode module"
        for field in SPELLED_OUT_FIELDS
        if config.get(field) is not None
        and decode.get(field) is not None
        and config[field] != decode[field]
    ]
    if differences:
        raise IncompatibleError(enumerated(differences))


def compare_scheme(config: Mapping[str, Any], manifest: Manifest) -> str:
    """The decode module's quantization, as its config and the manifest have it.

    Raises:
        IncompatibleError: they differ.
    """
    found = scheme_text(config)
    if found != manifest.decode_scheme:
        raise IncompatibleError(
            f"the decode module's config.json says {found}, the manifest {manifest.decode_scheme}"
        )
    return found


def cache_dtype(kv_cache_dtype: str, folder: ModelFolder) -> str:
    """The dtype of the cache that vLLM makes for a module under `--kv-cache-dtype`."""
    if kv_cache_dtype != "auto":
        return kv_cache_dtype
    quantization = folder.config.get("quantization_config") or {}
    # vLLM takes a checkpoint's own cache scheme where no other is asked for.
    return "fp8" if quantization.get("kv_cache_scheme") else folder.layout.dtype


def compare_cache_dtypes(folders: Mapping[str, ModelFolder], manifest: Manifest) -> str:
    """The one dtype that all caches have.

    Raises:
        IncompatibleError: the manifest's is none that fits, or a module brings another.
    """
    asked, promised = manifest.kv_cache_dtype, manifest_layout(manifest).dtype
    if asked not in ("auto", *FLOAT_CACHES, *FP8_CACHES):
        raise IncompatibleError(f"the manifest's kv_cache_dtype {asked!r} is none of vLLM's")
    if asked in FLOAT_CACHES and asked != promised:
        raise IncompatibleError(
            f"the manifest's kv_cache_dtype is {asked}, the modules' dtype {promised}: cached "
            "values would be rounded otherwise than in tuning"
        )
    expected = promised if asked == "auto" else asked
    wrong = [
        f"{name}: {found} here, {expected} expected"
        for name, folder in folders.items()
        if (found := cache_dtype(asked, folder)) != expected
    ]
    wrong += [
        f"{name}: its config.json has a kv_cache_scheme, kv_cache_dtype is {asked}"
        for name, folder in folders.items()
        if asked != "auto"
        and (folder.config.get("quantization_config") or {}).get("kv_cache_scheme")
    ]
    if wrong:
        raise IncompatibleError(f"kv_cache_dtype: {enumerated(wrong)}")
    return f"every cache holds {expected}"


def compare_lengths(folders: Mapping[str, ModelFolder], max_tokens: int) -> str:
    """Whether every module can read as many tokens as the manifest promises.

    Raises:
        IncompatibleError: names the modules that cannot.
    """
    short = [
        f"{name}: max_position_embeddings {folder.layout.max_tokens}"
        for name, folder in folders.items()
        if folder.layout.max_tokens < max_tokens
    ]
    if short:
        raise IncompatibleError(f"max_tokens is {max_tokens} in the manifest; {enumerated(short)}")
    return f"max_tokens {max_tokens} is within every module's max_position_embeddings"


def require_model(folder: ModelFolder) -> str:
    """What a module's config says it is.

    Raises:
        ModelError: it is no model's config, or asks for remote code.
    """
    return f"{folder.config['architectures'][0]}, {folder.config.get('model_type')}"


def require_full_precision(folder: ModelFolder) -> str:
    """The same, of a prefill module or the base model.

    Raises:
        ModelError: it is quantized, or no model.
    """
    if folder.config.get("quantization_config") is not None:
        raise ModelError("it is quantized: prefill modules and the base model are never")
    return require_model(folder)
