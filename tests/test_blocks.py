"""Walking block by block: the same states, caches and inputs as the whole models have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qsun.block import LAYERS, Block, Stage
from qsun.calibrate.pieces import cut_as_served, whole_texts
from qsun.calibrate.samples import Sample
from qsun.calibrate.shelf import MemoryShelf
from qsun.calibrate.streams import Streams
from qsun.checkpoint_files import Tensors, read_config_file
from qsun.handoff import body, collate, response_logits
from qsun.models import load_model
from tests.builders import VOCABULARY, Architecture, tiny_model

FIRST, LAST = 40, 25  # tokens of the longest prompt and response
CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny_model(tmp_path / "base", architecture=request.param)
    return tmp_path / "base"


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """A prefill module of the same layout and other weights."""
    config = read_config_file(folder / "config.json")
    architecture: Architecture = "qwen3" if config["model_type"] == "qwen3" else "llama"
    tiny_model(tmp_path / "other", architecture=architecture, seed=5)
    return tmp_path / "other"


def samples() -> list[Sample]:
    drawn = torch.Generator().manual_seed(3)
    found = []
    for prompt, response in ((FIRST, 7), (2, LAST), (19, 1), (33, 12)):
        tokens = torch.randint(3, VOCABULARY, (prompt + response,), generator=drawn).tolist()
        found.append(Sample("one", tokens, prompt))
    return found


class Walk:
    """Streams of full-precision blocks, with the blocks of `decode` and `prefill` at hand."""

    def __init__(self, decode: Path, prefill: Path, served: bool) -> None:
        config = read_config_file(decode / "config.json")
        self.blocks = int(config["num_hidden_layers"])
        self.decode, self.writer = (Block(config, torch.float32, CPU) for _ in range(2))
        self.files = Tensors(decode), Tensors(prefill)
        pieces = (cut_as_served if served else whole_texts)(samples(), 120)
        embed, embed_prompts = (self.embedding(tensors) for tensors in self.files)
        self.shelf = MemoryShelf()
        self.streams = Streams(pieces, embed, {"one": embed_prompts}, False, self.shelf)

    def embedding(self, tensors: Tensors) -> Any:
        weight = tensors["model.embed_tokens.weight"].float()
        return lambda tokens: torch.nn.functional.embedding(tokens, weight)

    def on_from(self, first: int) -> Iterator[int]:
        """Every block from `first`, loaded and with its prompts' cache written."""
        for index in range(first, self.blocks):
            self.before = {name: self.shelf[name] for name in self.streams.names()}
            for block, tensors in zip((self.decode, self.writer), self.files, strict=True):
                prefix = f"{LAYERS}.{index}."
                names = [name for name in tensors.names() if name.startswith(prefix)]
                block.load(index, {name.removeprefix(prefix): tensors[name] for name in names})
            self.streams.write_prompts("one", self.writer)
            yield index
            self.streams.advance(self.decode, self.decode)


def batch_of(rows: list[Sample]) -> Any:
    prompts = [one.tokens[: one.prompt] for one in rows]
    return collate(prompts, [one.tokens[one.prompt :] for one in rows])


def by_length() -> list[Sample]:
    return sorted(samples(), key=lambda one: len(one.tokens))


@torch.no_grad()
def test_behind_a_prefill_module_it_is_the_hand_off(folder: Path, other: Path) -> None:
    walk = Walk(folder, other, served=True)
    for _ in walk.on_from(0):
        pass
    decode, prefill = load_model(folder, "float32"), load_model(other, "float32")
    wanted = response_logits(prefill, decode, batch_of(by_length()))
    found = torch.cat(
        [
            decode.lm_head(body(decode).norm(walk.streams.states(number)))[piece.counted]
            for number, piece in enumerate(walk.streams.pieces)
        ]
    )
    assert torch.allclose(found, wanted, atol=1e-4)
    assert walk.streams.counted_positions == len(wanted)


@torch.no_grad()
def test_whole_texts_are_read_as_the_model_reads_them(folder: Path, other: Path) -> None:
    walk = Walk(folder, other, served=False)
    for _ in walk.on_from(0):
        pass
    model = load_model(folder, "float32")
    rows = iter(by_length())
    for number, piece in enumerate(walk.streams.pieces):
        for states, counted in zip(walk.streams.states(number), piece.counted, strict=True):
            tokens = torch.tensor([next(rows).tokens])
            wanted = body(model)(input_ids=tokens).last_hidden_state[0]
            assert torch.allclose(body(model).norm(states[counted]), wanted, atol=1e-4)


@torch.no_grad()
def test_moments_are_of_what_the_layers_read_at_response_positions(
    folder: Path, other: Path
) -> None:
    walk = Walk(folder, other, served=True)
    found = {
        (index, stage): walk.streams.moments(stage, walk.decode, walk.decode)
        for index in walk.on_from(0)
        for stage in Stage
    }
    decode, prefill = load_model(folder, "float32"), load_model(other, "float32")
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> Any:
        return lambda _module, inputs: seen.setdefault(name, []).append(inputs[0])

    modules = dict(decode.named_modules())
    for index, stage in found:
        for name in stage.value:
            full = f"{LAYERS}.{index}.{name}"
            modules[full].register_forward_pre_hook(note(full))
    for row in by_length():  # each by itself: no padding anywhere
        response_logits(prefill, decode, batch_of([row]))
    for (index, stage), moments in found.items():
        for name in stage.value:
            rows = torch.cat([one[0] for one in seen[f"{LAYERS}.{index}.{name}"]])
            assert moments.rows == len(rows)
            scale = float(moments.gram.abs().max())
            assert torch.allclose(moments.gram, rows.t() @ rows, atol=1e-4 * scale)


@torch.no_grad()
def test_what_stood_before_a_block_is_stood_before_again(folder: Path, other: Path) -> None:
    walk, again = (Walk(folder, other, served=True) for _ in range(2))
    for index in walk.on_from(0):
        if index == 1:
            again.streams.restore(walk.before)
    for _ in again.on_from(1):
        pass
    for number in range(len(walk.streams.pieces)):
        assert torch.equal(walk.streams.states(number), again.streams.states(number))


def test_weights_of_another_shape_are_not_taken(folder: Path, tmp_path: Path) -> None:
    tiny_model(tmp_path / "wide", hidden=192)
    block = Block(read_config_file(folder / "config.json"), torch.float32, CPU)
    with Tensors(tmp_path / "wide") as tensors:
        prefix = f"{LAYERS}.0."
        names = [name for name in tensors.names() if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): tensors[name] for name in names}
    with pytest.raises(RuntimeError, match="size mismatch"):
        block.load(0, weights)
