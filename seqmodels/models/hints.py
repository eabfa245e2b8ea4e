"""Optimiser hints of a whole model, by parameter name."""

from __future__ import annotations

from torch import nn

from seqmodels.mixers.base import ParameterHint


def parameter_hints(model: nn.Module) -> dict[str, ParameterHint]:
    """Name in ``model.named_parameters()`` to the hint of the module that owns the parameter.

    Modules say what they want in an attribute ``parameter_hints`` (of the class, or of an instance whose
    arguments decide) keyed by their own parameter names (dotted for a child's: ``"conv.weight"``).
    Looking names up each time, rather than marking tensors, survives ``deepcopy``, ``to_empty``,
    ``load_state_dict(assign=True)`` and FSDP2. Where two modules name one parameter, the outer one
    decides.
    """
    known = {name for name, _ in model.named_parameters()}
    hints: dict[str, ParameterHint] = {}
    for path, module in model.named_modules():
        for own_name, hint in getattr(module, "parameter_hints", {}).items():
            name = f"{path}.{own_name}" if path else own_name
            if name in known:
                hints.setdefault(name, hint)
    return hints
