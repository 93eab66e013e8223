"""lm-eval's model class for a served bundle: the same token ids, answered through the router."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from qsun.bundle import read_bundle
from qsun.errors import ConfigError, DataError, ServingEnvironmentError, nearest
from qsun.evaluate.lm import SAMPLING_OPTIONS, Generated
from qsun.evaluate.router_address import RouterAddress, require_router
from qsun.models import load_tokenizer
from qsun.progress import track

STREAMS = 8  # requests at once
GENERATION_ONLY = (
    "a router gives no log-likelihoods of prompts: leave --served out, and both modules are scored "
    "in this process"
)


class RoutedModules(TemplateLM):
    """lm-eval's model `qsun-served`: `--model_args bundle=FOLDER,task=NAME,served=URL`.

    Raises:
        ConfigError: the bundle has no such task, or the router serves another bundle.
        ServingEnvironmentError: no router answers.
    """

    add_bos_token = None
    tok_encode = HFLM.tok_encode

    def __init__(
        self,
        bundle: str,
        task: str,
        served: str,
        key: str | None = None,
        seed: int = 0,
        **_ignored: Any,  # lm-eval's own: device, batch_size, max_batch_size
    ) -> None:
        super().__init__()
        opened = read_bundle(Path(bundle).absolute())
        if task not in opened.prefill:
            raise ConfigError(f"{bundle} has no task {task!r} ({nearest(task, opened.prefill)})")
        self.tokenizer: Any = load_tokenizer(opened.tokenizer)
        self._address, self._task, self._seed = RouterAddress(served, key), task, seed
        require_router(self._address, opened, [task])
        self._max_tokens = opened.manifest.max_tokens
        self.generated: dict[tuple[int, ...], Generated] = {}
        self.seconds = 0.0

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def length_of(self, context: str) -> Generated | None:
        """How long the response to a context was; None where there was none."""
        return self.generated.get(tuple(self.tok_encode(context)))

    def _loglikelihood_tokens(self, requests: Any, **_options: Any) -> list[tuple[float, bool]]:
        raise DataError(GENERATION_ONLY)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Refused.

        Raises:
            DataError: always.
        """
        raise DataError(GENERATION_ONLY)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Every answer, some requests at once, in order.

        Raises:
            ServingEnvironmentError: the router refused a request, or did not answer.
        """
        started = time.monotonic()
        with self._address.client() as client, ThreadPoolExecutor(STREAMS) as threads:
            answers = threads.map(lambda one: self._answer(client, *one.args), requests)
            texts = list(track(answers, "answers", len(requests)))
        self.seconds += time.monotonic() - started
        return texts

    def _answer(self, client: httpx.Client, context: str, options: Mapping[str, Any]) -> str:
        unknown = sorted(options.keys() - SAMPLING_OPTIONS - {"until", "max_gen_toks"})
        if unknown:
            raise DataError(f"generation through a router knows no {', '.join(unknown)}")
        chosen = normalize_gen_kwargs(dict(options), self._max_tokens)
        end = self.tokenizer.decode([self.eot_token_id])
        stop = handle_stop_sequences(chosen.get("until"), eos=end)
        prompt = self.tok_encode(context)
        body = {
            "model": self._task,
            "prompt": prompt,
            "max_tokens": chosen["max_gen_toks"],
            "temperature": chosen.get("temperature") or 0.0 if chosen.get("do_sample") else 0.0,
            "top_p": chosen.get("top_p", 1.0),
            "stop": [one for one in stop if one != end],
            "seed": self._seed,
            "return_token_ids": True,
        }
        try:
            answer = client.post("/v1/completions", json=body)
            answer.raise_for_status()
            choice = answer.json()["choices"][0]
        except httpx.HTTPStatusError as error:
            said = error.response.text[:300]
            raise ServingEnvironmentError(f"{self._address.url} refused: {said}") from error
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise ServingEnvironmentError(f"{self._address.url}: {error!r}") from error
        self.generated[tuple(prompt)] = Generated(
            len(choice["token_ids"]), choice["finish_reason"] == "stop"
        )
        return str(postprocess_generated_text(choice["text"], stop=stop, think_end_token=None))
