"""Which recordings are made and what is replayed, the recorded work run again in the place of a GPU's replay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchrl_vla.modules.openvla.graphs import ForwardGraphs, GraphRecorder


class Repeater(GraphRecorder):
    """Runs a function again, into the same results, where a GPU would replay it."""

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        results = function()

        def replay() -> None:
            for result, new in zip(results, function(), strict=True):
                result.copy_(new)

        return replay, results


def test_batches_of_any_size_share_a_few_recordings() -> None:
    sizes: list[int] = []

    def forward(x: Tensor, mask: Tensor | None, heat: Tensor) -> tuple[Tensor, ...]:
        sizes.append(len(x))
        return x * heat, x.sum(-1)

    graphs = ForwardGraphs(forward, max_batch_size=10)
    graphs._recorder = Repeater()
    heat = torch.tensor(2.0)
    for size in range(1, 11):
        x = torch.randn(size, 3)
        doubled, total = graphs([x, None, heat], state=None)
        torch.testing.assert_close(doubled, 2 * x, rtol=0, atol=0)
        torch.testing.assert_close(total, x.sum(-1), rtol=0, atol=0)
    assert sorted(set(sizes)) == [1, 2, 3, 4, 8, 10]
    assert len(graphs._recordings) == 6
    kept, _ = graphs([torch.ones(5, 3), None, heat], state=None)
    graphs([torch.zeros(5, 3), None, heat], state=None)
    assert (kept == 2).all()  # a copy, which the next replay does not overwrite
    graphs([torch.ones(5, 3), None, heat], state="adapters off")
    assert len(graphs._recordings) == 7
