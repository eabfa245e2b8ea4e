"""Which cases each suite runs, most important first.

Layers come from the registry: a new one is measured by being in it.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Iterator, Sequence

from evals.throughput.problem import Case
from seqmodels.mixers import MIXERS

SUITES = ("cpu", "gpu")
SLOPE_LENGTHS = (2048, 8192, 32768)


def cases(suite: str) -> list[Case]:
    """The cases of a suite by priority.

    Raises:
        ValueError: an unknown suite.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; expected one of {', '.join(SUITES)}")
    found = {case.name: case for case in (_cpu() if suite == "cpu" else _gpu())}
    return sorted(found.values(), key=lambda case: case.priority)


def select(available: Sequence[Case], wanted: Sequence[str]) -> list[Case]:
    """Cases by full name, by layer or op name, or by pattern (``*mamba3*decode*``).

    Raises:
        ValueError: something that matches nothing, with the nearest names.
    """
    if not wanted:
        return list(available)
    kept: dict[str, Case] = {}
    for text in wanted:
        matching = [case for case in available if text in (case.name, case.layer) or fnmatch.fnmatch(case.name, text)]
        if not matching:
            names = [case.name for case in available] + sorted({case.layer for case in available})
            near = difflib.get_close_matches(text, names, n=3, cutoff=0.3)
            hint = f"did you mean {' or '.join(near)}?" if near else "--list shows all"
            raise ValueError(f"no case is called or matches {text!r}; {hint}")
        kept.update((case.name, case) for case in matching)
    return [case for case in available if case.name in kept]


def recurrent_layers() -> list[str]:
    """Causal layers whose state does not grow with the context: cost must be linear in length."""
    return [name for name in MIXERS.shipped() if _on_meta(name, constant_state=True)]


