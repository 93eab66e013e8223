"""Leaks: which tests share a run of words with the training examples."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np

    Hashes: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
    Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

N = 13  # words in a run, as GPT-3's authors and most after them count
# A run in more of the training examples is the instruction that all have. A generator's template
# is in one of some 80, which is no boilerplate: a test of the same template must be found.
BOILERPLATE_SHARE = 0.05
BOILERPLATE_EXAMPLES = 20  # at least
CHUNK = 2048  # examples hashed at a time
SHOWN_TESTS = 5
SHOWN_CHARACTERS = 160
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no bit of a word's hash is lost
WORD = re.compile(r"\w+")


class Text(Protocol):
    """What can be looked through: a prompt's text and the response to it."""

    @property
    def text(self) -> str:
        """The prompt."""

    @property
    def response(self) -> str:
        """What is answered."""


class Runs(NamedTuple):
    """The hash of every run of words, its example's number, and its first word's place."""

    hashes: Hashes
    owners: Counts
    places: Counts


@dataclass(frozen=True)
class Overlap:
    """How many of the tests share a run of `n` words with training.

    `boilerplate` counts the tests' distinct runs that training has in example after example; they
    and what lies across their ends are left out. `examples` are beginnings of shared tests.
    """

    n: int
    tests: int
    shared: int
    boilerplate: int
    examples: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """What a record keeps."""
        return asdict(self) | {"examples": list(self.examples)}


def overlap(train: Sequence[Text], tests: Sequence[Text]) -> Overlap:
    """Compare runs of words within prompts and within responses, case and punctuation aside."""
    import numpy as np

    if not tests:
        return Overlap(N, 0, 0, 0, ())
    runs = Runs(*map(np.concatenate, zip(*_chunks(tests), strict=True)))
    distinct, kinds = np.unique(runs.hashes, return_inverse=True)
    counts = _examples_with(distinct, train)
    common = (counts > BOILERPLATE_SHARE * len(train)) & (counts >= BOILERPLATE_EXAMPLES)
    boilerplate = runs.places[common[kinds]]
    apart = np.searchsorted(boilerplate, runs.places - N, side="right") == np.searchsorted(
        boilerplate, runs.places + N, side="left"
    )
    shared = np.unique(runs.owners[apart & (counts[kinds] > 0)])
    shown = tuple(tests[index].text[:SHOWN_CHARACTERS] for index in shared[:SHOWN_TESTS])
    return Overlap(N, len(tests), len(shared), int(common.sum()), shown)


def _examples_with(distinct: Hashes, train: Sequence[Text]) -> Counts:
    """In how many training examples each of the sorted runs occurs."""
    import numpy as np

    counts = np.zeros(len(distinct), dtype=np.int64)
    for runs in _chunks(train):
        kinds = np.searchsorted(distinct, runs.hashes)
        known = np.flatnonzero(kinds < len(distinct))
        known = known[distinct[kinds[known]] == runs.hashes[known]]
        pairs = np.unique(kinds[known] * len(train) + runs.owners[known])
        counts += np.bincount(pairs // len(train), minlength=len(distinct))
    return counts


def _chunks(examples: Sequence[Text]) -> Iterator[Runs]:
    """All runs, a number of examples at a time."""
    import numpy as np

    passed = 0
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        texts = [_word_hashes(part) for entry in chunk for part in (entry.text, entry.response)]
        lengths = [len(text) for text in texts]
        words = np.fromiter(chain.from_iterable(texts), np.uint64, count=sum(lengths))
        hashes = np.zeros(max(0, len(words) - N + 1), dtype=np.uint64)
        for offset in range(N):
            hashes = hashes * np.uint64(MULTIPLIER) + words[offset : len(hashes) + offset]
        text_of = np.repeat(np.arange(len(texts)), lengths)
        first, last = text_of[: len(hashes)], text_of[N - 1 :][: len(hashes)]
        within = np.flatnonzero(first == last)  # not from one text into the next
        yield Runs(hashes[within], start + first[within] // 2, passed + within)
        passed += len(words)


def _word_hashes(text: str) -> list[int]:
    return [_word_hash(word) for word in WORD.findall(text.lower())]


@lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")
