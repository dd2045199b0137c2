"""Random small networks from a seed: every kind of layer, odd shapes, odd formats."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional as F

import edgemat

KINDS = (
    "conv", "conv", "depthwise", "norm", "relu", "table", "max_pool", "avg_pool", "residual", "cat", "clip", "gate",
    "slice", "pad", "transpose", "upsample", "prelu", "constant",
)  # fmt: skip
TABLES = (torch.sigmoid, torch.tanh, F.silu, F.hardswish, F.gelu, F.relu6, F.hardsigmoid)
MODES = ("TRN,SAT", "RND_CONV,SAT_SYM", "RND_ZERO,WRAP", "RND_INF,SAT_ZERO", "TRN_ZERO,SAT", "RND_MIN_INF,SAT")


class RandomNetwork(nn.Module):
    """A chain of one to six random steps over a 1-D or 2-D map, then a random end."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.flat = draw.random() < 0.25
        channels = draw.randint(1, 5)
        extent = (draw.randint(3, 9),) if self.flat else (draw.randint(3, 9), draw.randint(3, 9))
        self.shape = (channels, *extent)
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if self.flat else (nn.Conv2d, nn.BatchNorm2d)
        self.layers = nn.ModuleList()
        self.plan: list[tuple[str, float, float]] = []
        for _ in range(draw.randint(1, 6)):
            kind = draw.choice(KINDS)
            layer: nn.Module = nn.Identity()
            if kind == "conv":
                outputs, kernel = draw.randint(1, 6), draw.randint(1, 3)
                layer = conv(
                    channels, outputs, kernel, stride=draw.choice((1, 1, 2)), padding=draw.randint(0, 2),
                    dilation=draw.choice((1, 1, 2)), bias=draw.random() < 0.8,
                )  # fmt: skip
                channels = outputs
            elif kind == "depthwise":
                outputs = channels * draw.choice((1, 2))
                layer = conv(channels, outputs, 3, padding=1, groups=channels, stride=draw.choice((1, 2)))
                channels = outputs
            elif kind == "norm":
                layer = norm(channels)
                layer.running_mean.uniform_(-1, 1)
                layer.running_var.uniform_(0.3, 3)
            elif kind == "residual":
                layer = conv(channels, channels, 3, padding=1)
            elif kind == "prelu":
                layer = nn.PReLU(draw.choice((1, channels)))
            elif kind == "cat":
                channels *= 2
            self.layers.append(layer)
            self.plan.append((kind, draw.random(), draw.random()))
        self.end = draw.choice(("map", "mean", "flatten"))

    def step(self, x: torch.Tensor, kind: str, a: float, b: float, layer: nn.Module) -> torch.Tensor:
        """One step of the plan."""
        if kind == "relu":
            return torch.relu(x)
        if kind == "table":
            return TABLES[int(a * len(TABLES))](x)
        if kind == "max_pool":
            return (F.max_pool1d if self.flat else F.max_pool2d)(x, 2, stride=1 + int(a * 2), padding=int(b * 2))
        if kind == "avg_pool":
            pool = F.avg_pool1d if self.flat else F.avg_pool2d
            return pool(x, 2 + int(b > 0.5), stride=1 + int(a * 2), padding=int(b * 2), count_include_pad=a > 0.5)
        if kind == "residual":
            return torch.relu(x + layer(x)) if a > 0.5 else x - layer(x)
        if kind == "cat":
            return torch.cat([x, torch.relu(x)], 1)
        if kind == "clip":
            return torch.clamp(x, -1.25, 0.5 + int(b * 3))
        if kind == "gate":
            return x * torch.sigmoid(x)
        if kind == "slice":
            return x[..., 1:]
        if kind == "pad":
            return F.pad(x, (1, int(a * 3)))
        if kind == "transpose":
            return x if self.flat else x.transpose(2, 3)
        if kind == "upsample":
            return F.interpolate(x, scale_factor=2)
        if kind == "constant":
            return 1 - x * 0.5
        return layer(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, *shape] to a map, its mean, or its flattening."""
        for (kind, a, b), layer in zip(self.plan, self.layers, strict=True):
            x = self.step(x, kind, a, b, layer)
        if self.end == "mean":
            return x.mean(2 if self.flat else (2, 3))
        return x.flatten(1) if self.end == "flatten" else x


def random_recipe(seed: int) -> edgemat.Recipe:
    """Formats of 2 to 11 bits, any mode, learned or stated binary points."""
    draw = random.Random(seed * 7 + 1)

    def width(low: int, high: int) -> str:
        bits = draw.randint(low, high)
        stated = draw.random() < 0.3
        return f"fixed<{bits},{draw.randint(-1, bits)},{draw.choice(MODES)}>" if stated else f"fixed<{bits}>"

    return edgemat.Recipe(
        input=f"fixed<{draw.randint(2, 10)},{draw.randint(0, 4)}>",
        weights=width(2, 9),
        activations=width(2, 11),
        outputs=draw.choice((None, None, "fixed<8>")),
        per_channel_weights=draw.random() < 0.7,
        batch_norm=draw.choice(("fold", "affine")),
    )
