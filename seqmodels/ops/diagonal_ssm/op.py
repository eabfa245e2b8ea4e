"""The public functions of the diagonal SSM: equation, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels import backends
from seqmodels.layout import Layout
from seqmodels.ops.registration import Operator

_PACKAGE = "seqmodels.ops.diagonal_ssm"
_DTYPES = (torch.float64, torch.float32)
_MOST_MODES = 64  # of all rows together: from about 100 on transforms take less time on a CPU
_MOST_MODES_GPU = 128  # of all rows together, by the count of bytes


def diagonal_ssm(
    u: Tensor,
    z: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    layout: Layout | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""A diagonal state-space model of one input a head, for each head h of a document:

    .. code-block:: text

        x[t, n] = e^{z[n]} x[t-1, n] + b[n] u[t],    x[-1] = initial_state (zeros when None)
        y[t, r] = sum_n Re(c[r, n] x[t, n]) + skip[r] u[t]

    the same map as a convolution with K[r, l] = sum_n Re(c[r, n] b[n] e^{l z[n]}), without its kernel or a transform:
    inside a chunk of tokens a recurrence (C++) or products with small matrices (Triton, PyTorch), between chunks the
    state.
    With ``reverse`` time runs from each document's end and a token does not see itself,

    .. code-block:: text

        y[t, r] = sum_{j >= 0} K[r, j] u[t + 1 + j]

    the second half of a bidirectional layer. Complex values are real tensors with a trailing dimension of 2 (real part,
    imaginary part), as ``torch.view_as_real`` gives them; so are their gradients (dL/dRe, dL/dIm).

    Section 3 of Gu, Gupta, Goel and Ré, "On the parameterization and initialization of diagonal state space models".

    Args:
        u: (batch, length, heads), float32 or float64.
        z: (heads, modes, 2), float64 for exact phases; float32 is taken as exact.
        b: (heads, modes, 2), in u's dtype.
        c: (heads, modes, 2) or (rows, heads, modes, 2), in u's dtype; 2 c where conjugates are left out.
        skip: (heads,) or (rows, heads), as c; None: 0.
        initial_state: (documents, heads, modes, 2), in u's dtype.
        layout: documents. None: one document a row.
        reverse: from the end; no states and no skip then.

    Returns:
        y (batch, length, heads), or (batch, length, rows, heads) for c with rows, zero outside documents; and each
        document's last state (documents, heads, modes, 2), None with ``reverse``.

    Raises:
        ValueError: shapes that do not fit together; a state or a skip beside ``reverse``.
        TypeError: another dtype, or two of them.
    """
    if u.dim() != 3 or u.shape[1] < 1:
        raise ValueError(
            f"diagonal_ssm: u has shape {tuple(u.shape)}; expected (batch, length, heads) with at least one token. "
            "For one token at a time call diagonal_ssm_step."
        )
    heads = u.shape[2]
    _check_system("diagonal_ssm", heads, z, b, c, skip)
    if layout is not None and (layout.batch_size, layout.length) != u.shape[:2]:
        raise ValueError(
            f"diagonal_ssm: layout is for a grid of {(layout.batch_size, layout.length)}; "
            f"u is {tuple(u.shape[:2])} (batch, length)"
        )
    documents = u.shape[0] if layout is None else layout.num_documents
    if initial_state is not None and initial_state.shape != (documents, *z.shape):
        raise ValueError(
            f"diagonal_ssm: initial_state has shape {tuple(initial_state.shape)}; expected {(documents, *z.shape)} "
            "(documents, heads, modes, 2)"
        )
    if reverse and (skip is not None or initial_state is not None):
        raise ValueError("diagonal_ssm: reverse=True takes neither skip nor initial_state; pass None for both")
    _check_dtypes("diagonal_ssm", u, b=b, c=c, skip=skip, initial_state=initial_state)
    rows = c if c.dim() == 4 else c.unsqueeze(0)
    direct = u.new_zeros(rows.shape[:2]) if skip is None else skip.view(rows.shape[:2])
    starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
    y, final_state = _operator(u, z.double(), b, rows, direct, initial_state, starts, lengths, reverse)
    return y if c.dim() == 4 else y.squeeze(2), None if reverse else final_state


@torch.no_grad()
def diagonal_ssm_step(decay: Tensor, b: Tensor, c: Tensor, skip: Tensor, u_t: Tensor, state: Tensor) -> Tensor:
    """One token of :func:`diagonal_ssm`; no gradient.

    .. code-block:: text

        state <- decay state + b u_t (in place),    y[r] = sum_n (c[r, n, 0] Re state[n] + c[r, n, 1] Im state[n])
                                                           + skip[r] u_t

    Args:
        decay: (heads, modes, 2), e^z.
        b: (heads, modes, 2).
        c: (rows, heads, modes, 2) with the signs of the sum: (Re c, -Im c).
        skip: (rows, heads).
        u_t: (batch, heads), float32 or float64 as all others.
        state: (batch, heads, modes, 2), contiguous, in u_t's dtype.

    Returns:
        (batch, rows, heads).

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: another dtype, or two of them.
    """
    if u_t.dim() != 2 or c.dim() != 4:
        raise ValueError(
            f"diagonal_ssm_step: u_t has shape {tuple(u_t.shape)} and c {tuple(c.shape)}; expected (batch, heads) and "
            "(rows, heads, modes, 2)"
        )
    _check_system("diagonal_ssm_step", u_t.shape[1], decay, b, c, skip)
    if state.shape != (u_t.shape[0], *decay.shape) or not state.is_contiguous():
        raise ValueError(
            f"diagonal_ssm_step: state has shape {tuple(state.shape)} and strides {state.stride()}; expected a "
            f"contiguous {(u_t.shape[0], *decay.shape)} (batch, heads, modes, 2)"
        )
    _check_dtypes("diagonal_ssm_step", u_t, decay=decay, b=b, c=c, skip=skip, state=state)
    return _step_operator(u_t, decay, b, c, skip, state)


