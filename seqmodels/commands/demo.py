"""Train a small hybrid on Python's own source and compare it with compressors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from seqmodels.models import LanguageModel
    from seqmodels.tasks.evaluation import TextScore
    from seqmodels.training.data import TextData

ROOT = Path(__file__).resolve().parents[2]
PROMPT = '''def read_config(path, encoding="utf-8"):
    """Read a configuration file and return a dictionary."""
'''
CONTEXTS = (1_024, 16_384, 131_072, 1_048_576)


def command(
    out: Annotated[Path, typer.Option(help="run folder; a run that is there is continued, not repeated")] = Path(
        "runs/demo"
    ),
    overrides: Annotated[list[str] | None, typer.Argument(help="dotted.key=value over configs/train/demo.yaml")] = None,
) -> None:
    """Train a byte-level hybrid on the standard library's source, then compare and generate.

    Takes minutes on two CPU cores. Run it from a clone: the configurations are in configs/.
    """
    from rich.console import Console

    from seqmodels.tasks.evaluation import score_documents
    from seqmodels.training.config import load_train_config
    from seqmodels.training.loop import train
    from seqmodels.training.plot import plot_losses

    path = ROOT / "configs" / "train" / "demo.yaml"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the demo runs from a clone of the repository")
    console = Console()
    begin = time.perf_counter()
    config = load_train_config(path, overrides)
    console.print(
        f"A hybrid language model learns the source of Python's standard library, byte by byte, on "
        f"the CPU: {config.model.pattern}\nRun folder: {out}\n"
    )
    run, model, data = train(config, out, resume=(out / "config.yaml").exists(), console=console)
    with console.status("Reading the held-out files, each from its first byte to its end, state carried on"):
        score = score_documents(model, *data.held_out)
        coders = _coders(data)
    results = _results(model, score, coders, data, list(run.rows()))
    _show(console, results)
    plot_losses(list(run.rows()), run.path / "loss.png", references={name: coders[name] for name in list(coders)[:3]})
    results["generation"] = _generate(console, model, data)
    results["seconds"] = round(time.perf_counter() - begin, 1)
    (run.path / "results.json").write_text(json.dumps(results, indent=1))
    console.print(f"\n{results['seconds']:.0f} s in all. Curves: {run.path / 'loss.png'}. Go on with")
    console.print(f"  seqmodels generate {run.path} --prompt 'class Stack:'", style="bold", markup=False)


def _coders(data: TextData) -> dict[str, float]:
    """Bits a byte of the others on the held-out files; the first three are drawn in the plot."""
    from seqmodels.tasks.baselines import ByteTrigram, lzma_bits_per_byte, zlib_bits_per_byte

    held_out = _texts(data.held_out[0], data.held_out[1])
    trigram = ByteTrigram(_texts(data.train.cache, data.train.documents))
    sizes = [len(text) for text in held_out]

    def alone(coder: Any) -> float:
        return sum(coder([text]) * size for text, size in zip(held_out, sizes, strict=True)) / sum(sizes)

    return {
        "lzma": lzma_bits_per_byte(held_out),
        "zlib": zlib_bits_per_byte(held_out),
        "byte trigram": trigram.bits_per_byte(held_out),
        "lzma, file by file": alone(lzma_bits_per_byte),
        "zlib, file by file": alone(zlib_bits_per_byte),
    }


def _texts(cache: Any, documents: Any) -> list[bytes]:
    return [cache.document(index)[1:-1].tobytes() for index in documents]


def _results(
    model: LanguageModel, score: TextScore, coders: dict[str, float], data: TextData, rows: list[dict]
) -> dict:
    """All numbers of the tables, by name."""
    from seqmodels.models import LanguageModel, load_config

    # On the meta device: only shapes are needed.
    twin = LanguageModel(load_config(ROOT / "configs" / "models" / "demo-attention.yaml"), device="meta")
    training = [row for row in rows if "tokens_per_second" in row]
    return {
        "parameters": model.num_parameters(),
        "held_out_files": len(data.held_out[1]),
        "held_out_bytes": score.text_bytes,
        "training_bytes": training[-1]["tokens"],
        "corpus_bytes": int(data.train.total_tokens),
        "bits_per_byte": {"this model": score.bits_per_byte, **coders},
        "tokens_per_second": {
            "training": sorted(row["tokens_per_second"] for row in training)[len(training) // 2],
            "reading": score.tokens_per_second,
        },
        "state_bytes": {
            str(length): {"this model": model.state_bytes(length), "attention only": twin.state_bytes(length)}
            for length in CONTEXTS
        },
    }


def _show(console: Console, results: dict) -> None:
    from rich.table import Table

    files, size = results["held_out_files"], results["held_out_bytes"]
    table = Table(
        title=f"Bits per byte on {files} held-out files, {size:,} bytes (lower is better)", title_justify="left"
    )
    table.add_column("coder")
    table.add_column("bits per byte", justify="right")
    table.add_column("compression", justify="right")
    table.add_column("has seen")
    seen = {
        "this model": f"{results['training_bytes'] / 1e6:.1f} MB of the training files, and the file so far",
        "byte trigram": f"all {results['corpus_bytes'] / 1e6:.1f} MB of the training files",
        "lzma": "all held-out files so far, as one stream",
        "zlib": "32 kB before, in one stream",
    }
    ordered = sorted(results["bits_per_byte"].items(), key=lambda item: item[1])
    for name, bits in ordered:
        style = "bold green" if name == "this model" else None
        table.add_row(name, f"{bits:.3f}", f"{8 / bits:.2f} x", seen.get(name, "the file so far"), style=style)
    console.print(table)

    speed = results["tokens_per_second"]
    console.print(
        f"{results['parameters'] / 1e6:.2f} M parameters; {speed['training']:,.0f} tokens/s in training, "
        f"{speed['reading']:,.0f} reading.\n"
    )
    table = Table(title="State of one sequence in bytes, after so many tokens", title_justify="left")
    table.add_column("tokens", justify="right")
    for name in ("this model", "attention only", "ratio"):
        table.add_column(name, justify="right")
    for length, sizes in results["state_bytes"].items():
        ours, theirs = sizes["this model"], sizes["attention only"]
        table.add_row(f"{int(length):,}", f"{ours:,}", f"{theirs:,}", f"{theirs / ours:,.1f}")
    console.print(table)


def _generate(console: Console, model: LanguageModel, data: TextData) -> dict[str, Any]:
    """Streams the body of a function and says how fast it came."""
    from seqmodels.models.sampling import Sampling
    from seqmodels.models.text_generation import TextGenerator

    console.print("\nA function body, as it comes:\n")
    console.print(PROMPT, end="", style="bold", markup=False, highlight=False, soft_wrap=True)
    begin, steps, text = time.perf_counter(), 0, ""
    generator = TextGenerator(model, data.tokenizer)
    sampling = Sampling(temperature=0.5, top_p=0.95)
    options = {"max_new_tokens": 480, "sampling": sampling, "seed": 0, "stop": ("\ndef ", "\nclass ", "\n\n\n")}
    for (piece,) in generator.stream([PROMPT], **options):
        steps += 1
        text += piece
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    rate = steps / (time.perf_counter() - begin)
    console.print(f"\n\n[{rate:,.0f} tokens/s, in constant memory]", markup=False, highlight=False)
    return {"prompt": PROMPT, "text": text, "tokens_per_second": rate}
