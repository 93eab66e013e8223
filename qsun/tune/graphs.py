"""CUDA graphs: a micro-batch's forward and backward, replayed without Python between its kernels.

A small model's training step waits for the CPU that launches its kernels. Shapes are few, because
micro-batches are padded to multiples of `SHAPE_STEP`; a shape that comes back is captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qsun.tune.modules import TunedModules

SHAPE_STEP = 32  # tokens
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    count: torch.Tensor
    loss: torch.Tensor

    def replay(self, inputs: Inputs, count: torch.Tensor) -> torch.Tensor:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.count.copy_(count)
        self.graph.replay()
        return self.loss.clone()


class StepGraphs:
    """Adds a micro-batch's gradients to those that the trained weights have, and gives its loss.

    Gradients stay where they are: they must be zeroed in place, never dropped, and nothing else
    may add to them. The first micro-batch of a shape runs as any other would.
    """

    def __init__(self, modules: TunedModules) -> None:
        modules.keep_gradients = True
        self._modules = modules
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[torch.Size, ...], _Captured | None] = {}

    def __call__(self, inputs: Inputs, count: torch.Tensor) -> torch.Tensor:
        """One micro-batch; `count` response tokens make the step, int64 `[]`."""
        shape = tuple(tensor.shape for tensor in inputs.values())
        if shape not in self._captured:
            self._captured[shape] = None
            return self._run(inputs, count)
        captured = self._captured[shape]
        if captured is None:
            captured = self._captured[shape] = self._capture(inputs, count)
        return captured.replay(inputs, count)

    def _run(self, inputs: Inputs, count: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self._modules(**inputs, num_items_in_batch=count)["loss"]
        torch.autograd.backward(loss)
        return loss.detach()

    def _capture(self, inputs: Inputs, count: torch.Tensor) -> _Captured:
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        held_count, graph = count.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._run(held, held_count)
        return _Captured(graph, held, held_count, loss)
