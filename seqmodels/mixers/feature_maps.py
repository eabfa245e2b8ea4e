"""Feature maps of linear attention: phi(q) . phi(k) stands in for exp(q . k).

A map is a module that takes (batch, length, heads, width) queries or keys to (batch, length, heads,
``output_dim``); the same module serves one token, (batch, heads, width). Features are computed in float32
(float64 beside float64), under autocast too. Fixed maps return them in the dtype of x, learned ones as
computed: an exponential in float16 overflows at 11, and a softmax in bfloat16 has two digits.

``FEATURE_MAPS`` holds the maps by name. A map has two uses: as the module, whose features an unfused
operation reads, and as a description that ``seqmodels.ops.feature_attention`` computes inside its
kernel: the name ``op`` and what :func:`fused` collects.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from seqmodels.mixers.base import Registry, check_positive
from seqmodels.ops.registration import state_dtype

Initialization = Literal["identity", "kaiming"]


class FeatureMap(nn.Module):
    """Base of feature maps of ``num_heads`` heads of ``width`` entries.

    Attributes:
        op: the map's name in ``seqmodels.ops.feature_attention``; None for one that only exists as a module.
        nonnegative: phi(q) . phi(k) >= 0 always, so that weights can be normalised by their sum.
        epsilon: what is added to the normaliser by default: far below any sum of weights that matters.
    """

    op: ClassVar[str | None] = None
    nonnegative: ClassVar[bool] = True
    epsilon: ClassVar[float] = 1e-6

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        check_positive(type(self).__name__, num_heads=num_heads, width=width)
        self.num_heads, self.width = num_heads, width

    @property
    def output_dim(self) -> int:
        return self.width

    def forward(self, x: Tensor) -> Tensor:
        """(..., heads, width) to (..., heads, output_dim)."""
        raise NotImplementedError

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the fused op takes for x (..., groups, width): a tensor, and the weight (heads, its width, f) of
        u = x W; None for u = x."""
        return x, None

    def widened(self, x: Tensor) -> Tensor:
        """x in the dtype that features are computed in; refuses another shape."""
        if x.shape[-2:] != (self.num_heads, self.width):
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}; expected (..., {self.num_heads}, {self.width}), "
                "heads and width last (grouped keys are repeated to the query heads first)"
            )
        return x.to(state_dtype(x.dtype))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, width={self.width}"


class Identity(FeatureMap):
    """phi(x) = x: plain linear attention, RetNet, Mamba-2. Weights of either sign."""

    op = "identity"
    nonnegative = False

    def forward(self, x: Tensor) -> Tensor:
        self.widened(x)
        return x


class EluPlusOne(FeatureMap):
    """phi(x) = elu(x) + 1 = max(x, 0) + exp(min(x, 0)) (Katharopoulos et al. 2020, section 3.2)."""

    op = "elu"

    def forward(self, x: Tensor) -> Tensor:
        wide = self.widened(x)
        return (wide.relu() + wide.clamp_max(0).exp()).to(x.dtype)  # not exp(x) - 1 + 1, which cancels


class Relu(FeatureMap):
    """phi(x) = max(x, 0)."""

    op = "relu"

    def forward(self, x: Tensor) -> Tensor:
        self.widened(x)
        return x.relu()


