"""State in and out of a diagonal SSM that runs as a convolution: sums over tokens of documents.

Built from the Vandermonde products, so they run on every backend and no tensor of heads x
states x length is made. Packed documents are cut into chunks; a chunk is one row of the
product, and e^{(first position) z} carries it to its place in the document.

D documents, B rows of the grid, L columns, H heads, N states, T chunks of Q tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.documents import chunk_table
from seqmodels.ops.vandermonde.op import vandermonde, vandermonde_adjoint
from seqmodels.ops.vandermonde.powers import powers

_CHUNK = 128


def diagonal_response(
    z: Tensor, weight: Tensor, length: int | None = None, *, scale: float = 1.0, layout: Layout | None = None
) -> Tensor:
    r"""What a state that decays from each document's first token on adds to the outputs:

    .. code-block:: text

        y[t, h] = scale * Re sum_n weight[d, h, n] e^{p z[h, n]},   p = position of token t in document d

    The initial state s of a diagonal SSM, s[-1], gives weight = C * e^z * s.

    Args:
        z: (heads, states, 2).
        weight: (documents, heads, states, 2).
        length: columns of the grid; needed without a layout, where each row is one document.
        scale: factor of the sum (2 where conjugates are left out).
        layout: documents.

    Returns:
        (batch, length, heads), zero outside documents; float64 if weight is float64, else float32.

    Raises:
        ValueError: shapes that do not fit together, or neither length nor layout.
    """
    if weight.dim() != 4:
        raise ValueError(
            f"diagonal_response: weight has shape {tuple(weight.shape)}; expected (documents, heads, states, 2)"
        )
    if layout is None:
        if length is None:
            raise ValueError("diagonal_response: length is None without a layout; give the number of tokens")
        return vandermonde(z, weight, length, scale=scale).transpose(1, 2).contiguous()
    if weight.shape[0] != layout.num_documents:
        raise ValueError(
            f"diagonal_response: weight has {weight.shape[0]} rows; expected {layout.num_documents}, one for each "
            "document slot"
        )
    tokens = layout.batch_size * layout.length
    size = min(_CHUNK, layout.length)
    table = chunk_table(layout.starts, layout.lengths, tokens, size)
    begins_T = torch.where(table.valid[:, 0], table.token[:, 0] - layout.starts[table.document], 0)
    weight_THN = _product(powers(z, begins_T), weight[table.document]).to(weight.dtype)
    values_THQ = vandermonde(z, weight_THN, size, scale=scale)
    target = torch.where(table.valid, table.token, tokens).flatten()  # one row more takes what is no token
    y = values_THQ.new_zeros(tokens + 1, z.shape[0])
    y = y.index_copy(0, target, values_THQ.transpose(1, 2).flatten(0, 1))
    return y[:tokens].view(layout.batch_size, layout.length, -1)


def diagonal_final_state(
    z: Tensor,
    x: Tensor,
    *,
    input_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    layout: Layout | None = None,
) -> Tensor:
    r"""Last state of s[t, h, n] = e^{z[h, n]} s[t-1, h, n] + input_weight[h, n] x[t, h], none between:

    .. code-block:: text

        s[d, h, n] = e^{T z} initial_state + input_weight sum_{p < T} e^{(T - 1 - p) z} x[p, h]

    with T the number of tokens in document d.

    Args:
        z: (heads, states, 2).
        x: (batch, length, heads), real.
        input_weight: (heads, states, 2), the discretised B; None: 1.
        initial_state: (documents, heads, states, 2) or None (zeros).
        layout: documents; None: one document a row.

    Returns:
        (documents, heads, states, 2); float64 if x is float64, else float32.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x.dim() != 3 or x.shape[2] != z.shape[0]:
        raise ValueError(
            f"diagonal_final_state: x has shape {tuple(x.shape)}; expected (batch, length, {z.shape[0]}) for z "
            f"{tuple(z.shape)}"
        )
    x = x if x.dtype == torch.float64 else x.float()
    if layout is None:
        state = vandermonde_adjoint(z, x.flip(1).transpose(1, 2))
        sizes = torch.full((x.shape[0],), x.shape[1], device=x.device)
    else:
        if (layout.batch_size, layout.length) != x.shape[:2]:
            raise ValueError(
                f"diagonal_final_state: layout is for a grid of {(layout.batch_size, layout.length)}; "
                f"x is {tuple(x.shape[:2])} (batch, length)"
            )
        state = _packed_final_state(z, x, layout)
        sizes = layout.lengths
    if input_weight is not None:
        if input_weight.shape != z.shape:
            raise ValueError(
                f"diagonal_final_state: input_weight has shape {tuple(input_weight.shape)}; expected {tuple(z.shape)}"
            )
        state = _product(input_weight, state).to(state.dtype)
    if initial_state is None:
        return state
    if initial_state.shape != state.shape:
        raise ValueError(
            f"diagonal_final_state: initial_state has shape {tuple(initial_state.shape)}; expected {tuple(state.shape)}"
        )
    return state + _product(powers(z, sizes), initial_state).to(state.dtype)


def _packed_final_state(z: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Chunks are counted from the end of each document, so that only the first tokens' chunk is partial."""
    size = min(_CHUNK, layout.length)
    table = chunk_table(layout.starts, layout.lengths, layout.batch_size * layout.length, size)
    start_T, length_T = layout.starts[table.document], layout.lengths[table.document]
    behind_TQ = table.token - start_T[:, None]  # tokens behind this one in its document, read backwards
    source = torch.where(table.valid, start_T[:, None] + length_T[:, None] - 1 - behind_TQ, 0)
    values_TQH = torch.where(table.valid.unsqueeze(-1), x.flatten(0, 1)[source], 0)
    parts_THN = vandermonde_adjoint(z, values_TQH.transpose(1, 2))
    begins_T = torch.where(table.valid[:, 0], behind_TQ[:, 0], 0)
    parts_THN = _product(powers(z, begins_T), parts_THN).to(parts_THN.dtype)
    counts = (layout.lengths + size - 1) // size
    # A document's chunks stand behind one another; unused slots come last and belong to no segment.
    return torch.segment_reduce(parts_THN, "sum", lengths=counts, axis=0, unsafe=True, initial=0.0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex numbers given as pairs."""
    (a_real, a_imaginary), (b_real, b_imaginary) = a.unbind(-1), b.unbind(-1)
    real = a_real * b_real - a_imaginary * b_imaginary
    return torch.stack((real, a_real * b_imaginary + a_imaginary * b_real), -1)
