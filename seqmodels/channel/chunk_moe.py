"""A mixture of SwiGLU experts that is routed once a chunk, from the past alone."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, MixerOutput, check_positive
from seqmodels.ops.documents import AlignedBlocks, aligned_blocks
from seqmodels.ops.grouped_linear import grouped_linear
from seqmodels.ops.registration import state_dtype
from seqmodels.ops.swiglu import swiglu
from seqmodels.state import State

Balance = Literal["loss", "bias", "none"]
RouterInput = Literal["past", "paper_mean"]


class ChunkMoEState(State):
    """What the router knows between tokens."""

    total: Tensor  # (batch, d_model), sum of the inputs since the last decision, float32
    position: Tensor  # (batch,) int64
    expert: Tensor  # (batch, experts_per_token) int64, the decision in force
    weight: Tensor  # (batch, experts_per_token), float32


class _Decision(NamedTuple):
    expert: Tensor  # (chunks, k)
    weight: Tensor  # (chunks, k)
    logits: Tensor  # (chunks, experts)
    fresh: Tensor  # (chunks,) bool: decided here, not carried


class ChunkMoE(Mixer):
    r"""y_t = sum_i p_i E_{e_i}(x_t), with experts e and weights p decided at each chunk's first token.

    .. code-block:: text

        r      = mean of x over (t - S, t]  at t = 0, S, 2S, ... of the document (x_0 at t = 0)
        l      = W_r r / tau                                          in float32
        e      = the k best of l + selection_bias,   p = softmax(l[e])
        E(x)   = W_out[e] (silu(W_gate[e] x) * W_up[e] x)

    for the S tokens from t on. So a decision depends on nothing later than its first token, and is
    the same in training, prefill and decode. (Averaging the whole chunk, as the published
    prototype of Hydra does, leaks up to S - 1 later tokens and cannot be decoded.) Every expert
    runs on exactly the tokens sent to it; nothing is dropped unless ``capacity_factor`` is given.
    ``chunk_size=1`` is the ordinary mixture of experts over tokens.

    Args:
        d_model: width.
        num_experts, experts_per_token: E and k.
        d_hidden: inner width of an expert; d_model when omitted.
        chunk_size: S.
        temperature: tau, a plain attribute that a curriculum may lower.
        balance: ``"loss"``: ``aux["balance_loss"]`` = balance_weight E sum_e f_e P_e, with f the share of
            decisions (no gradient) and P the mean probability (Switch, arXiv:2101.03961, section 2.2);
            ``"bias"``: no such loss; :meth:`after_optimizer_step` moves ``selection_bias`` by ``balance_weight``
            toward even loads (arXiv:2408.15664);
            ``"none"``.
        balance_weight: its size; 1e-2 for the loss and 1e-3 for the bias when omitted.
        z_weight: ``aux["z_loss"]`` = z_weight mean(logsumexp(l)^2); 0 for none.
        capacity_factor: in training only, an expert takes at most ceil(factor N k / E) of N chunks; earlier
            chunks first, then higher choices, then rows. The terms beyond are dropped without rescaling.
        router_input: ``"past"``, or ``"paper_mean"``, the leaking mean over the whole chunk, for ablations: it is
            not causal, refuses a state and a step.

    ``dense`` is a plain attribute that a curriculum may set: expert 0 then runs alone, on every token and with weight
    1; nothing is decided, and ``aux`` is empty.

    ``aux`` also has ``load_max`` (the fullest expert's load over the mean), ``load_entropy`` (nats), ``dead_experts``
    and ``dropped`` (share of the terms).

    Raises:
        ValueError: k above E, sizes below 1, a capacity factor that is not positive, unknown words.
    """

    selection_bias: Tensor
    assigned: Tensor
    residual_outputs: ClassVar[tuple[str, ...]] = ("out_weight",)

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int = 8,
        experts_per_token: int = 2,
        d_hidden: int | None = None,
        chunk_size: int = 128,
        temperature: float = 1.0,
        balance: Balance = "loss",
        balance_weight: float | None = None,
        z_weight: float = 1e-3,
        capacity_factor: float | None = None,
        router_input: RouterInput = "past",
    ) -> None:
        super().__init__(d_model)
        name = type(self).__name__
        d_hidden = d_model if d_hidden is None else d_hidden
        check_positive(
            name, num_experts=num_experts, experts_per_token=experts_per_token, d_hidden=d_hidden, chunk_size=chunk_size
        )
        if experts_per_token > num_experts:
            raise ValueError(
                f"{name}: experts_per_token is {experts_per_token} of num_experts={num_experts}; expected at most all"
            )
        if not temperature > 0:
            raise ValueError(f"{name}: temperature is {temperature}; expected a positive number")
        if balance not in ("loss", "bias", "none"):
            raise ValueError(f"{name}: balance is {balance!r}; expected 'loss', 'bias' or 'none'")
        if router_input not in ("past", "paper_mean"):
            raise ValueError(f"{name}: router_input is {router_input!r}; expected 'past' or 'paper_mean'")
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"{name}: capacity_factor is {capacity_factor}; expected a positive number, or None")
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.d_hidden, self.chunk_size, self.temperature = d_hidden, chunk_size, temperature
        self.balance, self.z_weight, self.capacity_factor = balance, z_weight, capacity_factor
        usual = {"loss": 1e-2, "bias": 1e-3, "none": 0.0}[balance]
        self.balance_weight = usual if balance_weight is None else balance_weight
        self.router_input = router_input
        self.dense = False
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.in_weight = nn.Parameter(torch.empty(num_experts, 2 * d_hidden, d_model))  # gate, then up
        self.out_weight = nn.Parameter(torch.empty(num_experts, d_model, d_hidden))
        self.register_buffer("selection_bias", torch.zeros(num_experts))
        # Decisions since the last update, as integers: a layer in bfloat16 would stop counting at 256.
        self.register_buffer("assigned", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As ``nn.Linear``: uniform within 1 / sqrt(fan in), each expert on its own."""
        for weight in (self.in_weight, self.out_weight):
            weight.uniform_(-1 / math.sqrt(weight.shape[2]), 1 / math.sqrt(weight.shape[2]))
        self.selection_bias.zero_()
        self.assigned.zero_()

    def forward(
        self,
        x: Tensor,
        state: ChunkMoEState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        documents = x.shape[0] if layout is None else layout.num_documents
        if state is not None:
            self.check_state(state, documents)
        if self.router_input == "paper_mean" and (state is not None or return_state):
            self._refuse_state()
        starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
        before = self.init_state(documents, device=x.device, dtype=x.dtype) if state is None else state
        blocks = aligned_blocks(starts, lengths, before.position, x.shape[0], x.shape[1], self.chunk_size)
        flat = x.flatten(0, 1)
        total, tail = self._window_totals(flat, before, blocks)
        decision = self._decide(flat, before, blocks, total)
        kept = self._within_capacity(decision, blocks)
        expert = decision.expert if kept is None else torch.where(kept, decision.expert, self.num_experts)
        chunk = blocks.slot_of_token // self.chunk_size  # -1 on padding
        expert = torch.where((chunk >= 0)[:, None], expert[chunk.clamp_min(0)], self.num_experts)
        y = self._experts(flat, expert, decision.weight[chunk.clamp_min(0)]).view(x.shape)
        after = None
        if return_state:
            count = torch.full_like(before.position, x.shape[1]) if lengths is None else lengths
            after = self._after(before, blocks, tail, decision, count)
        return MixerOutput(y, after, self._statistics(decision, kept))

    @torch.no_grad()
    def step(self, x_t: Tensor, state: ChunkMoEState) -> Tensor:
        if self.router_input == "paper_mean":
            self._refuse_state()
        decides = state.position % self.chunk_size == 0
        state.total += x_t.to(state.total.dtype)
        count = torch.where(state.position == 0, 1, self.chunk_size)
        expert, weight, _ = self._route(state.total / count[:, None])
        state.expert.copy_(torch.where(decides[:, None], expert, state.expert))
        state.weight.copy_(torch.where(decides[:, None], weight, state.weight))
        state.total.masked_fill_(decides[:, None], 0)
        state.position += 1
        return self._experts(x_t, state.expert, state.weight)

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ChunkMoEState:
        weight = self.router.weight
        device = weight.device if device is None else device
        carried = state_dtype(dtype or weight.dtype)
        k = self.experts_per_token
        return ChunkMoEState(
            torch.zeros(batch_size, self.d_model, device=device, dtype=carried),
            torch.zeros(batch_size, device=device, dtype=torch.int64),
            torch.zeros(batch_size, k, device=device, dtype=torch.int64),
            torch.zeros(batch_size, k, device=device, dtype=carried),
        )

    def pin(self, count: int) -> None:
        if self.router_input == "paper_mean":
            self._refuse_state()

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Moves ``selection_bias`` toward even loads, by the decisions since the last call; for ``balance="bias"``.

        In a distributed run the counts are summed over all processes.
        """
        if self.balance != "bias":
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.assigned)
        short = torch.sign(self.assigned.sum() - self.num_experts * self.assigned)
        self.selection_bias += self.balance_weight * short
        self.assigned.zero_()

    def flops(self, length: int) -> int:
        expert = 6 * self.d_model * self.d_hidden  # three matrices
        router = 2 * self.d_model * self.num_experts * math.ceil(length / self.chunk_size)
        return length * self.experts_per_token * expert + router

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, num_experts={self.num_experts}, experts_per_token={self.experts_per_token}, "
            f"d_hidden={self.d_hidden}, chunk_size={self.chunk_size}, balance={self.balance!r}, "
            f"router_input={self.router_input!r}"
        )

    def _window_totals(self, flat: Tensor, before: ChunkMoEState, blocks: AlignedBlocks) -> tuple[Tensor, Tensor]:
        """Sums of the inputs, in float32: over (t - S, t] for each block's first position t, and of each block's
        tokens behind its first: what the next decision begins with."""
        rows = _rows(flat, blocks, before.total.dtype)
        head, tail = rows[:, 0], rows[:, 1:].sum(1)
        carried = torch.where(blocks.first[:, None], before.total[blocks.document], 0)
        inside = (before.position[blocks.document] % self.chunk_size > 0)[:, None]  # it goes on inside a block
        tail = tail + torch.where(inside, carried, 0)
        previous = torch.cat([tail.new_zeros(1, tail.shape[1]), tail[:-1]])
        return head + torch.where(blocks.first[:, None], torch.where(inside, 0, carried), previous), tail

    def _decide(self, flat: Tensor, before: ChunkMoEState, blocks: AlignedBlocks, total: Tensor) -> _Decision:
        if self.router_input == "paper_mean":
            mean = self._chunk_means(flat, blocks)
        else:
            count = torch.where(blocks.position[:, 0] == 0, 1, self.chunk_size)
            mean = total / count[:, None]
        expert, weight, logits = self._route(mean)
        fresh = blocks.token[:, 0] >= 0
        expert = torch.where(fresh[:, None], expert, before.expert[blocks.document])
        weight = torch.where(fresh[:, None], weight, before.weight[blocks.document])
        return _Decision(expert, weight, logits, fresh)

    def _chunk_means(self, flat: Tensor, blocks: AlignedBlocks) -> Tensor:
        count = (blocks.token >= 0).sum(1).clamp_min(1)
        return _rows(flat, blocks, state_dtype(flat.dtype)).sum(1) / count[:, None]

    def _route(self, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The k experts, their weights and all logits for router inputs (..., d_model) in float32."""
        if self.dense:
            k, logits = self.experts_per_token, mean.new_zeros(*mean.shape[:-1], self.num_experts)
            rank = torch.arange(k, device=mean.device).expand(*mean.shape[:-1], k)
            return torch.where(rank == 0, 0, self.num_experts), (rank == 0).to(mean.dtype), logits
        with torch.autocast(mean.device.type, enabled=False):
            logits = linear(mean, self.router.weight.to(mean.dtype)) / self.temperature
        # A stable sort, so that equal logits give the same choice (the first) in every shape and on every device.
        order = (logits + self.selection_bias.to(logits.dtype)).sort(dim=-1, descending=True, stable=True).indices
        expert = order[..., : self.experts_per_token]
        return expert, logits.gather(-1, expert).softmax(-1), logits

    def _experts(self, flat: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """sum_i weight[:, i] E_{expert[:, i]}(flat), (tokens, d_model); expert number ``num_experts`` is none."""
        k = self.experts_per_token
        chosen, order = expert.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(self.num_experts, device=flat.device), right=True)
        ends = ends.to(torch.int32)
        hidden = swiglu(grouped_linear(flat[order // k], self.in_weight, ends))
        out = grouped_linear(hidden, self.out_weight, ends)
        # Back in the order of the tokens by a gather, which is deterministic where adding by index is not.
        out = out[order.argsort()].view(*expert.shape, self.d_model)
        return (out * weight.to(out.dtype).unsqueeze(-1)).sum(1)

    def _within_capacity(self, decision: _Decision, blocks: AlignedBlocks) -> Tensor | None:
        """(chunks, k) bool: the terms an expert has room for; None where nothing is limited."""
        if self.capacity_factor is None or not self.training or self.dense:
            return None
        k, documents = self.experts_per_token, int(blocks.last.shape[0])
        capacity = (self.capacity_factor * decision.fresh.sum() * k / self.num_experts).ceil()
        # Earlier chunks first, so that no chunk loses its place to a later one; then higher choices, then rows.
        chunk = blocks.position[:, 0] // self.chunk_size
        rank = torch.arange(k, device=chunk.device)
        turn = ((chunk[:, None] * k + rank) * documents + blocks.document[:, None]).flatten()
        order = turn.argsort(stable=True)
        taken = decision.fresh[:, None].expand(-1, k).flatten()[order]
        expert = decision.expert.flatten()[order]
        wanted = (expert[:, None] == torch.arange(self.num_experts, device=chunk.device)) & taken[:, None]
        place = wanted.cumsum(0).gather(1, expert[:, None]).squeeze(1)
        fits = (place <= capacity) | ~taken
        return torch.zeros_like(fits).scatter(0, order, fits).view(-1, k)

    def _statistics(self, decision: _Decision, kept: Tensor | None) -> dict[str, Tensor]:
        """Losses and metrics of the decisions made here."""
        if self.dense:
            return {}
        fresh = decision.fresh[:, None]
        experts = torch.arange(self.num_experts, device=fresh.device)
        load = ((decision.expert[..., None] == experts) & fresh[..., None]).sum((0, 1))
        count = load.to(decision.logits.dtype)
        decisions = decision.fresh.sum().clamp_min(1)
        share = count / count.sum().clamp_min(1)
        aux = {}
        if self.balance == "loss":
            probability = torch.where(fresh, decision.logits.softmax(-1), 0).sum(0) / decisions
            aux["balance_loss"] = self.balance_weight * self.num_experts * (share * probability).sum()
        if self.z_weight:
            log_sum = torch.where(decision.fresh, decision.logits.logsumexp(-1), 0)
            aux["z_loss"] = self.z_weight * log_sum.square().sum() / decisions
        if self.balance == "bias" and self.training:
            self.assigned += load
        aux["load_max"] = share.amax() * self.num_experts
        aux["load_entropy"] = torch.special.entr(share).sum()
        aux["dead_experts"] = (count == 0).sum()
        if kept is not None:
            aux["dropped"] = (~kept & fresh).sum() / (decisions * self.experts_per_token)
        return aux

    def _after(
        self, before: ChunkMoEState, blocks: AlignedBlocks, tail: Tensor, decision: _Decision, lengths: Tensor
    ) -> ChunkMoEState:
        empty = (lengths == 0)[:, None]
        return ChunkMoEState(
            torch.where(empty, before.total, tail[blocks.last]),
            before.position + lengths,
            torch.where(empty, before.expert, decision.expert[blocks.last]),
            torch.where(empty, before.weight, decision.weight[blocks.last]),
        )

    def _refuse_state(self) -> None:
        raise ValueError(
            f"{type(self).__name__}: router_input='paper_mean' averages a whole chunk, later tokens included, so it "
            "has no state and no step; build the layer with router_input='past'"
        )


def _rows(flat: Tensor, blocks: AlignedBlocks, dtype: torch.dtype) -> Tensor:
    """The inputs of each block, (blocks, S, d_model), zero in slots without a new token."""
    return torch.where((blocks.token >= 0)[..., None], flat[blocks.token.clamp_min(0)].to(dtype), 0)