class Taylor(FeatureMap):
    """phi(x) = [1, x / f^{1/4}, x_i^2 / sqrt(2 f), x_i x_j / sqrt(f) for i < j], with f the width.

    Then phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(f), the second-order expansion of
    exp(s), in 1 + f + f (f + 1) / 2 features: each product of two coordinates stands once
    (Based, arXiv:2402.18668, section 4.1).
    """

    op = "taylor"

    @property
    def output_dim(self) -> int:
        return 1 + self.width + self.width * (self.width + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        wide = self.widened(x)
        # Made anew, not kept in buffers: nothing to lose in a cast, a deepcopy or to_empty.
        row, column = torch.triu_indices(self.width, self.width, device=x.device)
        # Two Python numbers would meet in float32, whatever comes after.
        square, product = (wide.new_full((), 1 / math.sqrt(n * self.width)) for n in (2, 1))
        scale = torch.where(row == column, square, product)
        pairs = wide[..., row] * wide[..., column] * scale
        return torch.cat([torch.ones_like(wide[..., :1]), wide * self.width**-0.25, pairs], dim=-1).to(x.dtype)


class TaylorFull(Taylor):
    """phi(x) = [1, x / f^{1/4}, vec(x x^T) / sqrt(2 f)]: :class:`Taylor` with every product of two
    coordinates written out, 1 + f + f^2 features with the same phi(q) . phi(k). As the paper has it, and for
    states of that width; the packed form costs 0.56 as much at f = 16."""

    op = None

    @property
    def output_dim(self) -> int:
        return 1 + self.width + self.width**2

    def forward(self, x: Tensor) -> Tensor:
        wide = self.widened(x)
        pairs = (wide.unsqueeze(-1) * wide.unsqueeze(-2)).flatten(-2) / math.sqrt(2 * self.width)
        return torch.cat([torch.ones_like(wide[..., :1]), wide * self.width**-0.25, pairs], dim=-1).to(x.dtype)


class LearnedMap(FeatureMap):
    r"""Base of maps behind a linear map of their own, u = x W (+ b) for each head.

    Args:
        num_heads, width: heads and width of x.
        feature_dim: f, the width of u; ``width`` when omitted.
        init: ``"identity"``: W = I (the first f entries of x), b = 0; ``"kaiming"``: W uniform with variance
            2 / width, for each head.
        bias: whether there is a b.
        shared: one W (and b) for all heads.

    Parameters: ``weight`` (heads or 1, width, f), ``bias`` (heads or 1, f).
    """

    def __init__(
        self,
        num_heads: int,
        width: int,
        *,
        feature_dim: int | None = None,
        init: Initialization = "identity",
        bias: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init__(num_heads, width)
        name = type(self).__name__
        self.feature_dim = width if feature_dim is None else feature_dim
        check_positive(name, feature_dim=self.feature_dim)
        if init not in ("identity", "kaiming"):
            raise ValueError(f"{name}: init is {init!r}; expected 'identity' or 'kaiming'")
        if init == "identity" and self.feature_dim > width:
            raise ValueError(
                f"{name}: the identity of width {width} has no {self.feature_dim} columns; "
                f"choose feature_dim of at most {width}, or init='kaiming'"
            )
        self.init = init
        heads = 1 if shared else num_heads
        self.weight = nn.Parameter(torch.empty(heads, width, self.feature_dim))
        self.bias = nn.Parameter(torch.empty(heads, self.feature_dim)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init == "identity":
            eye = torch.eye(self.width, self.feature_dim, dtype=self.weight.dtype, device=self.weight.device)
            self.weight.copy_(eye.expand_as(self.weight))
        else:  # PyTorch's own takes a (heads, d, f) tensor for a convolution and divides by d f
            bound = math.sqrt(6 / self.width)
            self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_()

    def project(self, x: Tensor) -> Tensor:
        """u = x W + b in float32 or float64."""
        x = self.widened(x)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.to(x.dtype).expand(self.num_heads, -1, -1)
            u = torch.einsum("...hd,hdf->...hf", x, weight)
            return u if self.bias is None else u + self.bias.to(x.dtype)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = self.weight
        if self.bias is not None:  # [x, 1] [W; b]: the op's weight in the parameters' precision, biases included
            x = pad(x, (0, 1), value=1.0)
            weight = torch.cat([weight, self.bias.unsqueeze(1)], dim=1)
        return x, weight.expand(self.num_heads, -1, -1)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, feature_dim={self.feature_dim}, init={self.init!r}, "
            f"bias={self.bias is not None}, shared={self.weight.shape[0] != self.num_heads}"
        )


class T2R(LearnedMap):
    """phi(x) = max(x W + b, 0) (Kasai et al. 2021, arXiv:2103.13076, equation 4)."""

    op = "t2r"

    @property
    def output_dim(self) -> int:
        return self.feature_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).relu()


class HedgehogExp(LearnedMap):
    r"""phi(x) = [exp(u), exp(-u)], u = x W (+ b): 2 f features (Hedgehog, arXiv:2402.04347, section 4.2).

    phi(q) . phi(k) = 2 sum_i cosh(uq_i + uk_i). The features themselves overflow float32 at |u| > 88;
    the fused op never forms them (it carries a running maximum of every feature), and
    :func:`paired_features` is the same for keys that are all at hand.
    """

    op = "hedgehog_exp"
    epsilon = 1e-30  # relative to the largest feature: sums of weights may be small, and are not 0

    @property
    def output_dim(self) -> int:
        return 2 * self.feature_dim

    def exponents(self, x: Tensor) -> Tensor:
        """[u, -u], the logarithm of the features."""
        u = self.project(x)
        return torch.cat([u, -u], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.exponents(x).exp()


class HedgehogSplit(LearnedMap):
    r"""phi(x) = [softmax(u), softmax(-u)], u = x W (+ b), a softmax over f each: 2 f features.

    The default of the released Hedgehog code and of LoLCATs (arXiv:2410.10254). Not :class:`HedgehogExp`
    with another scale: the halves are scaled apart.
    """

    op = "hedgehog_split"

    @property
    def output_dim(self) -> int:
        return 2 * self.feature_dim

    def forward(self, x: Tensor) -> Tensor:
        u = self.project(x)
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], dim=-1)


