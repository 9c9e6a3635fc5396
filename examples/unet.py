"""U-Net (arXiv:1505.04597): what goes down the left side comes back up on the right.

Its skip connections join the first stage of a pipeline to the last, the second to the last but
one, and so on: the hardest shape for a pipeline, and an ordinary one for p2bw.

p2bw compile examples/unet.py --gpus 8
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Double(nn.Sequential):
    """Two 3x3 convolutions, each normalised."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            nn.GroupNorm(8, channels_out),
            nn.SiLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
            nn.GroupNorm(8, channels_out),
            nn.SiLU(),
        )


class UNet(nn.Module):
    def __init__(self, levels: int, width: int, classes: int) -> None:
        super().__init__()
        widths = [width << level for level in range(levels + 1)]
        self.down = nn.ModuleList(
            Double(a, b) for a, b in zip([3, *widths], widths[:-1], strict=False)
        )
        self.bottom = Double(widths[-2], widths[-1])
        self.widen = nn.ModuleList(
            nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1])
        )
        self.up = nn.ModuleList(Double(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        x, skips = image, []
        for down in self.down:
            x = down(x)
            skips.append(x)  # (B, width * 2^l, size / 2^l, size / 2^l) at level l
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for widen, up in zip(self.widen, self.up, strict=True):
            x = up(torch.cat([skips.pop(), widen(x)], dim=1))
        return self.head(x)  # (B, classes, size, size)


# `inputs` and `targets` are not told which factory built the model: it leaves here what they need.
sample: tuple[int, int]  # (image size, classes)


def model(levels: int = 4, width: int = 64, size: int = 256, classes: int = 21) -> UNet:
    """31M parameters."""
    global sample
    sample = (size, classes)
    return UNet(levels, width, classes)


def tiny(levels: int = 3, width: int = 8, size: int = 16, classes: int = 4) -> UNet:
    return model(levels, width, size, classes)


def inputs(batch_size: int) -> tuple[Tensor, ...]:
    size, _ = sample
    return (torch.randn(batch_size, 3, size, size),)


def targets(batch_size: int) -> tuple[Tensor, ...]:
    size, classes = sample
    return (torch.randint(classes, (batch_size, size, size)),)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)  # over every pixel
