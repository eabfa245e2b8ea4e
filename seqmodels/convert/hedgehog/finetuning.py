"""Stage 2: low-rank updates or every weight, with the task's own loss."""

from __future__ import annotations

import warnings

from torch import nn

from seqmodels.convert.hedgehog.families import family_of
from seqmodels.convert.hedgehog.models import HedgehogModel
from seqmodels.convert.hedgehog.settings import FinetuningSettings


def add_trainable(model: HedgehogModel, settings: FinetuningSettings) -> nn.Module:
    """``model`` with the parameters of stage 2 switched on, wrapped by peft for LoRA.

    Raises:
        ImportError: LoRA without peft.
    """
    if settings.method == "full":
        return model.requires_grad_(True)
    check_peft()
    import peft

    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type] - peft takes any number
        lora_dropout=0.0,
        target_modules=family_of(model.config).projections,
        fan_in_fan_out=model.config.model_type.endswith("gpt2"),  # its Conv1D stores weights transposed
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks for it
        return peft.get_peft_model(model, config)  # type: ignore[return-value] - freezes all but the updates


def merged(trained: nn.Module) -> HedgehogModel:
    """The model itself again, low-rank updates added to the weights."""
    if not isinstance(trained, HedgehogModel):
        trained = trained.merge_and_unload()  # type: ignore[operator]
    assert isinstance(trained, HedgehogModel)
    return trained


def check_peft() -> None:
    """Asked for before stage 1 begins, not hours later."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "finetuning.method=lora needs peft: pip install peft, or choose finetuning.method=full or none"
        ) from error
