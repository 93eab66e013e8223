"""The load check: does vLLM, in a process of its own, compute what was quantized?

The reference is the dequantized module in transformers. Prompt log-probabilities must agree on
average, and where greedy text parts, the reference must have held the two tokens nearly equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qsun.checkpoint_files import read_config_file
from qsun.config import LoadCheckConfig
from qsun.environments import ServingEnvironment
from qsun.errors import LoadCheckError
from qsun.models import load_tokenizer
from qsun.progress import track
from qsun.scoring import token_log_probabilities
from qsun.vllm_server import VllmServer, serve

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

CHAT_TOKENS = 64  # answer length of the one question asked at the end


@dataclass(frozen=True)
class Reference:
    """What transformers makes of the prompts: log-probabilities and greedy continuations.

    `log_probabilities[i][j]` belongs to token j + 1 of prompt i; `continuations` to the first few
    prompts, cut in half.
    """

    prompts: list[list[int]]
    log_probabilities: list[list[float]]
    continuations: list[list[int]]


@dataclass(frozen=True)
class LoadCheck:
    """The comparison. Differences and gaps are in nats.

    `mean_difference` is the mean absolute difference over all prompt tokens;
    `greedy_gaps` holds, for each continuation that parts from the reference, how far apart the
    reference held the two tokens at which it parts. `answer` is None where nothing was asked.
    """

    prompts: int
    tokens: int
    mean_difference: float
    largest_difference: float
    greedy_texts: int
    greedy_gaps: list[float]
    answer: str | None

    def summary(self) -> dict[str, Any]:
        """The comparison as plain values, for a record."""
        return asdict(self)


def make_reference(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], settings: LoadCheckConfig
) -> Reference:
    """Score the first texts, cut to the length asked for, in transformers."""
    prompts = [list(text[: settings.prompt_tokens]) for text in texts[: settings.prompts]]
    scored = [
        token_log_probabilities(model, prompt).tolist()
        for prompt in track(prompts, "reference", len(prompts))
    ]
    continuations = []
    for prompt in prompts[: settings.greedy_prompts]:
        start = prompt[: max(1, len(prompt) // 2)]
        ids = torch.tensor([start], device=model.device)
        output = cast("GenerationMixin", model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=settings.greedy_tokens,
            min_new_tokens=settings.greedy_tokens,
            do_sample=False,
        )
        continuations.append(cast(torch.Tensor, output)[0, len(start) :].tolist())
    return Reference(prompts, scored, continuations)


def check_load(
    folder: Path,
    reference: Reference,
    model: PreTrainedModel,
    serving: ServingEnvironment,
    settings: LoadCheckConfig,
    question: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> LoadCheck:
    """Serve `folder` by vLLM and compare; `model`, the reference's own, judges greedy partings.

    Raises:
        ServingEnvironmentError: vLLM did not start, or ended before the last answer.
    """
    chat = load_tokenizer(folder).chat_template is not None
    context = int(read_config_file(folder / "config.json")["max_position_embeddings"])
    room = min(settings.prompt_tokens + max(settings.greedy_tokens, CHAT_TOKENS) + 256, context)
    with serve(serving.python, folder, room, settings.start_timeout_s, environment) as server:
        scored = [
            _prompt_log_probabilities(server, prompt)
            for prompt in track(reference.prompts, "vLLM prompts", len(reference.prompts))
        ]
        gaps = [
            _greedy_gap(server, model, prompt, expected)
            for prompt, expected in zip(
                reference.prompts[: len(reference.continuations)],
                reference.continuations,
                strict=True,
            )
        ]
        answer = None if question is None else _ask(server, question, chat)
    differences = torch.tensor(
        [
            abs(ours - theirs)
            for expected, found in zip(reference.log_probabilities, scored, strict=True)
            for ours, theirs in zip(expected, found, strict=True)
        ]
    )
    return LoadCheck(
        prompts=len(scored),
        tokens=len(differences),
        mean_difference=differences.mean().item(),
        largest_difference=differences.max().item(),
        greedy_texts=len(gaps),
        greedy_gaps=[gap for gap in gaps if gap is not None],
        answer=answer,
    )


def require_pass(check: LoadCheck, settings: LoadCheckConfig) -> None:
    """Judge a comparison by the configured limits, unrounded.

    Raises:
        LoadCheckError: names each limit that is broken.
    """
    failures = []
    # Written so that NaN, which compares false with everything, fails.
    if not check.mean_difference <= settings.max_mean_difference:
        failures.append(
            f"prompt log-probabilities differ by {check.mean_difference:.3f} nats on average over "
            f"{check.tokens} tokens; at most {settings.max_mean_difference} is allowed"
        )
    wide = [gap for gap in check.greedy_gaps if not gap <= settings.max_greedy_gap]
    if wide:
        failures.append(
            f"greedy text parts where the reference is {max(wide):.2f} nats apart; at most "
            f"{settings.max_greedy_gap} is allowed"
        )
    if failures:
        raise LoadCheckError(
            "vLLM does not compute what was quantized:\n  - " + "\n  - ".join(failures)
        )


def _prompt_log_probabilities(server: VllmServer, prompt: Sequence[int]) -> list[float]:
    answer = server.post(
        "/v1/completions",
        {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0},
    )
    entries = answer["choices"][0]["prompt_logprobs"]
    return [
        float(entry[str(token)]["logprob"])
        for token, entry in zip(prompt[1:], entries[1:], strict=True)
    ]


def _greedy_gap(
    server: VllmServer, model: PreTrainedModel, prompt: Sequence[int], expected: Sequence[int]
) -> float | None:
    start = list(prompt[: max(1, len(prompt) // 2)])
    answer = server.post(
        "/v1/completions",
        {
            "prompt": start,
            "max_tokens": len(expected),
            "min_tokens": len(expected),
            "temperature": 0,
            "return_token_ids": True,
        },
    )
    found = answer["choices"][0]["token_ids"]
    for position, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if ours != theirs:
            ids = torch.tensor([[*start, *expected[:position]]], device=model.device)
            with torch.no_grad():
                scores = model(ids).logits[0, -1].float().log_softmax(-1)
            return abs(float(scores[ours] - scores[theirs]))
    return None


def _ask(server: VllmServer, question: str, chat: bool) -> str:
    """The answer to one chat question; a model without a chat template just goes on writing."""
    body = {"max_tokens": CHAT_TOKENS, "temperature": 0}
    if chat:
        message = {"role": "user", "content": question}
        answer = server.post("/v1/chat/completions", {**body, "messages": [message]})
        return str(answer["choices"][0]["message"]["content"]).strip()
    answer = server.post("/v1/completions", {**body, "prompt": question})
    return str(answer["choices"][0]["text"]).strip()