def pays_off(u: Tensor, modes: int, rows: int, layout: Layout | None = None) -> bool:
    """Whether to run :func:`diagonal_ssm` rather than the kernel and transforms of ``long_conv``, in float32.

    CPU, with the C++ kernels: up to 64 modes * rows. Time a token grows with them here and with the logarithm of the
    length there; measured, the scan is ahead up to about 100 modes at length 1024, more at longer ones.

    GPU, with the Triton kernels, by bytes of device memory for each token and head. For M modes of R rows the scan
    moves up to 12 R ceil(M / 32) forward and as many for the gradient to u, 8 R + (8 R + 4) ceil(M / 16) for those of
    the constants, and a quarter more where time is cut; transforms about 70 forward and 140 backward. So up to
    R M = 128, where M = 64 and R = 2 come to 184 (230 cut) against 210. Operations do not decide: 3 (32 + 8 M)
    a row on the matrix units take less time than the bytes. Counted, not timed: no GPU was at hand.

    Other devices and kernels, by bytes: products over chunks move about 76 for each element, transforms about 70, but
    transforms are padded to the whole grid's length for every group of ``batch`` documents. So: with packed documents,
    two a row or more in the mean.

    In float64, and in plain PyTorch on a CPU, transforms are taken: products cost what they do there.
    """
    if u.dtype != torch.float32:
        return False
    if u.device.type == "cuda" and modes * rows <= _MOST_MODES_GPU and _allowed("triton"):
        return True
    if u.device.type != "cpu":
        return layout is not None and layout.num_documents >= 2 * layout.batch_size
    if modes * rows > _MOST_MODES:
        return False
    return _allowed("cpu")


def _allowed(backend: str) -> bool:
    return backends.requested_backend() in ("auto", backend) and _installed(backend)


def _installed(backend: str) -> bool:
    return backends.missing(backend) is None


# What torch._dynamo.assume_constant_result sets, without importing it: a compiler calls this and keeps the answer,
# instead of tracing how an extension is looked for.
_installed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_system(owner: str, heads: int, z: Tensor, b: Tensor, c: Tensor, skip: Tensor | None) -> None:
    if z.dim() != 3 or z.shape[0] != heads or z.shape[2] != 2:
        raise ValueError(
            f"{owner}: z has shape {tuple(z.shape)}; expected ({heads}, modes, 2): real and imaginary parts last "
            "(torch.view_as_real)"
        )
    if b.shape != z.shape:
        raise ValueError(f"{owner}: b has shape {tuple(b.shape)}; expected {tuple(z.shape)} as z")
    if c.dim() not in (3, 4) or c.shape[-3:] != z.shape:
        raise ValueError(
            f"{owner}: c has shape {tuple(c.shape)}; expected {tuple(z.shape)} or (rows, "
            f"{', '.join(map(str, z.shape))})"
        )
    if skip is not None and skip.shape != c.shape[:-2]:
        raise ValueError(f"{owner}: skip has shape {tuple(skip.shape)}; expected {tuple(c.shape[:-2])} for c")


def _check_dtypes(owner: str, u: Tensor, **others: Tensor | None) -> None:
    if u.dtype not in _DTYPES:
        raise TypeError(f"{owner}: the input is {u.dtype}; expected float32 or float64 (states are never narrower)")
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != u.dtype:
            raise TypeError(f"{owner}: {name} is {tensor.dtype} beside an input of {u.dtype}; expected {u.dtype}")


def _fake(
    u: Tensor,
    z: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    documents = u.shape[0] if starts is None else starts.shape[0]
    return u.new_empty((*u.shape[:2], c.shape[0], u.shape[2])), u.new_empty((documents, *z.shape))


_operator = Operator(
    "diagonal_ssm",
    "Tensor u, Tensor z, Tensor b, Tensor c, Tensor skip, Tensor? initial_state, Tensor? starts, Tensor? lengths, "
    "bool reverse",
    outputs=2,
    fake=_fake,
    modules={name: f"{_PACKAGE}.{name}" for name in ("reference", "torch", "cpu", "triton")},
    differentiable=(0, 1, 2, 3, 4, 5),
)
_step_operator = Operator(
    "diagonal_ssm_step",
    "Tensor u_t, Tensor decay, Tensor b, Tensor c, Tensor skip, Tensor(a!) state",
    outputs=1,
    fake=lambda u_t, decay, b, c, skip, state: u_t.new_empty((u_t.shape[0], *c.shape[:2])),
    modules={name: f"{_PACKAGE}.{name}_step" for name in ("reference", "torch", "cpu")},
)
