"""``OUT.partial``: the folder of a conversion under way, and whose it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from seqmodels.configuration import convert, differences, dump_yaml, load_yaml
from seqmodels.convert.files import ConversionError
from seqmodels.convert.hedgehog.settings import ConversionSettings
from seqmodels.training.checkpoint import list_checkpoints, remove_leftovers


def open_work(final: Path, settings: ConversionSettings, resume: bool) -> Path:
    """``OUT.partial`` with the settings in it; one without a checkpoint is as good as none."""
    work = final.with_name(f"{final.name}.partial")
    path = work / "settings.yaml"
    if path.exists() and list_checkpoints(work):
        if not resume:
            raise ConversionError(
                f"{work} holds an unfinished conversion; go on with it (--resume), delete it, or name another OUT"
            )
        changed = differences(_binding(load_settings(path)), _binding(settings))
        if changed:
            raise ConversionError(
                f"{work} holds a conversion with other settings; in it, against those given:\n  "
                + "\n  ".join(changed)
                + "\nGo on with its own settings, or name another OUT"
            )
        remove_leftovers(work)
        return work
    work.mkdir(parents=True, exist_ok=True)
    temporary = work / ".settings.yaml"
    temporary.write_text(dump_yaml(settings))
    temporary.replace(path)
    return work


def load_settings(path: Path) -> ConversionSettings:
    """Settings from a YAML file."""
    return convert(load_yaml(path), ConversionSettings)


def _binding(settings: ConversionSettings) -> dict[str, Any]:
    """The settings that decide a number of the result."""
    free = {"device", "checkpoint_every"}
    return {name: value for name, value in msgspec.to_builtins(settings).items() if name not in free}
