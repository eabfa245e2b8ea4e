"""Checkpoints of other libraries into this one's format and back; softmax transformers into linear attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    pass


@app.command()
def mamba3(
    path: Annotated[Path, typer.Argument(help="a released folder (config.json) or a model of this library")],
    out: Annotated[Path, typer.Argument(help="folder to write in the other format")],
    pairing: Annotated[
        str | None, typer.Option(help="rotated lanes of a released checkpoint: adjacent (SISO) or half (MIMO)")
    ] = None,
    a_activation: Annotated[
        str | None, typer.Option(help="heavy_tail (released since June 2026) or softplus (before)")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer to write down; the Llama-3.1 one by default")] = None,
) -> None:
    """A released Mamba-3 checkpoint into a model folder, or a model folder into a released one."""
    from seqmodels.convert.mamba3 import TOKENIZER, ConversionError, from_released, is_released, to_released

    if is_released(path):
        moved = from_released(path, out, pairing=pairing, a_activation=a_activation, tokenizer=tokenizer or TOKENIZER)
    else:
        for option, value in (("--pairing", pairing), ("--a-activation", a_activation), ("--tokenizer", tokenizer)):
            if value is not None:
                raise ConversionError(f"{option} is for released checkpoints; {path} is a model of this library")
        moved = to_released(path, out)
    table = Table("from", "to", "shape", "how", title=f"{path} to {out}: {len(moved)} tensors")
    for entry in moved:
        table.add_row(entry.source, entry.target, " x ".join(map(str, entry.shape)), entry.change)
    Console().print(table)


@app.command()
def hedgehog(
    model: Annotated[str, typer.Argument(help="a Hugging Face GPT-2, BERT, Llama or Mistral: a folder or a hub name")],
    out: Annotated[Path, typer.Argument(help="folder to write; OUT.partial holds an unfinished conversion")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="dotted.key=value, strictly checked, such as finetuning.method=full")
    ] = None,
    data: Annotated[str | None, typer.Option(help="text: a file, a folder, stdlib or hf:NAME[:CONFIG]")] = None,
    kind: Annotated[
        str | None, typer.Option(help="hedgehog (linear alone, the default), hedgehog_window (LoLCATs) or softmax")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the settings")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the conversion in OUT.partial.")] = False,
) -> None:
    """A pretrained softmax transformer into linear attention: distil feature maps, fine-tune, report.

    Settings are those of docs/conversion.md, from --config and key=value, for example
    attention.feature_map=hedgehog_split distillation.steps=2000 data.sequence_length=512.
    """
    from seqmodels.configuration import apply_overrides, convert, load_yaml
    from seqmodels.convert.files import ConversionError

    kinds = ("hedgehog", "hedgehog_window", "softmax")
    if kind not in (None, *kinds):
        raise ConversionError(f"--kind is {kind!r}; expected one of {', '.join(kinds)}")
    values = {} if config is None else load_yaml(config)
    short = [f"{key}={value}" for key, value in (("data.source", data), ("attention.kind", kind)) if value is not None]
    values = apply_overrides({**values, "model": model}, [*short, *(overrides or [])])
    unfinished = out.with_name(f"{out.name}.partial") / "settings.yaml"
    if resume and values == {"model": model} and unfinished.exists():
        values = {**load_yaml(unfinished), "model": model}  # another MODEL is a difference, and refused as one
    if "source" not in values.get("data", {}):
        gone = f" ({unfinished.parent} holds no conversion to go on with)" if resume else ""
        raise ConversionError(f"no text to learn from{gone}; give --data FILE, FOLDER, stdlib or hf:NAME")
    values["data"] = {"tokenizer": "model", "sequence_length": 1024, **values["data"]}

    from seqmodels.convert.hedgehog.progress import Progress
    from seqmodels.convert.hedgehog.run import convert_model
    from seqmodels.convert.hedgehog.settings import ConversionSettings

    convert_model(convert(values, ConversionSettings), out, resume=resume, progress=Progress(Console()))
    Console().print(f"wrote {out}: report.md, and the model for seqmodels.convert.hedgehog.load({str(out)!r})")
