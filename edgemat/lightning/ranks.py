"""What the processes of a distributed run must do together: fail, share batches, agree on formats and buffers."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from edgemat import errors
from edgemat.errors import EdgematError, UnsupportedOpError
from edgemat.nn.calibration import Statistics
from edgemat.nn.quantizer import FixedQuantizer


def check_strategy(trainer: Trainer) -> None:
    """Refuses strategies that split parameters over processes, and batch norms that would be synchronised.

    Raises:
        UnsupportedOpError: for FSDP, DeepSpeed and the like, and for ``sync_batchnorm=True``.
    """
    if getattr(trainer.strategy, "_layer_sync", None) is not None:
        raise UnsupportedOpError(
            "the trainer has sync_batchnorm=True, which does not reach batch norms folded into quantised layers, "
            "expected False; the first process's statistics are everyone's"
        )
    if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
        raise UnsupportedOpError(
            f"the strategy is {type(trainer.strategy).__name__}, which may split parameters over processes, expected "
            "one device or DDP; use Trainer(strategy='ddp')"
        )


def raise_together(trainer: Trainer, error: EdgematError | None) -> None:
    """Raises the error of the first process in all of them, so that none waits for the others; a barrier otherwise."""
    if trainer.world_size == 1:
        if error is not None:
            raise error
        return
    mine = None if error is None else (type(error).__name__, str(error))
    shared = trainer.strategy.broadcast(mine, 0)
    if error is not None:
        raise error
    if shared is not None:
        kind = getattr(errors, shared[0], EdgematError)
        raise kind(shared[1])


def gather_batches(trainer: Trainer, batches: list[Any]) -> list[Any]:
    """The batches of every process, interleaved by process, the same list in each of them."""
    if trainer.world_size == 1:
        return batches
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, _on_cpu(batches))
    return [batch for row in zip(*gathered, strict=True) for batch in row]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(item) for item in value]
    return value


@torch.no_grad()
def synchronize(trainer: Trainer, network: nn.Module) -> None:
    """Gives every process the same buffers.

    The ranges that WRAP formats follow become those seen by all processes together; every other buffer (batch norm
    statistics) becomes the first process's, as DDP does at the next training step anyway.
    """
    if trainer.world_size == 1:
        return
    following = [part for part in network.modules() if isinstance(part, FixedQuantizer) and "seen" in part._buffers]
    seen = [part.get_buffer("seen") for part in following]
    for ranges in seen:
        torch.distributed.all_reduce(ranges[0], torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(ranges[1], torch.distributed.ReduceOp.MAX)
    _broadcast([buffer for buffer in network.buffers() if not any(buffer is ranges for ranges in seen)])
    for part, ranges in zip(following, seen, strict=True):
        if bool(ranges.any()):
            part.fit(ranges.movedim(1, part.axis) if part.per_channel else ranges)


def _broadcast(tensors: list[Tensor]) -> None:
    """The first process's values for all, one message per dtype."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        kept = [tensor for tensor in tensors if tensor.dtype == dtype]
        sent = torch.cat([tensor.reshape(-1) for tensor in kept])
        sent = sent.to(torch.uint8) if dtype == torch.bool else sent
        torch.distributed.broadcast(sent, 0)
        for tensor, values in zip(kept, sent.split([tensor.numel() for tensor in kept]), strict=True):
            tensor.copy_(values.view(tensor.shape))


def unite(trainer: Trainer, observed: dict[str, Statistics]) -> None:
    """Makes each process's statistics those of all processes' values, in place."""
    if trainer.world_size == 1 or not observed:
        return
    mine = [(part.low, part.high, part.lows, part.highs, part.sample) for part in observed.values()]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, mine)
    for part, shared in zip(observed.values(), zip(*gathered, strict=True), strict=True):
        lows, highs, channel_lows, channel_highs, samples = zip(*shared, strict=True)
        part.low, part.high = min(lows), max(highs)
        part.lows, part.highs = torch.stack(channel_lows).amin(0), torch.stack(channel_highs).amax(0)
        part.sample = [values for sample in samples for values in sample]


def total(trainer: Trainer, counts: Tensor) -> Tensor:
    """The sum of `counts` over all processes."""
    if trainer.world_size > 1:
        torch.distributed.all_reduce(counts)
    return counts
