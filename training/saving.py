"""The plain weights of a model that is compiled, or sharded over several processes, while it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[dict[str, Any] | None]:
    """Take the wrappers of `torch.compile` off while a model is saved: they change the names of weights.

    Args:
        model: The model. Every process of a sharded one (FSDP2) must call this.

    Yields:
        The complete weights of a sharded model, in the first process (none in the others); None if it is not sharded.
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
        yield gather_weights(model)
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def gather_weights(model: nn.Module) -> dict[str, Any] | None:
    """Return the complete weights, in the first process, of a model sharded over several (FSDP2); else None."""
    # The state dict's: after an evaluation, the parameters themselves may be unsharded for the moment.
    if not any(isinstance(value, DTensor) for value in model.state_dict().values()):
        return None
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
