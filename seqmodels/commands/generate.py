"""Continue prompts with a trained model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="a run folder, one of its checkpoints, or a saved model")],
    prompt: Annotated[list[str], typer.Option(help="text to continue; give it several times for a batch")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens after each prompt")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="keep the k most likely tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="keep the most likely tokens up to this probability")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="above 1 discourages tokens that came before")] = 1.0,
    read_twice: Annotated[bool, typer.Option(help="read each prompt twice before continuing it (JRT-Prompt)")] = False,
    short_prompts: Annotated[
        str, typer.Option(help="prefix models, prompts shorter than the prefix: pad, repeat or reencode")
    ] = "pad",
    stop: Annotated[list[str] | None, typer.Option(help="end a text before this string")] = None,
    seed: Annotated[int, typer.Option(help="same seed, same text")] = 0,
    device: Annotated[str, typer.Option(help="auto takes CUDA when there")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="dtype of the weights; as stored when omitted")] = None,
) -> None:
    """Continue prompts with a trained model: one prompt streams, several are continued as a batch."""
    import torch

    from seqmodels.models.initialization import dtype_named
    from seqmodels.models.loading import load_model
    from seqmodels.models.sampling import Sampling
    from seqmodels.models.text_generation import TextGenerator
    from seqmodels.tasks.prompts import repeat_prompt
    from seqmodels.tasks.tokenizer import load_tokenizer

    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(run, device=device, dtype=None if dtype is None else dtype_named(dtype))
    generator = TextGenerator(loaded.model, load_tokenizer(loaded.tokenizer), short_prompts=short_prompts)  # type: ignore[arg-type]
    asked = [repeat_prompt(text) for text in prompt] if read_twice else prompt
    texts = list(prompt)
    single = len(texts) == 1
    if single and texts[0]:
        print(texts[0], end="", flush=True)
    start, steps = time.perf_counter(), 0
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed, "stop": tuple(stop or ())}
    for pieces in generator.stream(asked, **options):
        steps += 1
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        if single:
            print(pieces[0], end="", flush=True)
    seconds = time.perf_counter() - start
    if single:
        print()
    else:
        for index, text in enumerate(texts):
            print(f"--- {index + 1} of {len(texts)}\n{text}")
    rate = (steps - 1) * len(texts) / seconds
    print(f"[{loaded.weights}: {rate:,.0f} tokens a second on {device}]", file=sys.stderr)