class HedgehogJoint(LearnedMap):
    r"""phi(x) = softmax([u, -u]) over all 2 f features, u = x W (+ b).

    On queries it equals :class:`HedgehogExp`, whose scale the normaliser cancels; on keys it does not, since
    each key is divided by its own sum of exponentials.
    """

    op = "hedgehog_joint"
    factor: ClassVar[float] = 1.0

    @property
    def output_dim(self) -> int:
        return 2 * self.feature_dim

    def forward(self, x: Tensor) -> Tensor:
        u = self.project(x) * self.factor
        return torch.cat([u, -u], dim=-1).softmax(-1)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = super().operands(x)
        return x, weight if weight is None or self.factor == 1 else weight * self.factor


class HedgehogJointDoubled(HedgehogJoint):
    """phi(x) = softmax([2 u, -2 u]): flash-linear-attention's form of :class:`HedgehogJoint`."""

    factor = 2.0


def paired_features(
    query_map: FeatureMap, key_map: FeatureMap, q: Tensor, k: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """phi_q(q) and phi_k(k) up to a positive factor for each query, which normalised weights do not see.

    For maps of exponentials the largest key of each feature is moved to the queries, and each query's largest
    feature divided out: exact, and finite where the features themselves are not.

    Args:
        q, k: (batch, length, heads, width) each, of any two lengths.
        valid: (batch, length of k) bool, False on padding, whose features are zero. None: all are valid.
    """
    if not (isinstance(query_map, HedgehogExp) and isinstance(key_map, HedgehogExp)):
        key = key_map(k)
        return query_map(q), key if valid is None else key * valid[..., None, None]
    query, key = query_map.exponents(q), key_map.exponents(k)
    if valid is not None:
        key = torch.where(valid[..., None, None], key, -1e30)  # finite, so that a row of padding has no NaN
    shift = key.detach().amax(dim=1, keepdim=True)  # cancels, and so does its gradient
    query = query + shift
    key = (key - shift).exp()
    if valid is not None:
        key = key * valid[..., None, None]
    return (query - query.detach().amax(-1, keepdim=True)).exp(), key


def fused(query_map: FeatureMap, key_map: FeatureMap, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """q, k and the keyword arguments by which ``seqmodels.ops.feature_attention`` applies these maps to them."""
    q, query_weight = query_map.operands(q)
    k, key_weight = key_map.operands(k)
    return q, k, {"feature_map": query_map.op, "query_weight": query_weight, "key_weight": key_weight}


def make_feature_map(owner: str, name: str, num_heads: int, width: int, **options: Any) -> FeatureMap:
    """The map ``name``; ``options`` are those of :class:`LearnedMap`, which fixed maps refuse.

    Raises:
        ValueError: an unknown name, or an option other than None and False of a map without parameters.
    """
    kind = FEATURE_MAPS[name]
    if issubclass(kind, LearnedMap):
        return kind(num_heads, width, **{key: value for key, value in options.items() if value is not None})
    for key, value in options.items():
        if value is not None and value is not False:
            raise ValueError(f"{owner}: {key}={value!r} is for learned maps; feature_map={name!r} has no parameters")
    return kind(num_heads, width)


_HERE = "seqmodels.mixers.feature_maps"
FEATURE_MAPS = Registry(
    "feature map",
    {
        "identity": f"{_HERE}:Identity",
        "elu": f"{_HERE}:EluPlusOne",
        "relu": f"{_HERE}:Relu",
        "t2r": f"{_HERE}:T2R",
        "taylor": f"{_HERE}:Taylor",
        "taylor_full": f"{_HERE}:TaylorFull",
        "hedgehog_exp": f"{_HERE}:HedgehogExp",
        "hedgehog_split": f"{_HERE}:HedgehogSplit",
        "hedgehog_joint": f"{_HERE}:HedgehogJoint",
        "hedgehog_joint_doubled": f"{_HERE}:HedgehogJointDoubled",
    },
)
