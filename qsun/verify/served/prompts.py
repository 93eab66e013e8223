"""Prompts of exact lengths: the end of a task's own conversations, cut or joined."""

from __future__ import annotations

from collections.abc import Sequence

from qsun.references import Reference


def prompts_of_lengths(
    references: Sequence[Reference], lengths: Sequence[int]
) -> list[tuple[int, ...]]:
    """One prompt for each length, in tokens; the same for the same references.

    The i-th ends as the i-th reference's prompt does, so that an answer is what follows. Where
    that is too short, the references before it come first, with their responses.
    """
    return [_ending_with(references, index, length) for index, length in enumerate(lengths)]


def _ending_with(references: Sequence[Reference], index: int, length: int) -> tuple[int, ...]:
    tokens = list(references[index % len(references)].prompt)
    while len(tokens) < length:
        index -= 1
        before = references[index % len(references)]
        tokens = [*before.prompt, *before.response, *tokens]
    return tuple(tokens[len(tokens) - length :])
