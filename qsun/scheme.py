"""The scheme of a quantized module: each layer's bits, and how many of them its codes take.

A code of few bits fits into a container of more, with the same value: so a module whose bits a
server has no kernel for is served all the same. `config.json` then says both: what is packed under
`quantization_config`, where servers look, and what the codes are under `code_bits`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qsun.errors import ModelError

BITS = (2, 3, 4, 8)  # of codes, and of what they are packed in
AWQ_BITS = 4  # all that AutoAWQ's GEMM layout packs
GEMM = ("gemm", AWQ_BITS, True)  # version, bits, zero_point
CODE_BITS = "code_bits"  # of config.json: one number, or each layer's


@dataclass(frozen=True)
class Scheme:
    """How every quantized layer of a module is quantized.

    `layer_bits` are the layers' own bits where they differ, `bits` then the most of them. Codes are
    packed in `stored_bits`; None where each is packed in as many as it has.
    """

    format: str
    bits: int
    group_size: int
    symmetric: bool
    stored_bits: int | None = None
    layer_bits: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        stored = "" if self.stored_bits is None else f"stored in {self.stored_bits} bits, "
        return f"{self._bits_text()} {kind}, group {self.group_size}, {stored}{self.format}"

    def _bits_text(self) -> str:
        counts = dict(sorted(Counter(self.layer_bits.values()).items()))
        if not counts:
            return f"W{self.bits}A16"
        layers = ", ".join(map(str, counts.values()))
        return f"W{'+'.join(map(str, counts))}A16 ({layers} layers)"

    def bits_of(self, layer: str) -> int:
        """Bits of a layer's codes."""
        return self.layer_bits.get(layer, self.bits)

    def stored_of(self, layer: str) -> int:
        """Bits that each of a layer's codes takes on disk, and in a server's memory."""
        return self.stored_bits or self.bits_of(layer)

    @property
    def stored_sizes(self) -> tuple[int, ...]:
        """Every number of bits that codes are packed in: what a server needs kernels for."""
        if self.stored_bits is not None:
            return (self.stored_bits,)
        return tuple(sorted({*self.layer_bits.values()} or {self.bits}))

    def as_awq(self) -> Scheme:
        """The same codes in AutoAWQ's layout, which packs 4 bits."""
        stored = None if self.bits == AWQ_BITS and not self.layer_bits else AWQ_BITS
        return replace(self, format="awq", stored_bits=stored)

    def arguments(self, bits: int) -> dict[str, Any]:
        """The scheme, of so many bits, as compressed-tensors' quantization arguments."""
        return {
            "num_bits": bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group",
            "group_size": self.group_size,
        }

    def code_bits(self) -> dict[str, Any]:
        """What a `config.json` says of the codes beside how they are packed; mostly nothing."""
        if self.stored_bits is None:
            return {}
        return {CODE_BITS: dict(self.layer_bits) or self.bits}


def candidate_bits(format_: str, stored_bits: int | None) -> tuple[int, ...]:
    """The bits that layers may have each by itself, the fewest first."""
    most = stored_bits or (AWQ_BITS if format_ == "awq" else max(BITS))
    return tuple(bits for bits in BITS if bits <= most)


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """The quantization that a `config.json` declares; None when it declares none.

    Raises:
        ModelError: a quantization that is not one of qsun's two formats.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method")
    if method == "awq":
        if (settings.get("version"), settings.get("bits"), settings.get("zero_point")) != GEMM:
            raise ModelError("an awq checkpoint that is not 4-bit GEMM with zero points")
        found = Scheme("awq", AWQ_BITS, settings["group_size"], symmetric=False)
    elif method == "compressed-tensors" and settings.get("format") == "pack-quantized":
        found = _packed(settings)
    else:
        raise ModelError(f"unknown quantization {method!r}, format {settings.get('format')!r}")
    return _with_own_bits(found, config.get(CODE_BITS))


def _packed(settings: Mapping[str, Any]) -> Scheme:
    groups = list(settings.get("config_groups", {}).values())
    kinds = {(one["weights"]["group_size"], one["weights"]["symmetric"]) for one in groups}
    if len(kinds) != 1:
        raise ModelError(
            f"{len(groups)} quantization groups of {len(kinds)} kinds: "
            "qsun reads those that differ in their bits alone"
        )
    [(group_size, symmetric)] = kinds
    bits = [one["weights"]["num_bits"] for one in groups]
    if len(groups) == 1:
        return Scheme("compressed-tensors", bits[0], group_size, symmetric)
    layers: dict[str, int] = {}
    for own, one in zip(bits, groups, strict=True):
        twice = layers.keys() & set(one["targets"])
        if twice or any(target.startswith("re:") or "." not in target for target in one["targets"]):
            raise ModelError(
                "several quantization groups that do not name each of their layers, once"
            )
        layers |= dict.fromkeys(one["targets"], own)
    return Scheme("compressed-tensors", max(bits), group_size, symmetric, layer_bits=layers)


def _with_own_bits(packed: Scheme, own: Any) -> Scheme:
    """The scheme of codes that have fewer bits than what they are packed in."""
    if own is None:
        return packed
    layers = own if isinstance(own, Mapping) else {}
    found = list(layers.values()) if layers else [own]
    wrong = [bits for bits in found if type(bits) is not int or not 1 < bits <= packed.bits]
    if wrong or packed.layer_bits:
        raise ModelError(
            f"config.json: {CODE_BITS}: {own!r} are no bits that codes packed in "
            f"{', '.join(map(str, packed.stored_sizes))} can have"
        )
    return Scheme(
        packed.format,
        max(found),
        packed.group_size,
        packed.symmetric,
        stored_bits=packed.bits,
        layer_bits=dict(layers),
    )
