"""The plain weights of a model that is compiled, or sharded over several processes, while it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def plain_weights(model: nn.Module, state: dict[str, Any] | None = None) -> Iterator[dict[str, Any] | None]:
    """Take the wrappers of `torch.compile` off while a model is saved: they change the names of weights.

    Args:
        model: The model. Every process of a sharded one (FSDP2) must call this without a `state`.
        state: The complete weights, if they are gathered already.

    Yields:
        `state`, or the complete weights of a sharded model in the first process, and none in the others. None: the
        model is not sharded, and its own state dict is complete.
    """
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "_orig_mod")
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, child._orig_mod)
    try:
        yield state or gather_weights(model)
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def gather_weights(model: nn.Module) -> dict[str, Any] | None:
    """Return the complete weights, in the first process, of a model sharded over several (FSDP2); else None."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    # The state dict's: after an evaluation, the parameters themselves may be unsharded for the moment.
    if not any(isinstance(value, DTensor) for value in model.state_dict().values()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
