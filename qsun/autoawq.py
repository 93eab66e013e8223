"""AutoAWQ's GEMM layout: 4-bit codes packed along the output axis in an interleaved order.

Per layer `qweight` int32 `[in, out / 8]`, `qzeros` int32 `[in / group, out / 8]` and `scales`
float16 `[in / group, out]`; codes and zeros are unsigned. Source: AutoAWQ 0.2.9,
`awq/modules/linear/gemm.py` and `awq/utils/packing_utils.py`.
"""

from __future__ import annotations

import torch

from qsun.scheme import AWQ_BITS

CODES_PER_WORD = 8
# Nibble i of a word, counted from the lowest, holds the output channel of this offset.
CHANNEL_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack unsigned codes `[rows, out]` into int32 words `[rows, out / 8]`."""
    if codes.shape[1] % CODES_PER_WORD:
        raise ValueError(f"{codes.shape[1]} output channels do not fill whole 32-bit words")
    nibbles = codes.to(torch.int64).reshape(codes.shape[0], -1, CODES_PER_WORD)
    nibbles = nibbles[:, :, list(CHANNEL_OF_NIBBLE)]
    shifts = torch.arange(CODES_PER_WORD, dtype=torch.int64) * AWQ_BITS
    words = (nibbles << shifts).sum(dim=-1)
    # Two's complement: a word with its highest bit set is a negative int32.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Unpack int32 words `[rows, out / 8]` into unsigned codes `[rows, out]` (int8)."""
    shifts = torch.arange(CODES_PER_WORD, dtype=torch.int32) * AWQ_BITS
    nibbles = (words.unsqueeze(-1) >> shifts) & 0xF
    channels = torch.empty_like(nibbles)
    channels[:, :, list(CHANNEL_OF_NIBBLE)] = nibbles
    return channels.reshape(words.shape[0], -1).to(torch.int8)
