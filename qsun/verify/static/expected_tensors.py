"""Expected tensors: what a checkpoint must hold, worked out from its config.json.

The architectures that qsun quantizes are written out here, because asking transformers takes
seconds; any other is asked for its skeleton.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from re import match
from typing import Any

from qsun.errors import ModelError
from qsun.scheme import Scheme
from qsun.verify.static.headers import TensorHeader
from qsun.verify.static.model_folder import checked_layout

Shapes = dict[str, tuple[int, ...]]

LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
IGNORED_SUFFIX = "rotary_emb.inv_freq"  # written by old versions, worked out anew by all
CODES = {"awq": ".qweight", "compressed-tensors": ".weight_packed"}
WORD_BITS = 32
AWQ_CODES_PER_WORD = 8


@dataclass(frozen=True)
class ExpectedTensors:
    """A model's tensors in full precision; `linears` are layers, `optional` often not stored."""

    shapes: Shapes
    linears: frozenset[str]
    optional: frozenset[str]


def expected_tensors(config: Mapping[str, Any]) -> ExpectedTensors:
    """What the model that `config` describes is made of.

    Raises:
        ModelError: the config does not give its shape.
    """
    architecture = config["architectures"][0]
    if architecture in LLAMA_LIKE:
        return _llama_like(architecture, config)
    from qsun.skeleton import skeleton

    shape = skeleton(config)
    return ExpectedTensors(
        shape.tensors, frozenset(layer.name for layer in shape.linears), shape.tied
    )


def _llama_like(architecture: str, config: Mapping[str, Any]) -> ExpectedTensors:
    layout = checked_layout(config)
    hidden = _count(config, "hidden_size")
    layer = _layer(architecture, config)
    shapes: Shapes = {
        "model.embed_tokens.weight": (layout.vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (layout.vocabulary, hidden),
    }
    for index in range(layout.layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    linears = {
        name.removesuffix(".weight")
        for name in shapes
        if name.endswith(("_proj.weight", "head.weight"))
    }
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    return ExpectedTensors(shapes, frozenset(linears), frozenset(tied))


def _layer(architecture: str, config: Mapping[str, Any]) -> Shapes:
    """One decoder layer's tensors."""
    layout = checked_layout(config)
    hidden, inner = _count(config, "hidden_size"), _count(config, "intermediate_size")
    query = _count(config, "num_attention_heads") * layout.head_dim
    key = layout.kv_heads * layout.head_dim
    matrices = {
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    shapes: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if architecture == "Qwen3ForCausalLM":
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (layout.head_dim,)
    biased = _biased(architecture, config)
    for name, shape in matrices.items():
        full = f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
        shapes[f"{full}.weight"] = shape
        if name in biased:
            shapes[f"{full}.bias"] = shape[:1]
    return shapes


def _biased(architecture: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    if architecture == "Qwen2ForCausalLM":
        return ATTENTION[:3]
    if architecture == "MistralForCausalLM":
        return ()
    biased = ATTENTION if config.get("attention_bias") else ()
    return biased + (MLP if architecture == "LlamaForCausalLM" and config.get("mlp_bias") else ())


def _count(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {field}: {value!r} must be a whole number above 0")
    return value


def tensor_misfits(
    config: Mapping[str, Any], scheme: Scheme | None, found: Mapping[str, TensorHeader]
) -> list[str]:
    """Every tensor that is missing, of another shape or dtype, or not of this model."""
    expected = expected_tensors(config)
    shapes, problems = dict(expected.shapes), list[str]()
    if scheme is not None:
        suffix = CODES[scheme.format]
        packed = [name for name in sorted(expected.linears) if f"{name}{suffix}" in found]
        for name in packed:
            shapes |= packed_shapes(name, shapes.pop(f"{name}.weight"), scheme)
        problems = _wrongly_kept(config, expected, packed) + _no_integers(found)
        problems += _without_bits(scheme, packed)
    problems += [
        f"{name}: missing" for name in shapes if name not in found and name not in expected.optional
    ]
    problems += [
        f"{name}: shape {list(tensor.shape)}, the config says {list(shapes[name])}"
        for name, tensor in found.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    problems += [
        f"{name}: the config describes no such tensor"
        for name in found
        if name not in shapes and not name.endswith(IGNORED_SUFFIX)
    ]
    return problems


def packed_shapes(name: str, shape: tuple[int, ...], scheme: Scheme) -> Shapes:
    """A quantized layer's tensors, its weight being `[out, in]` before."""
    outputs, inputs = shape
    groups = inputs // scheme.group_size
    if scheme.format == "awq":
        words = outputs // AWQ_CODES_PER_WORD
        return {
            f"{name}.qweight": (inputs, words),
            f"{name}.qzeros": (groups, words),
            f"{name}.scales": (groups, outputs),
        }
    packed: Shapes = {
        f"{name}.weight_packed": (outputs, _words(inputs, scheme.stored_of(name))),
        f"{name}.weight_scale": (outputs, groups),
        f"{name}.weight_shape": (2,),
    }
    if not scheme.symmetric:
        packed[f"{name}.weight_zero_point"] = (_words(outputs, scheme.stored_of(name)), groups)
    return packed


def _words(codes: int, bits: int) -> int:
    """32-bit words that hold so many codes; 3-bit ones are split between two words."""
    return -(-codes * bits // WORD_BITS)


def _no_integers(found: Mapping[str, TensorHeader]) -> list[str]:
    suffixes = (*CODES.values(), ".qzeros", ".weight_zero_point")
    return [
        f"{name}: {tensor.dtype}, packed codes are I32"
        for name, tensor in found.items()
        if name.endswith(suffixes) and tensor.dtype != "I32"
    ]


def _wrongly_kept(
    config: Mapping[str, Any], expected: ExpectedTensors, packed: Sequence[str]
) -> list[str]:
    """Layers that the config counts as quantized and the files do not, or the other way round."""
    settings = config["quantization_config"]
    kept = settings.get("modules_to_not_convert") or settings.get("ignore") or []
    full = sorted(expected.linears - set(packed))
    wrong = [
        f"{name}: not quantized, the config says it is" for name in full if not _named(name, kept)
    ]
    return wrong + [
        f"{name}: quantized, the config says it is not" for name in packed if _named(name, kept)
    ]


def _without_bits(scheme: Scheme, packed: Sequence[str]) -> list[str]:
    return [
        f"{name}: quantized, the config does not say to how many bits"
        for name in packed
        if scheme.layer_bits and name not in scheme.layer_bits
    ]


def _named(layer: str, patterns: Iterable[str]) -> bool:
    return any(
        match(pattern.removeprefix("re:"), layer) is not None
        if pattern.startswith("re:")
        else layer == pattern or fnmatchcase(layer, f"*.{pattern}")
        for pattern in patterns
    )