def layer_options(name: str, d_model: int) -> dict[str, int]:
    """What the constructor asks for beside the width: heads of 64."""
    parameters = inspect.signature(MIXERS[name]).parameters
    needs_heads = "num_heads" in parameters and parameters["num_heads"].default is inspect.Parameter.empty
    return {"num_heads": d_model // 64} if needs_heads else {}


def _on_meta(name: str, *, constant_state: bool) -> bool:
    from seqmodels.models.arguments import build_layer
    from seqmodels.models.initialization import construction

    with construction("meta", None):
        layer = build_layer(name, 128, layer_options(name, 128), name)
    if layer.causality != "causal":
        return False
    return (layer.state_bytes(4096) == layer.state_bytes(8192)) == constant_state


def _layer(name: str, mode: str, dtype: str, batch: int, length: int, d_model: int, priority: int, **options) -> Case:
    rivals = options.pop("rivals", True)
    sizes = {"d_model": d_model, **layer_options(name, d_model), **options}
    return Case("layer", name, mode, dtype, batch, length, sizes, priority, rivals)


def _model(name: str, mode: str, dtype: str, batch: int, length: int, sizes: dict[str, int], priority: int) -> Case:
    return Case("model", name, mode, dtype, batch, length, {**sizes, **layer_options(name, sizes["d_model"])}, priority)


def _cpu() -> Iterator[Case]:
    """float32 and some bfloat16; two layers of width 512, recurrences of 16 heads of 64."""
    float32 = "float32"
    recurrence = {"H": 16, "P": 64, "N": 128}
    for name in ("linear_attention", "mamba3"):
        yield Case("op", name, "forward", float32, 1, 4096, recurrence, 0)
        yield Case("op", name, "forward+backward", float32, 1, 1024, recurrence, 0)
        yield Case("op", name, "forward", "bfloat16", 1, 4096, recurrence, 3)
    yield Case("op", "mamba3", "forward", float32, 1, 1024, {**recurrence, "R": 4}, 2)
    for mode in ("forward", "forward+backward"):
        yield Case("op", "short_conv", mode, float32, 1, 4096, {"C": 1280, "W": 4}, 1)
    yield Case("op", "attention", "forward", float32, 1, 4096, {"H": 8, "P": 64}, 3)
    for name in ("mamba2", "mamba3"):
        yield _layer(name, "forward", float32, 1, 1024, 512, 0)
        yield _layer(name, "forward", float32, 1, 4096, 512, 0)
        yield _layer(name, "forward+backward", float32, 1, 1024, 512, 0)
    small = {"d_model": 512, "layers": 2, "vocab_size": 1024}
    # Late, because its slowest rival takes most of a minute for one sample: batch 4 at length 4096.
    for batch, length, priority in ((1, 1024, 0), (1, 4096, 1), (4, 1024, 1), (4, 4096, 6)):
        for mode in ("forward+backward", "prefill"):
            yield _model("mamba3", mode, float32, batch, length, small, priority)
    yield _model("mamba3", "prefill", "bfloat16", 1, 4096, small, 3)
    for name in ("mamba2", "mamba3", "attention"):
        for batch in (1, 4, 16):
            yield _model(name, "decode", float32, batch, 1024, small, 1)
        for length in (4096, 16384):
            yield _model(name, "decode", float32, 1, length, small, 2)
        yield _model(name, "prefill", float32, 1, 1024, small, 2)
    for name in recurrent_layers():
        for length in SLOPE_LENGTHS:
            yield _layer(name, "forward", float32, 1, length, 256, 3, rivals=False)
        yield _layer(name, "decode", float32, 1, 1024, 256, 4, rivals=False)
    for name in MIXERS.shipped():
        if _on_meta(name, constant_state=True) or _on_meta(name, constant_state=False):
            yield _layer(name, "forward+backward", float32, 1, 1024, 256, 5, rivals=False)

    yield from _state_space_cpu()
    yield from _feature_attention_cpu()
    yield from _hybrid_cpu()


def _hybrid_cpu() -> Iterator[Case]:
    """Sparse global attention beside full attention; the KV shift and a mixture of experts beside what they extend."""
    sparse = {"H": 8, "P": 64, "W": 256, "G": 512, "S": 128}
    experts = {"num_experts": 8, "experts_per_token": 2, "d_hidden": 1024, "chunk_size": 128}
    for mode, priority in (("forward", 1), ("forward+backward", 2)):
        for length in (4096, 16384):
            yield Case("op", "sparse_attention", mode, "float32", 1, length, sparse, priority + 3 * (length > 4096))
        for length in (512, 1024, 4096):
            yield _layer("kv_shift_attention", mode, "float32", 1, length, 512, priority)
        yield Case("layer", "chunk_moe", mode, "float32", 1, 2048, {"d_model": 512, **experts}, priority)


def _feature_attention_cpu() -> Iterator[Case]:
    """The shapes of the Hedgehog and Based papers: heads of 64, and keys of 16 for Taylor."""
    heads = {"H": 8, "P": 64}
    for mode, lengths in (("forward", (4096, 8192)), ("forward+backward", (4096,))):
        for length in lengths:
            yield Case("op", "feature_attention_hedgehog", mode, "float32", 1, length, {**heads, "D": 64}, 1)
            yield Case("op", "feature_attention_taylor", mode, "float32", 1, length, {**heads, "D": 16}, 1)
    for mode in ("forward", "forward+backward"):
        yield Case("op", "linear_attention", mode, "float32", 1, 4096, {**heads, "N": 128, "G": 8}, 1)


def _feature_attention_gpu() -> Iterator[Case]:
    """The protocol of JRT-RNN's table (arXiv:2407.05483, table 5): batch 16, 16 heads of 64, keys of 16, half prefix.

    With the scale and the divisor inside, which the published kernel leaves out; one odd length; Hedgehog at the
    same heads; one sequence of the longest length, which must fill the GPU by itself.
    """
    based, hedgehog = {"H": 16, "P": 64, "D": 16}, {"H": 16, "P": 64, "D": 64}
    cells = [(f"feature_attention_{name}", based) for name in ("taylor", "prefix_taylor")]
    cells.append(("feature_attention_hedgehog", hedgehog))
    for mode, priority in (("forward", 0), ("forward+backward", 1)):
        for name, sizes in cells:
            for length in (2048, 4096, 8191, 8192, 16384, 32768):
                yield Case("op", name, mode, "bfloat16", 16, length, sizes, priority + (length != 32768))
            yield Case("op", name, mode, "bfloat16", 1, 32768, sizes, priority + 1)


def _state_space_cpu() -> Iterator[Case]:
    """Diagonal state-space models beside the plain forms they replace, whose longest calls take seconds: those late."""
    float32 = "float32"
    for mode in ("forward", "forward+backward"):
        for length, priority in ((1024, 1), (4096, 2), (16384, 6)):
            yield Case("op", "vandermonde", mode, float32, 1, length, {"H": 256, "N": 64}, priority)
        yield Case("op", "vandermonde", mode, float32, 1, 4096, {"H": 512, "N": 64}, 6)
        for sizes in ({"C": 1024}, {"C": 1024, "V": 1}):
            yield Case("op", "linear_recurrence", mode, float32, 1, 4096, sizes, 1)
        for batch, length, priority in ((1, 1024, 1), (8, 1024, 2), (1, 4096, 2), (1, 16384, 6)):
            yield _layer("s4d", mode, float32, batch, length, 256, priority)
    for batch, width in ((1, 1024), (16, 256), (16, 1024)):
        yield _layer("s4d", "decode", float32, batch, 1024, width, 4)


def _gpu() -> Iterator[Case]:
    """bfloat16; the shapes of the published tables and of the floors in the performance notes."""
    bfloat16 = "bfloat16"
    attention = {"H": 32, "P": 64, "N": 64, "G": 32}
    recurrence = {"H": 32, "P": 64, "N": 128}
    for mode, priority in (("forward", 0), ("forward+backward", 1)):
        for length in (8192, 2048, 32768):
            late = priority + 2 * (length != 8192)
            yield Case("op", "mamba3", mode, bfloat16, 8, length, recurrence, late)
            yield Case("op", "linear_attention", mode, bfloat16, 8, length, attention, late)
            yield Case("op", "mamba3", mode, bfloat16, 8, length, {**recurrence, "R": 4}, late + 2)
        # 65,536 tokens, 16 heads, keys of 128 and values of 256: the published chunkwise kernels
        for length in (2048, 8192, 32768):
            wide = {"H": 16, "P": 256, "N": 128, "G": 16}
            yield Case("op", "linear_attention", mode, bfloat16, 65536 // length, length, wide, priority + 1)
        yield Case("op", "short_conv", mode, bfloat16, 8, 8192, {"C": 4352, "W": 4}, priority)
        yield Case("op", "attention", mode, bfloat16, 8, 8192, {"H": 16, "P": 128}, priority + 3)
        yield Case("op", "mamba3", mode, bfloat16, 1, 32768, recurrence, priority + 1)
        yield Case("op", "linear_attention", mode, bfloat16, 1, 32768, attention, priority + 1)
    yield from _feature_attention_gpu()
    for mode, priority in (("forward", 2), ("forward+backward", 3)):
        sparse = {"H": 16, "P": 64, "W": 256, "G": 512, "S": 128}
        yield Case("op", "sparse_attention", mode, bfloat16, 8, 16384, sparse, priority)
        yield _layer("kv_shift_attention", mode, bfloat16, 8, 4096, 2048, priority)
        experts = {"num_experts": 8, "experts_per_token": 2, "d_hidden": 1024, "chunk_size": 128}
        yield Case("layer", "chunk_moe", mode, bfloat16, 8, 4096, {"d_model": 2048, **experts}, priority)
    for mode, priority in (("forward", 2), ("forward+backward", 3)):
        for sizes in ({"C": 1024}, {"C": 1024, "V": 1}):
            yield Case("op", "linear_recurrence", mode, "float32", 8, 8192, sizes, priority)
        yield Case("op", "vandermonde", mode, "float32", 1, 16384, {"H": 512, "N": 64}, priority)
        for length in (1024, 8192):
            yield _layer("s4d", mode, "float32", 8, length, 512, priority)
        yield _layer("s4d", mode, "float32", 1, 16384, 512, priority)
    for name in ("mamba3", "mamba2"):
        for batch in (128, 1):
            yield _layer(name, "decode", bfloat16, batch, 1024, 2048, 1)
        yield _layer(name, "forward", bfloat16, 8, 2048, 2048, 1)
        yield _layer(name, "forward+backward", bfloat16, 8, 2048, 2048, 2)
        yield _layer(name, "forward", bfloat16, 1, 128, 2048, 3)
    large = {"d_model": 2048, "layers": 24, "vocab_size": 32768}
    for name in ("mamba3", "mamba2"):
        for batch in (1, 128):
            yield _model(name, "decode", bfloat16, batch, 1024, large, 3)
        yield _model(name, "prefill", bfloat16, 8, 2048, large, 4)
    for name in recurrent_layers():
        for length in SLOPE_LENGTHS:
            yield _layer(name, "forward", bfloat16, 2, length, 1024, 5, rivals=False)
        for length in (1024, 16384):
            yield _layer(name, "decode", bfloat16, 16, length, 1024, 6, rivals=False)
