"""From a checkpoint's `*_diff` tensors to the joined, possibly sharded parameters of the view."""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from orthrus.model.modeling import is_view_tensor
from orthrus.model.tensors import listed

_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.self_attn\.([qkvo]_proj|[qk]_norm)_diff\.(weight|bias)")


def view_parameter(name: str) -> tuple[str, str | None]:
    """The view's parameter that a `*_diff` tensor belongs to, and which part of it where projections are joined.

    Raises `ValueError` for a name that is none of a view's.
    """
    if (found := _NAME.fullmatch(name)) is None:
        raise ValueError(f"{name} is no tensor of a diffusion view")
    layer, module, leaf = found.groups()
    is_joined = module in ("q_proj", "k_proj", "v_proj")
    own = "qkv_proj" if is_joined else module
    return f"model.layers.{layer}.self_attn.{own}.{leaf}", module[0] if is_joined else None


def load_view(draft: nn.Module, weights: Iterable[tuple[str, Tensor]], *, source: str) -> set[str]:
    """Fill the view from a checkpoint's tensors, of which the base's are passed over; names of what was filled.

    Raises `ValueError` for a `*_diff` tensor that is missing, unknown or of another shape.
    """
    parameters = dict(draft.named_parameters())
    expected = {(name, part) for name in parameters if ".layers." in name for part in parts(name)}
    filled: set[tuple[str, str | None]] = set()
    for name, tensor in weights:
        if not is_view_tensor(name):
            continue
        own, part = view_parameter(name)
        if (own, part) not in expected:
            raise ValueError(f"{source} holds {name}, which this model does not have")
        parameter = parameters[own]
        load: Any = getattr(parameter, "weight_loader", _copy)
        try:
            load(parameter, tensor, part) if part else load(parameter, tensor)
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{source}: {name} has shape {list(tensor.shape)}, which does not fit its base") from error
        filled.add((own, part))
    if missing := [stored_name(*one) for one in expected - filled]:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of the diffusion view: {listed(missing)}; it is no Orthrus "
            "checkpoint, or a damaged one"
        )
    return {name for name, _ in filled}


def parts(name: str) -> tuple[str | None, ...]:
    """The parts that a parameter is filled from."""
    return ("q", "k", "v") if ".qkv_proj." in name else (None,)


def stored_name(name: str, part: str | None) -> str:
    """The checkpoint's name for a part of a parameter."""
    module, _, leaf = name.rpartition(".")
    return f"{module.replace('qkv_proj', f'{part}_proj')}_diff.{leaf}"


def _copy(parameter: nn.Parameter, tensor: Tensor) -> None:
    if parameter.shape != tensor.shape:
        raise ValueError(f"shape {list(tensor.shape)} into {list(parameter.shape)}")
    parameter.data.copy_(tensor)
