"""A small memory of slots that a document writes segment by segment and reads from the next segment on."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput, ParameterHint, check_positive
from seqmodels.mixers.workspace_segments import FLOOR, Sums, cut, gather, mean, open_segments, segments
from seqmodels.ops.documents import AlignedBlocks, aligned_blocks
from seqmodels.ops.linear_recurrence import linear_recurrence
from seqmodels.ops.registration import state_dtype
from seqmodels.state import State


class WorkspaceState(State):
    """The slots, and what the open segment has gathered for them so far."""

    slots: Tensor  # (batch, slots, d_model)
    largest: Tensor  # (batch, slots), the largest write score, -1e30 before the first
    mass: Tensor  # (batch, slots), sum of exp(score - largest)
    gathered: Tensor  # (batch, slots, rank), the same sum of the gated values
    position: Tensor  # (batch,) int64


class Workspace(Mixer):
    r"""Slots W (num_slots, d_model) that segment c reads as its predecessors left them.

    .. code-block:: text

        read    q = W_q u_t,  k_m = W_k N(W_c[m]),  v_m = W_v N(W_c[m])
                y_t = sigmoid(w_r . u_t - 2) W_o sum_m softmax_m(q . k_m / sqrt(rank)) v_m
        write   l[m, t] = A_m . (W_k2 u_t) / sqrt(rank),    a = softmax of l over the segment's tokens
                candidate[m] = W_o2 sum_t a[m, t] sigmoid(w_w . u_t - 1) (W_v2 u_t)
                e_m = logsumexp_t l[m, t] - log segment,    z_m = sigmoid(e_m - 2) for the ``active`` largest e, else 0
                W_{c+1}[m] = (1 - z_m) W_c[m] + z_m candidate[m]

    with N a root mean square norm and W_0 learned. What is written does not depend on W, so the segments are
    a diagonal linear recurrence; a token sees completed segments alone, so the layer is causal. W is
    carried in the state from window to window of a document and is W_0 where a document begins
    (Hydra, arXiv:2508.15099, names a workspace; these equations are ours).

    Args:
        d_model: width.
        num_slots: slots.
        rank: width of queries, keys and values.
        active: slots that a segment may write.
        segment: tokens of a segment, counted from the document's first.
        address_std: standard deviation of the first addresses A, and with it how sharply slots choose tokens
            before anything is learned. With a unit normal u and ``nn.Linear``'s initial W_k2 the scores l begin with
            a deviation of 0.58 ``address_std``. A token that is alone among n must exceed the others by log n to
            hold half of a slot: 4.9 for 128, that is 0.75 deviations of a difference at 8 and 6 at 1, where slots
            begin as means over the segment, in which a fact named once is hardly seen: it is learned later, and not
            by every seed (measured in ``evals.hydra``).

    State: float32; see :class:`WorkspaceState`.

    ``aux``: ``read_gate`` and ``write_gate``, means over the tokens; ``update``, the mean of z over the whole segments
    that were written: rows without state and layout do not write their last one unless a state is returned.

    Raises:
        ValueError: sizes below 1, or more active slots than there are.
    """

    parameter_hints: ClassVar[dict[str, ParameterHint]] = {
        "initial_slots": ParameterHint(weight_decay=0.0),
        "addresses": ParameterHint(weight_decay=0.0),  # their size is how sharply slots choose
    }
    residual_outputs: ClassVar[tuple[str, ...]] = ("read_out.weight",)

    def __init__(
        self,
        d_model: int,
        *,
        num_slots: int = 64,
        rank: int = 128,
        active: int = 32,
        segment: int = 128,
        address_std: float = 8.0,
    ) -> None:
        super().__init__(d_model)
        name = type(self).__name__
        check_positive(name, num_slots=num_slots, rank=rank, active=active, segment=segment)
        if active > num_slots:
            raise ValueError(f"{name}: active is {active} of num_slots={num_slots}; expected at most all")
        if not 0 < address_std < math.inf:
            raise ValueError(f"{name}: address_std is {address_std}; expected a positive finite number")
        self.address_std = address_std
        self.num_slots, self.rank, self.active, self.segment = num_slots, rank, active, segment
        self.read_query = nn.Linear(d_model, rank, bias=False)
        self.read_key = nn.Linear(d_model, rank, bias=False)
        self.read_value = nn.Linear(d_model, rank, bias=False)
        self.read_out = nn.Linear(rank, d_model, bias=False)
        self.write_key = nn.Linear(d_model, rank, bias=False)
        self.write_value = nn.Linear(d_model, rank, bias=False)
        self.write_out = nn.Linear(rank, d_model, bias=False)
        self.read_gate = nn.Linear(d_model, 1, bias=False)
        self.write_gate = nn.Linear(d_model, 1, bias=False)
        self.initial_slots = nn.Parameter(torch.empty(num_slots, d_model))
        self.addresses = nn.Parameter(torch.empty(num_slots, rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws W_0 from N(0, 0.01^2) and the addresses from N(0, address_std^2)."""
        self.initial_slots.normal_(std=0.01)
        self.addresses.normal_(std=self.address_std)

    def forward(
        self,
        x: Tensor,
        state: WorkspaceState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        if state is None and layout is None:
            return self._from_the_start(x, return_state)
        documents = x.shape[0] if layout is None else layout.num_documents
        if state is not None:
            self.check_state(state, documents)
        before = self._initial(documents, x.dtype) if state is None else self._from(state)
        starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
        blocks = aligned_blocks(starts, lengths, before.position, x.shape[0], x.shape[1], self.segment)
        flat = x.flatten(0, 1)
        held = blocks.token >= 0
        rows = torch.where(held[..., None], flat[blocks.token.clamp_min(0)], 0)  # (blocks, segment, d_model)
        write_gate = self._write_gate(rows)
        score, value = self._write(rows, write_gate)
        past = Sums(before.largest, before.mass, before.gathered)
        sums = gather(score, value, held, open_segments(past, before.position, blocks, self.segment))
        whole = blocks.filled.all(1)
        keep, update = self._update(sums, whole)
        after, _ = linear_recurrence(
            keep[..., None].expand_as(update).flatten(1)[None], update.flatten(1)[None],
            initial_state=before.slots.flatten(1), layout=segments(blocks, before.position),
        )  # fmt: skip
        after = after[0].view_as(update)
        slots = torch.where(
            blocks.first[:, None, None], before.slots[blocks.document], torch.cat([after[:1], after[:-1]])
        )
        read_gate = self._read_gate(rows)
        y = self._read(rows, slots, read_gate)
        picked = y.flatten(0, 1)[blocks.slot_of_token.clamp_min(0)]
        valid = blocks.slot_of_token >= 0
        y = torch.where(valid[:, None], picked, 0).view(x.shape)
        aux = {
            "read_gate": mean(read_gate, held),
            "write_gate": mean(write_gate, held),
            "update": mean(1 - keep, (whole & blocks.used)[:, None].expand_as(keep)),
        }
        final = None
        if return_state:
            lengths = torch.full_like(before.position, x.shape[1]) if lengths is None else lengths
            final = self._after(before, blocks, sums, after, whole, lengths)
        return MixerOutput(y, final, aux)

    @torch.no_grad()
    def step(self, x_t: Tensor, state: WorkspaceState) -> Tensor:
        y = self._read_one(x_t, state.slots)
        score, value = self._write(x_t, self._write_gate(x_t))
        largest = torch.maximum(state.largest, score)
        old, new = (state.largest - largest).exp(), (score - largest).exp()
        mass = state.mass * old + new
        gathered = state.gathered * old[..., None] + new[..., None] * value.unsqueeze(1)
        state.position += 1
        ends = (state.position % self.segment == 0)[:, None]
        # Only where a segment ends is anything written, which is free to know on the CPU alone.
        if not _is_at_hand(x_t) or bool(ends.any()):
            keep, update = self._update(Sums(largest, mass, gathered), ends[:, 0])
            state.slots.copy_(keep[..., None] * state.slots + update)
        state.largest.copy_(torch.where(ends, FLOOR, largest))
        state.mass.copy_(torch.where(ends, 0, mass))
        state.gathered.copy_(torch.where(ends[..., None], 0, gathered))
        return y

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WorkspaceState:
        check_positive(type(self).__name__, batch_size=batch_size)
        # Made where it is wanted: the meta device, on which each given state is checked, holds nothing.
        initial = self._initial(batch_size, dtype or self.initial_slots.dtype, device).detach()
        return initial.map(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))

    def flops(self, length: int) -> int:
        per_token = 4 * self.d_model * self.rank + 4 * self.num_slots * self.rank  # as counted in MACs: q, o, k2, v2
        return 2 * (
            length * per_token + math.ceil(length / self.segment) * self.num_slots * 3 * self.d_model * self.rank
        )

    def _from_the_start(self, x: Tensor, return_state: bool) -> MixerOutput:
        """Rows that begin documents: segments are slices, and the first segments of all rows read W_0 as one matrix.

        The last segment is written for the state alone. Without a segment that is read all the same operations
        run on no segment: each weight meets a gradient (of zeros), as data-parallel training expects.
        """
        batch, length, size = x.shape[0], x.shape[1], self.segment
        closed = (length - 1) // size  # segments that a later token of these reads
        before = self._initial(batch, x.dtype)
        read_gate, write_gate = self._read_gate(x), self._write_gate(x)
        written = length if return_state else closed * size
        score, value = self._write(x[:, :written], write_gate[:, :written])
        sums = gather(cut(score[:, : closed * size], size), cut(value[:, : closed * size], size))
        keep, update = self._update(sums)
        slots = update  # (batch, closed, num_slots, d_model)
        if closed:
            slots, _ = linear_recurrence(
                keep[..., None].expand_as(update).flatten(2), update.flatten(2), initial_state=before.slots.flatten(1)
            )
            slots = slots.view_as(update)
        first = self._read(x[:, :size], before.slots[0], read_gate[:, :size])
        later = self._read(cut(x[:, size:], size), slots, cut(read_gate[:, size:], size)).flatten(1, 2)
        y = torch.cat([first, later[:, : length - first.shape[1]]], 1)
        final, updates = None, 1 - keep.flatten(1)
        if return_state:
            last = slots[:, -1] if closed else before.slots
            sums = gather(score[:, closed * size :], value[:, closed * size :])
            if length % size == 0:
                keep, update = self._update(sums)
                last, updates = keep[..., None] * last + update, torch.cat([updates, 1 - keep], 1)
                sums = Sums(before.largest, before.mass, before.gathered)
            last = last.clone(memory_format=torch.contiguous_format)
            final = WorkspaceState(last, *sums, before.position + length)
        aux = {
            "read_gate": read_gate.mean(),
            "write_gate": write_gate.mean(),
            "update": updates.sum() / max(updates.numel(), 1),
        }
        return MixerOutput(y, final, aux)

    def _initial(self, documents: int, dtype: torch.dtype, device: torch.device | str | None = None) -> WorkspaceState:
        carried, device = state_dtype(dtype), self.initial_slots.device if device is None else device
        sums = torch.zeros(documents, self.num_slots, dtype=carried, device=device)
        return WorkspaceState(
            self.initial_slots.to(device, carried).expand(documents, -1, -1),
            sums + FLOOR,
            sums,
            torch.zeros(documents, self.num_slots, self.rank, dtype=carried, device=device),
            torch.zeros(documents, dtype=torch.int64, device=device),
        )

    def _from(self, state: WorkspaceState) -> WorkspaceState:
        """The state to go on from. Before its first token a document has W_0 itself, with its gradient: in a state of
        :meth:`init_state` it is a copy, from which W_0 would never learn."""
        begins = (state.position == 0)[:, None, None]
        slots = torch.where(begins, self.initial_slots.to(state.slots.dtype), state.slots)
        return WorkspaceState(slots, state.largest, state.mass, state.gathered, state.position)

    def _read_gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.read_gate(x).squeeze(-1) - 2)

    def _write_gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.write_gate(x).squeeze(-1) - 1)

    def _read(self, rows: Tensor, slots: Tensor, gate: Tensor) -> Tensor:
        """What rows (..., tokens, d_model) with their gates (..., tokens) read in slots (..., num_slots, d_model)."""
        normed = rms_norm(slots, (self.d_model,)).to(rows.dtype)
        key, value = self.read_key(normed), self.read_value(normed)
        logits = self.read_query(rows) @ key.mT / math.sqrt(self.rank)
        read = logits.softmax(-1, dtype=state_dtype(rows.dtype)).to(value.dtype) @ value
        return gate[..., None] * self.read_out(read)

    def _read_one(self, x_t: Tensor, slots: Tensor) -> Tensor:
        """:meth:`_read` of one token a row, (batch, d_model). The query goes back through W_k and the mean of the slots
        through W_v, so that no keys and values of the slots are made for it: about rank times fewer products."""
        normed = rms_norm(slots, (self.d_model,)).to(x_t.dtype)
        query = self.read_query(x_t) @ self.read_key.weight / math.sqrt(self.rank)
        weight = (normed @ query.unsqueeze(-1).to(normed.dtype)).softmax(-2, dtype=state_dtype(x_t.dtype))
        read = self.read_value((weight.to(normed.dtype).mT @ normed).squeeze(-2))
        return self._read_gate(x_t)[:, None] * self.read_out(read)

    def _write(self, rows: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (..., slots) and gated values (..., rank) in float32, of rows with their gates."""
        dtype = state_dtype(rows.dtype)
        key = self.write_key(rows).to(dtype)
        with torch.autocast(rows.device.type, enabled=False):
            score = key @ self.addresses.to(dtype).T / math.sqrt(self.rank)
        return score, (gate[..., None] * self.write_value(rows)).to(dtype)

    def _update(self, sums: Sums, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """1 - z (..., slots) and z candidate (..., slots, d_model); z = 0 for a segment that is not ``whole``."""
        mass = sums.mass.clamp_min(torch.finfo(sums.mass.dtype).tiny)
        evidence = sums.largest + mass.log() - math.log(self.segment)
        # A stable sort: equal evidence gives the same slots (the first) in every shape and on every device.
        best = evidence.sort(dim=-1, descending=True, stable=True).indices[..., : self.active]
        chosen = torch.zeros_like(evidence).scatter(-1, best, 1.0)
        z = torch.sigmoid(evidence - 2) * chosen
        if whole is not None:
            z = z * whole[..., None]
        with torch.autocast(mass.device.type, enabled=False):
            candidate = (sums.gathered / mass[..., None]) @ self.write_out.weight.to(mass.dtype).T
        return 1 - z, z[..., None] * candidate

    def _after(
        self,
        before: WorkspaceState,
        blocks: AlignedBlocks,
        sums: Sums,
        after: Tensor,
        whole: Tensor,
        lengths: Tensor,
    ) -> WorkspaceState:
        last, empty = blocks.last, lengths == 0
        ended = whole[last]

        def pick(new: Tensor, old: Tensor, closed: float | None = None) -> Tensor:
            shape = (-1, *[1] * (old.dim() - 1))
            value = new[last] if closed is None else torch.where(ended.view(shape), closed, new[last])
            return torch.where(empty.view(shape), old, value)

        return WorkspaceState(
            pick(after, before.slots),
            pick(sums.largest, before.largest, FLOOR),
            pick(sums.mass, before.mass, 0.0),
            pick(sums.gathered, before.gathered, 0.0),
            before.position + lengths,
        )


def _is_at_hand(x: Tensor) -> bool:
    """Whether values can be looked at without a wait or a graph break."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor
