"""Coverage: what of the calibration samples a decode module computes, by their source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qsun.calibrate.pieces import Piece
from qsun.calibrate.samples import Sample


@dataclass(frozen=True)
class SourceCoverage:
    """What one source's samples give.

    Of `samples`, `left_out` have no response that is left within `max_tokens`. `prompt_tokens` are
    those of the others' prompts; `decode_positions` those whose inputs count, at which
    `decode_tokens` different tokens of the vocabulary are read. `plain_positions` are read beside
    them in whole texts. `longest_context` is in tokens; `share` is what all of the source's
    positions count for, of all sources'.
    """

    name: str
    samples: int
    left_out: int
    prompt_tokens: int
    decode_positions: int
    decode_tokens: int
    plain_positions: int
    longest_context: int
    share: float


def coverage(samples: Sequence[Sample], pieces: Sequence[Piece]) -> list[SourceCoverage]:
    """The coverage by each source of `samples`, which were cut into `pieces`.

    Where none is served, whole texts are all that there is, and their positions count as decoded.
    """
    decoded = [piece for piece in pieces if piece.prompts is not None] or list(pieces)
    plain = [piece for piece in pieces if not any(piece is one for one in decoded)]
    whole = _weight(pieces)
    found = []
    for name in dict.fromkeys(one.source for one in samples):
        own = [one for one in samples if one.source == name]
        beside = [piece for piece in plain if piece.source == name]
        main = [piece for piece in decoded if piece.source == name]
        share = _weight([*main, *beside]) / whole
        found.append(_of_source(name, own, main, beside, share))
    return found


def _weight(pieces: Sequence[Piece]) -> float:
    return sum(piece.weight * piece.counted_positions for piece in pieces)


def _of_source(
    name: str, samples: list[Sample], pieces: list[Piece], plain: list[Piece], share: float
) -> SourceCoverage:
    read = {token for piece in pieces for token in piece.read[piece.counted].tolist()}
    contexts = [
        int(length) for piece in pieces for length in piece.written + piece.counted.sum(dim=1)
    ]
    written = sum(int(piece.written.sum()) for piece in pieces)
    # The prompt's last token is read by the decode module.
    own = sum(len(piece.written) for piece in pieces if piece.prompts is not None)
    return SourceCoverage(
        name=name,
        samples=len(samples),
        left_out=len(samples) - len(contexts),
        prompt_tokens=written + own,
        decode_positions=sum(piece.counted_positions for piece in pieces),
        decode_tokens=len(read),
        plain_positions=sum(piece.counted_positions for piece in plain),
        longest_context=max(contexts, default=0),
        share=share,
    )
