"""A moving average of the weights that train."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor

from stableavatar.training.trainable import trained


class Ema:
    """The library's moving average, in float32, over the weights of a model that train.

    The weights are looked up at every use, so they may be loaded, moved or replaced in between. The decay grows from 0 to its
    value over the first steps, so that the average soon forgets where training started.

    Args:
        model: with its trainable weights chosen.
        decay: of the average, above 0.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._average = EMAModel(self._weights(), decay=decay)
        self._average.to(dtype=torch.float32)

    def _weights(self) -> list[nn.Parameter]:
        return list(trained(self._model).values())

    def step(self) -> None:
        """Takes in the weights after an optimiser step."""
        self._average.step(self._weights())

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and the averages (of a sharded model this process's parts), in the order of the weights that train."""
        state = self._average.state_dict()
        averages = [x.to_local() if isinstance(x, DTensor) else x for x in state["shadow_params"]]
        return {"optimization_step": state["optimization_step"], "shadow_params": averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over copies of what `state_dict` gave, on the weights' device; the decay stays as configured.

        Raises:
            ValueError: the averages are of other weights than those that train.
        """
        weights, averages = self._weights(), state["shadow_params"]
        own = [x.to_local() if isinstance(x, DTensor) else x for x in weights]
        got, expected = [x.shape for x in averages], [x.shape for x in own]
        if got != expected:
            raise ValueError(
                f"the checkpoint averages {len(got)} weights, other ones than the {len(expected)} that train; resume with the same what"
            )
        averages = [average.to(part.device) for average, part in zip(averages, own)]
        averages = [
            DTensor.from_local(average, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride())
            if isinstance(weight, DTensor) else average
            for average, weight in zip(averages, weights)
        ]
        self._average.load_state_dict(state | {"shadow_params": averages})
        self._average.to(dtype=torch.float32)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the model has the averaged weights; after it exactly its own again."""
        weights = self._weights()
        self._average.store(weights)
        self._average.copy_to(weights)
        try:
            yield
        finally:
            self._average.restore(weights)
