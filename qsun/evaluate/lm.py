"""lm-eval's model class for two modules: P reads every context, D scores and answers.

`TwoModules` is lm-eval's own `hf` class (`lm_eval.models.huggingface.HFLM`) with the passes through
the model replaced, so that tokenization, truncation, chat templates and stop strings are the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from loguru import logger

from qsun.errors import DataError
from qsun.evaluate.load import load_bundle_pair
from qsun.evaluate.pair import Pair, PrefixCache, prefill_is_idle
from qsun.generation import Sampling, generate_batch
from qsun.handoff import collate, response_logits, single_logits
from qsun.progress import track

ROLLING_TOKENS = 256
LOGITS_AT_ONCE = 2**28  # numbers, a GiB in float32
SAMPLING_OPTIONS = {"do_sample", "temperature", "top_p"}

Request = tuple[Any, list[int], list[int]]


@dataclass(frozen=True)
class Generated:
    """How long a response was, in tokens, and whether it ended by itself."""

    tokens: int
    ended: bool


class TwoModules(HFLM):
    """A pair as lm-eval's model.

    Log-likelihoods are of continuations through the hand-off at the pair's boundary, nats.
    `rolling_tokens` is the length of the pieces of a text in a rolling log-likelihood: each is
    scored by D behind P's cache of all before it; the first has nothing before it and is D's alone.
    """

    def __init__(
        self,
        pair: Pair,
        batch_size: int = 16,
        seed: int = 0,
        rolling_tokens: int = ROLLING_TOKENS,
    ) -> None:
        super().__init__(
            pretrained=pair.decode,
            tokenizer=pair.tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=pair.max_tokens,
        )
        self.pair, self._seed, self._rolling_tokens = pair, seed, rolling_tokens
        self.prefixes = PrefixCache(pair.prefill)
        self.generated: dict[tuple[int, ...], Generated] = {}
        self.seconds = 0.0
        self._batches = 0

    def length_of(self, context: str) -> Generated | None:
        """How long the response to a context was; None where there was none."""
        return self.generated.get(tuple(self.tok_encode(context)))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval notes of the model."""
        return {
            "model_num_parameters": self.pair.decode.num_parameters(),
            "model_dtype": str(self.pair.decode.dtype),
            "boundary": self.pair.boundary.value,
        }

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, nats."""
        pieces: list[Request] = []
        owners = []
        for owner, request in enumerate(requests):
            found = list(self._pieces(self.tok_encode(request.args[0])))
            pieces += found
            owners += [owner] * len(found)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(pieces, disable_tqdm)
        for owner, (value, _) in zip(owners, scored, strict=True):
            totals[owner] += value
        return totals

    def _pieces(self, tokens: list[int]) -> Iterator[Request]:
        """A text cut into context and continuation, each token continued to once."""
        windows = get_rolling_token_windows(
            token_list=tokens,
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        for context, continuation in map(make_disjoint_window, windows):
            every = [*context, *continuation]
            cuts = [*range(len(context), len(every), self._rolling_tokens), len(every)]
            for start, end in pairwise(cuts):
                yield None, every[:start], every[start:end]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        bare = [text for text, context, _ in requests if text is not None and len(context) < 2]
        if bare:
            raise DataError(
                f"{len(bare)} contexts have under 2 tokens, which leaves the prefill module nothing"
                f" to hand off, such as {bare[0][0]!r}: this task cannot be scored by two modules"
            )
        found: dict[int, tuple[float, bool]] = {}
        batches = list(self._scoring_batches(requests, override_bs or int(self.batch_size)))
        for batch in track(batches, "scoring", len(batches)):
            found |= zip(batch, self._score([requests[index] for index in batch]), strict=True)
        return [found[index] for index in range(len(requests))]

    def _scoring_batches(self, requests: Sequence[Request], rows: int) -> Iterator[list[int]]:
        """Requests of similar length together, those with and without a hand-off apart."""
        vocabulary = int(self.pair.decode.config.vocab_size)
        batch: list[int] = []
        tokens, alone = 0, False
        order = sorted(
            range(len(requests)),
            key=lambda at: (len(requests[at][1]) < 2, requests[at][1], len(requests[at][2])),
        )
        for index in order:
            _, context, continuation = requests[index]
            logits = (tokens + len(continuation)) * vocabulary
            if batch and (
                len(batch) == rows or logits > LOGITS_AT_ONCE or alone != (len(context) < 2)
            ):
                yield batch
                batch, tokens = [], 0
            batch.append(index)
            tokens, alone = tokens + len(continuation), len(context) < 2
        if batch:
            yield batch

    def _score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding gives it."""
        # As lm-eval's own class: what is too long loses its beginning.
        room = self.max_length + 1
        contexts = [one[1][-max(2, room - len(one[2])) :] for one in requests]
        continuations = [one[2] for one in requests]
        pair = self.pair
        with torch.no_grad():
            if len(contexts[0]) < 2:
                # One token is no prompt: a second one, never read, makes it a batch.
                rows = collate([[one[0], one[0]] for one in contexts], continuations).to(
                    pair.decode.device
                )
                rows.prompt_lengths.fill_(1)
                batch, logits = rows, single_logits(pair.decode, rows)
            else:
                batch = collate(contexts, continuations).to(pair.decode.device)
                prefix = self.prefixes.of(contexts)
                logits = response_logits(pair.prefill, pair.decode, batch, pair.boundary, prefix)
            scores = logits.float().log_softmax(-1)
            chosen = scores.gather(-1, batch.targets[:, None])[:, 0]
            greedy = logits.argmax(-1) == batch.targets
        lengths = batch.response_lengths.tolist()
        return [
            (float(values.sum()), bool(right.all()))
            for values, right in zip(
                torch.split(chosen, lengths), torch.split(greedy, lengths), strict=True
            )
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Every answer; what is drawn follows from the seed and these requests alone.

        Raises:
            DataError: prompts that leave no room for an answer.
        """
        self._require_room(requests)
        self._batches = 0
        texts: list[str] = super().generate_until(requests, disable_tqdm)
        return texts

    def _require_room(self, requests: list[Instance]) -> None:
        """Refuse prompts that lm-eval would cut at their beginning."""
        long = [
            context
            for context, options in (one.args for one in requests)
            if len(self.tok_encode(context)) + int(options.get("max_gen_toks", self.max_gen_toks))
            > self.max_length
        ]
        if long:
            raise DataError(
                f"{len(long)} of {len(requests)} prompts leave no room for an answer within "
                f"{self.max_length} tokens, such as {long[0][:60]!r}: ask for shorter answers "
                "(max_new_tokens), or leave these prompts out"
            )

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        mask = options.pop("attention_mask").bool()
        unknown = sorted(options.keys() - SAMPLING_OPTIONS)
        if unknown:
            raise DataError(f"generation through two modules knows no {', '.join(unknown)}")
        prompts = [row[kept].tolist() for row, kept in zip(context, mask, strict=True)]
        if min(map(len, prompts)) < 2:
            raise DataError("a prompt has under 2 tokens: there is nothing to hand off")
        end = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        sampling = Sampling(
            max_new_tokens=max_length - context.shape[1],
            temperature=options.get("temperature") or 0.0 if options.get("do_sample") else 0.0,
            top_p=options.get("top_p", 1.0),
            stop=tuple(one for one in stop if one != end),
        )
        made = self._responses(prompts, sampling)
        rows = [torch.tensor(row, dtype=context.dtype, device=context.device) for row in made]
        padding = float(self.tokenizer.pad_token_id or 0)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        return torch.cat([context, padded], dim=1)

    def _responses(self, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        """The batch's responses; each batch draws by a seed of its own."""
        pair, started = self.pair, time.monotonic()
        devices = [pair.decode.device] if pair.decode.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(self._seed + self._batches)
            made = generate_batch(
                *(pair.prefill, pair.decode, pair.tokenizer, prompts, sampling, pair.boundary),
                prefix=self.prefixes.of(prompts),
            )
        self._batches += 1
        self.seconds += time.monotonic() - started
        for prompt, response in zip(prompts, made, strict=True):
            last = self.tokenizer.eos_token_id
            ended = len(response) < sampling.max_new_tokens or response[-1] == last
            self.generated[tuple(prompt)] = Generated(len(response), ended)
        return made


class BundleModules(TwoModules):
    """lm-eval's model `qsun`: `--model_args bundle=FOLDER,task=NAME`.

    `allow` names failed or missing checks of the verdict, separated by `+`.

    Raises:
        IncompatibleError: no bundle, or one without a verdict that passes.
        ConfigError: the bundle has no such task.
    """

    def __init__(
        self,
        bundle: str,
        task: str,
        allow: str = "",
        dtype: str | None = None,
        batch_size: int | str = 16,
        seed: int = 0,
        **_ignored: Any,  # lm-eval's own: device, max_batch_size
    ) -> None:
        pair = load_bundle_pair(Path(bundle), task, tuple(filter(None, allow.split("+"))), dtype)
        if prefill_is_idle(pair):
            logger.warning(f"the prefill module of task {task} writes what an untuned one would")
        super().__init__(pair, int(batch_size), seed)
