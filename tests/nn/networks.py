"""Small modules for the parity tests: one per operation, functional, method and module forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """A module whose forward is the function it is given; its layers are set by name."""

    def __init__(self, run: Callable[..., Any], **parts: Any):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


class Net2(Net):
    """The same with two inputs."""

    def forward(self, x, y):
        return self.run(self, x, y)


def conv(inputs: int = 3, outputs: int = 4, **options: Any) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def _split(s, x):
    a, b = torch.chunk(F.relu(s.c(x)), 2, 1)
    return s.d(a) + b


def _split_method(s, x):
    a, b, c = s.c(x).relu().split([1, 2, 1], dim=1)
    return torch.cat([a, c], 1) + b


IMAGE = (3, 3, 8, 8)

# name: (module factory, input shapes)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "relu output": (lambda: Net(lambda s, x: F.relu(s.c(x)), c=conv()), [IMAGE]),
    "relu6": (lambda: Net(lambda s, x: s.d(F.relu6(s.c(x))), c=conv(), d=conv(4, 2)), [IMAGE]),
    "hardtanh": (lambda: Net(lambda s, x: s.d(F.hardtanh(s.c(x), -0.9, 0.7)), c=conv(), d=conv(4, 2)), [IMAGE]),
    "clamp": (lambda: Net(lambda s, x: s.d(s.c(x).clamp(min=-1)), c=conv(), d=conv(4, 2)), [IMAGE]),
    "sigmoid": (lambda: Net(lambda s, x: s.d(torch.sigmoid(s.c(x))), c=conv(), d=conv(4, 2)), [IMAGE]),
    "tanh": (lambda: Net(lambda s, x: s.c(x).tanh(), c=conv()), [IMAGE]),
    "silu": (lambda: Net(lambda s, x: s.d(F.silu(s.c(x))), c=conv(), d=conv(4, 2)), [IMAGE]),
    "gelu": (lambda: Net(lambda s, x: s.d(F.gelu(s.c(x))), c=conv(), d=conv(4, 2)), [IMAGE]),
    "hardsigmoid": (lambda: Net(lambda s, x: s.d(s.h(s.c(x))), c=conv(), d=conv(4, 2), h=nn.Hardsigmoid()), [IMAGE]),
    "hardswish": (lambda: Net(lambda s, x: s.d(s.h(s.c(x))), c=conv(), d=conv(4, 2), h=nn.Hardswish()), [IMAGE]),
    "leaky relu": (lambda: Net(lambda s, x: s.d(F.leaky_relu(s.c(x), 0.1)), c=conv(), d=conv(4, 2)), [IMAGE]),
    "prelu": (lambda: Net(lambda s, x: s.d(s.p(s.c(x))), c=conv(), d=conv(4, 2), p=nn.PReLU(4)), [IMAGE]),
    "add": (lambda: Net2(lambda s, x, y: s.d(x + y), d=conv(3, 2)), [IMAGE, IMAGE]),
    "add broadcast": (lambda: Net2(lambda s, x, y: x + y), [IMAGE, (3, 3, 1, 1)]),
    "sub": (lambda: Net2(lambda s, x, y: F.relu(x - y)), [IMAGE, IMAGE]),
    "mul": (lambda: Net2(lambda s, x, y: (x * y, x.mul(y).relu())), [IMAGE, IMAGE]),
    "numbers": (lambda: Net(lambda s, x: s.d(x * 0.3 + 1.5) / 3, d=conv(3, 2)), [IMAGE]),
    "number first": (lambda: Net(lambda s, x: s.d(1 - x), d=conv(3, 2)), [IMAGE]),
    "neg": (lambda: Net(lambda s, x: s.d(-x), d=conv(3, 2)), [IMAGE]),
    "parameters": (
        lambda: Net(
            lambda s, x: s.d(x * s.g + s.b),
            d=conv(3, 2),
            g=nn.Parameter(torch.rand(1, 3, 1, 1)),
            b=torch.rand(1, 3, 1, 1),
        ),
        [IMAGE],
    ),
    "cat": (
        lambda: Net(lambda s, x: s.d(torch.cat([s.a(x), F.relu(s.b(x))], 1)), a=conv(), b=conv(3, 5), d=conv(9, 2)),
        [IMAGE],
    ),
    "cat output": (lambda: Net(lambda s, x: torch.cat([s.a(x), F.relu(s.b(x))], 1), a=conv(), b=conv(3, 5)), [IMAGE]),
    "stack": (
        lambda: Net(lambda s, x: torch.stack([s.a(x).relu(), F.relu(s.b(x))], 1).flatten(1, 2), a=conv(), b=conv()),
        [IMAGE],
    ),
    "chunk": (lambda: Net(_split, c=conv(), d=conv(2, 2)), [IMAGE]),
    "split": (lambda: Net(_split_method, c=conv()), [IMAGE]),
    "slice": (lambda: Net(lambda s, x: s.d(s.c(x)[:, 1:3, ::2, 1:]), c=conv(), d=conv(2, 2)), [IMAGE]),
    "pad": (lambda: Net(lambda s, x: s.d(F.pad(x, (1, 2, 0, 1))), d=conv(3, 2)), [IMAGE]),
    "permute": (
        lambda: Net(
            lambda s, x: s.l(s.c(x).permute(0, 2, 3, 1).reshape(-1, 64, 4)).transpose(1, 2), c=conv(), l=nn.Linear(4, 5)
        ),
        [IMAGE],
    ),
    "view": (lambda: Net(lambda s, x: s.l(s.c(x).view(x.size(0), -1)), c=conv(), l=nn.Linear(256, 5)), [IMAGE]),
    "view shape": (
        lambda: Net(lambda s, x: s.l(s.c(x).view(x.shape[0], 4 * 8 * 8)), c=conv(), l=nn.Linear(256, 5)),
        [IMAGE],
    ),
    "unsqueeze": (
        lambda: Net(lambda s, x: s.m(s.l(x).unsqueeze(1).squeeze(1)), l=nn.Linear(6, 6), m=nn.Linear(6, 3)),
        [(4, 6)],
    ),
    "avg pool": (lambda: Net(lambda s, x: s.d(F.avg_pool2d(s.c(x), 3, 2, 1)), c=conv(), d=conv(4, 2)), [IMAGE]),
    "avg pool ceil": (lambda: Net(lambda s, x: F.avg_pool2d(s.c(x), 3, 2, 1, True, False), c=conv()), [(3, 3, 9, 8)]),
    "avg pool padded": (lambda: Net(lambda s, x: F.avg_pool2d(s.c(x), 3, 2, 1, True, True), c=conv()), [(3, 3, 10, 9)]),
    "global avg pool": (
        lambda: Net(lambda s, x: s.l(F.adaptive_avg_pool2d(F.relu(s.c(x)), 1).flatten(1)), c=conv(), l=nn.Linear(4, 5)),
        [(3, 3, 7, 5)],
    ),
    "adaptive avg pool": (
        lambda: Net(
            lambda s, x: s.l(F.adaptive_avg_pool2d(F.relu(s.c(x)), (2, 4)).flatten(1)), c=conv(), l=nn.Linear(32, 5)
        ),
        [IMAGE],
    ),
    "mean": (lambda: Net(lambda s, x: s.l(F.relu(s.c(x)).mean((2, 3))), c=conv(), l=nn.Linear(4, 5)), [(3, 3, 7, 5)]),
    "mean of columns": (
        lambda: Net(lambda s, x: s.l(F.relu(s.c(x)).mean(-1)), c=conv(), l=nn.Linear(7, 5)),
        [(3, 3, 7, 5)],
    ),
    "mean of rows": (
        lambda: Net(lambda s, x: s.d(s.c(x).mean(2, keepdim=True)).mean(2), c=conv(), d=conv(4, 2)),
        [(3, 3, 7, 5)],
    ),
    "mean of steps": (lambda: Net(lambda s, x: s.l(x.mean(1)), l=nn.Linear(6, 5)), [(3, 7, 6)]),
    "global max pool": (
        lambda: Net(lambda s, x: s.l(F.adaptive_max_pool2d(s.c(x), 1).flatten(1)), c=conv(), l=nn.Linear(4, 5)),
        [IMAGE],
    ),
    "arg max": (lambda: Net(lambda s, x: s.l(x).argmax(1), l=nn.Linear(6, 5)), [(30, 6)]),
    "conv transpose": (
        lambda: Net(lambda s, x: s.d(F.relu(s.c(x))), c=conv(), d=nn.ConvTranspose2d(4, 3, 3, 2, 1, 1)),
        [IMAGE],
    ),
    "conv transpose groups": (
        lambda: Net(lambda s, x: s.d(F.relu(s.c(x))), c=conv(), d=nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)),
        [IMAGE],
    ),
    "conv transpose norm": (
        lambda: Net(
            lambda s, x: F.relu(s.b(s.d(F.relu(s.c(x))))),
            c=conv(),
            d=nn.ConvTranspose2d(4, 3, 2, 2),
            b=nn.BatchNorm2d(3),
        ),
        [IMAGE],
    ),
    "interpolate": (
        lambda: Net(lambda s, x: s.d(F.interpolate(s.c(x), scale_factor=2)), c=conv(), d=conv(4, 2)),
        [IMAGE],
    ),
    "upsample": (lambda: Net(lambda s, x: s.u(s.c(x)), c=conv(), u=nn.Upsample(scale_factor=(2, 3))), [IMAGE]),
    "matmul": (
        lambda: Net(lambda s, x: torch.matmul(s.a(x), s.b(x).transpose(1, 2)), a=nn.Linear(6, 5), b=nn.Linear(6, 5)),
        [(3, 7, 6)],
    ),
    "dropout": (
        lambda: Net(lambda s, x: s.d(s.p(F.relu(s.c(x)))), c=conv(), d=conv(4, 2), p=nn.Dropout(0.3)),
        [IMAGE],
    ),
    "norm first": (lambda: Net(lambda s, x: s.d(s.b(x)), b=nn.BatchNorm2d(3), d=conv(3, 2)), [IMAGE]),
    "pool then relu": (
        lambda: Net(lambda s, x: s.d(F.relu(F.max_pool2d(s.c(x), 2))), c=conv(), d=conv(4, 2)),
        [IMAGE],
    ),
    "padding same": (lambda: Net(lambda s, x: s.c(x), c=nn.Conv2d(3, 4, 4, padding="same")), [IMAGE]),
    "groups and dilation": (
        lambda: Net(
            lambda s, x: s.d(F.relu(s.c(x))),
            c=conv(3, 6, groups=3),
            d=nn.Conv2d(6, 4, 3, 2, dilation=2, groups=2, bias=False),
        ),
        [IMAGE],
    ),
    "softmax": (lambda: Net(lambda s, x: F.softmax(s.l(x), 1), l=nn.Linear(6, 5)), [(30, 6)]),
    "softmax inside": (
        lambda: Net(
            lambda s, x: torch.matmul(s.s(torch.matmul(s.a(x), s.b(x).transpose(1, 2))), s.c(x)),
            a=nn.Linear(6, 5),
            b=nn.Linear(6, 5),
            c=nn.Linear(6, 4),
            s=nn.Softmax(-1),
        ),
        [(3, 7, 6)],
    ),
    "two outputs": (
        lambda: Net(lambda s, x: (s.l(x), F.relu(s.m(s.l(x)))), l=nn.Linear(6, 5), m=nn.Linear(5, 2)),
        [(4, 6)],
    ),
    "shared layer": (lambda: Net(lambda s, x: s.l(F.relu(s.l(x))) + s.l(x), l=nn.Linear(6, 6)), [(4, 6)]),
    "shared relu": (
        lambda: Net(lambda s, x: s.r(s.m(s.r(s.l(x)))), l=nn.Linear(6, 6), m=nn.Linear(6, 6), r=nn.ReLU()),
        [(4, 6)],
    ),
}
