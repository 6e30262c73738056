"""Inception v3 as trained in 2015, by which FID is defined (C. Szegedy et al., "Rethinking the Inception Architecture", 2016).

The tensors have the names of torch-fidelity's file, which are also those of pytorch-fid's. Unlike torchvision's network it averages
without the border (but for the last block, which takes the maximum) and has 1008 classes.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from stableavatar.evaluation.samples import Arrays, BatchWatcher, PictureNetwork, Seen, View, Watcher
from stableavatar.evaluation.weights import Tools, checked_weights
from stableavatar.models.checkpoint_files import TORCH_ERRORS
from stableavatar.sampling.offload import resolve_device

SIDE = 299
FEATURES, CLASSES = 2048, 1008


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H', W']."""
        return functional.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Convolution(inputs, 48, 1), Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inputs, 64, 1), Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, 35, 35] -> [B, 224 + pooled, 35, 35]."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = Convolution(288, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(288, 64, 1), Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 288, 35, 35] -> [B, 768, 17, 17]."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17 x 17, with kernels of 7 in one direction after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        across, down = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Convolution(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Convolution(768, width, 1), Convolution(width, width, **across)
        self.branch7x7_3 = Convolution(width, 192, **down)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Convolution(768, width, 1), Convolution(width, width, **down)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Convolution(width, width, **across), Convolution(width, width, **down)
        self.branch7x7dbl_5 = Convolution(width, 192, **across)
        self.branch_pool = Convolution(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 768, 17, 17] -> the same."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Convolution(768, 192, 1), Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Convolution(768, 192, 1), Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Convolution(192, 192, (7, 1), padding=(3, 0)), Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 768, 17, 17] -> [B, 1280, 8, 8]."""
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, functional.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8 x 8; `last`: pools by the maximum."""

    def __init__(self, inputs: int, last: bool) -> None:
        super().__init__()
        across, down = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self._last = last
        self.branch1x1 = Convolution(inputs, 320, 1)
        self.branch3x3_1 = Convolution(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Convolution(384, 384, **across), Convolution(384, 384, **down)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inputs, 448, 1), Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Convolution(384, 384, **across), Convolution(384, 384, **down)
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, 8, 8] -> [B, 2048, 8, 8]."""
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = self.branch_pool(functional.max_pool2d(x, 3, stride=1, padding=1) if self._last else _average(x))
        singles = self.branch3x3_2a(single), self.branch3x3_2b(single)
        doubles = self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)
        return torch.cat([self.branch1x1(x), *singles, *doubles, pooled], 1)


class InceptionV3(nn.Module):
    """The network up to its 2048 features; its classifier `fc` is there for the file's sake alone."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Convolution(3, 32, 3, stride=2), Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Convolution(64, 80, 1), Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = BlockB(), BlockC(128), BlockC(160)
        self.Mixed_6d, self.Mixed_6e, self.Mixed_7a = BlockC(160), BlockC(192), BlockD()
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, last=False), BlockE(2048, last=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pictures, float32 [B, 3, 299, 299] RGB in [-1, 1] -> the mean of the last block over space, [B, 2048]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(functional.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


@lru_cache(maxsize=1)
def load_inception(path: str, device: str) -> InceptionV3:
    """The network with the weights of a file, every tensor in its place; ValueError where it does not hold them."""
    model = InceptionV3()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except TORCH_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} does not hold Inception's weights ({reason}); expected those of torch-fidelity") from None
    return model.eval().requires_grad_(False).to(resolve_device(device))


class Inception(PictureNetwork):
    """`feature`, float32 [N, 2048]: of the whole picture, stretched to 299 x 299 as pytorch-fid does it (bilinear, in [-1, 1]).

    Args:
        name: as the cache calls it. view: which pictures.
    """

    weights = ("inception",)

    def __init__(self, name: str, tools: Tools, view: View) -> None:
        self.name, self._tools, self._view = name, tools, view

    def load(self) -> None:
        """As `Network.load`."""
        self.definition()
        self._model()

    def definition(self) -> dict[str, Any]:
        """As `Network.definition`."""
        digest = checked_weights("inception", Path(self._tools.weights.inception), self._tools.weights)
        return {"network": "Inception v3 (2015)", "sha256": digest, "view": vars(self._view), "size": SIDE, "resize": "bilinear"}

    def watch(self, pictures: Seen, known: Arrays, span: tuple[float, float] | None) -> Watcher:
        """As `PictureNetwork.watch`."""
        return BatchWatcher(self._view.grid(pictures, span), _prepare, self._embed, self._tools.batch)

    def _embed(self, held: list[Tensor]) -> Arrays:
        model = self._model()
        with torch.inference_mode():
            return {"feature": model(torch.cat(held).to(model.fc.weight.device)).cpu().numpy()}

    def _model(self) -> InceptionV3:
        return load_inception(self._tools.weights.inception, self._tools.device)


def _prepare(frame: np.ndarray) -> Tensor:
    """[1, 3, 299, 299]."""
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float() / 255
    return 2 * functional.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
