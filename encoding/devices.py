"""One model on several devices at once: a replica on each, a thread for each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from .ahead import ahead


@contextmanager
def spread(
    function: Callable[[Any, nn.Module], Any],
    items: Iterable[Any],
    model: Any,
    devices: Sequence[str | int | torch.device],
) -> Iterator[Iterator[Any]]:
    """Give an iterator of `function(item, replica)` for all items, in order, on whichever device is free.

    The replicas live as long as the context. Threads suffice: while a device computes, Python is free.
    """
    free: SimpleQueue[nn.Module] = SimpleQueue()
    for device in (chosen := [torch.device(device) for device in devices]):
        free.put(model if device == model.device else replica(model, device))
    kinds = {device.type for device in chosen}
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}

    def work(item: Any) -> Any:
        own = free.get()
        device = own.device
        enabled, dtype = autocast[device.type]
        current = nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
        try:
            with current, torch.autocast(device.type, dtype, enabled):  # each thread has settings of its own
                return function(item, own)
        finally:
            free.put(own)

    with ahead(work, items, len(chosen), first_here=False) as results:
        yield results


def replica(model: Any, device: torch.device) -> Any:
    """Return a copy of a model on another device; the processor is shared, as everything is that is no weight.

    Raises:
        ValueError: If accelerate placed the model's parts, or it is quantized: such weights cannot be copied.
    """
    for module in model.modules():
        if hasattr(module, "_hf_hook") or getattr(module, "quantization_method", None) is not None:
            raise ValueError(
                "devices= copies the model to each device, which a model that is quantized or that device_map spread "
                "over several places does not allow. Load one model for each device, and encode with each in a thread."
            )
    copies: dict[int, Any] = {id(model._processor): model._processor}
    for tensor in (*model.parameters(), *model.buffers()):
        moved = tensor.detach().to(device)
        copies[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(model, copies)
