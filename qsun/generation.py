"""Generation through the hand-off: one module's cache, the other's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from qsun.handoff import Boundary, KvCache, collate, write_prompts
from qsun.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0, else drawn with `seed`.

    A response ends with the model's end-of-turn token, after a `stop` string, or after
    `max_new_tokens`. With `ends` false no end-of-turn token is chosen.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    ends: bool = True


def generate(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    boundary: Boundary = Boundary.BEFORE_LAST,
    batch_size: int = 64,
) -> list[list[int]]:
    """The response tokens of each prompt, its end-of-turn token included where it came.

    Prompts of similar length share a batch. A seed gives the same draws for the same prompts,
    order and batch size.

    Raises:
        ValueError: a prompt under 2 tokens, which leaves nothing to hand off.
    """
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    starts = range(0, len(prompts), batch_size)
    responses: list[list[int]] = [[] for _ in prompts]
    devices = [decode.device] if decode.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(sampling.seed)
        for start in track(starts, "generating", len(starts)):
            chosen = by_length[start : start + batch_size]
            tokens = generate_batch(
                prefill, decode, tokenizer, [prompts[index] for index in chosen], sampling, boundary
            )
            for index, response in zip(chosen, tokens, strict=True):
                responses[index] = response
    return responses


def generate_batch(
    prefill: PreTrainedModel,
    decode: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    boundary: Boundary,
    prefix: KvCache | None = None,
) -> list[list[int]]:
    """The responses of one batch, drawn by torch's own random state.

    `prefix` is what the prefill module made of tokens that all prompts begin with.
    """
    batch = collate(prompts, [[0]] * len(prompts)).to(decode.device)
    rows = torch.arange(len(prompts), device=decode.device)
    written = batch.prompts[:, :-1]
    cache = DynamicCache()
    handed, _ = write_prompts(prefill, written, decode.dtype, prefix)
    for layer, (keys, values) in enumerate(handed):
        cache.update(keys, values, layer)
    columns = torch.arange(written.shape[1] + 1, device=decode.device)
    mask = columns < (batch.prompt_lengths - 1)[:, None]
    mask[:, -1] = True  # each row's last prompt token stands after the padding
    last_token = batch.prompts[rows, batch.prompt_lengths - 1]
    tokens = torch.cat([written, last_token[:, None]], dim=1)
    options = _options(decode, tokenizer, sampling)
    stops = _StopStrings(tokenizer, sampling.stop, tokens.shape[1])
    if sampling.stop:
        options["stopping_criteria"] = StoppingCriteriaList([stops])
    left = sampling.max_new_tokens
    if boundary is Boundary.LAST:
        with_first = _run(prefill, tokens, mask, cache, options, 1)
        tokens, left = with_first, left - 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    if left:
        tokens = _run(decode, tokens, mask, cache, options, left)
    made = tokens[:, written.shape[1] + 1 :].tolist()
    return [stops.cut(_ended(row, decode, tokenizer)) for row in made]


def _run(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    cache: DynamicCache,
    options: dict[str, Any],
    new_tokens: int,
) -> torch.Tensor:
    """`tokens` with what the model, reading the cache and the tokens after it, says next."""
    made: torch.Tensor = model.generate(
        input_ids=tokens,
        attention_mask=mask.long(),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        **options,
    )
    return made


def _options(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> dict[str, Any]:
    draws = sampling.temperature > 0
    return {
        "do_sample": draws,
        "temperature": sampling.temperature if draws else None,
        "top_p": sampling.top_p if draws else None,
        "top_k": 0 if draws else None,
        # Not what a checkpoint's generation config may ask for.
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": _ends(model, tokenizer),
        "suppress_tokens": None if sampling.ends else _ends(model, tokenizer),
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    }


class _StopStrings(StoppingCriteria):
    """Ends a response whose own text, from `start` on, holds a stop string.

    transformers' `stop_strings` would read the prompt too, and leave padding after what it ended.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], start: int
    ) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start
        # A token has at least one byte; 4 more for characters that are cut in two.
        self._window = max((len(string.encode()) for string in stop), default=0) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        first = max(self._start, input_ids.shape[1] - self._window)
        texts = self._tokenizer.batch_decode(input_ids[:, first:])
        return torch.tensor([self._stops(text) for text in texts], device=input_ids.device)

    def cut(self, tokens: list[int]) -> list[int]:
        """The tokens up to the one that completes a stop string."""
        if not self._stops(self._tokenizer.decode(tokens)):
            return tokens
        low, high = 1, len(tokens)
        while low < high:
            middle = (low + high) // 2
            if self._stops(self._tokenizer.decode(tokens[:middle])):
                high = middle
            else:
                low = middle + 1
        return tokens[:low]

    def _stops(self, text: str) -> bool:
        return any(string in text for string in self._stop)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's, and those of the generation config."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ends = declared if isinstance(declared, list) else [declared]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def _ended(
    tokens: list[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """A response without what the batch's longer rows padded it with."""
    ends = set(_ends(model, tokenizer))
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens
