"""Prefix linear attention against the definition written out, at every relation of prompt and prefix."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import linear

from seqmodels import Layout
from seqmodels.mixers import LinearAttention, PrefixLinearAttention

EXACT = 1e-10  # float64, sums of at most some hundred terms of size one


def layer(d_model=12, num_heads=3, feature_dim=4, **options) -> PrefixLinearAttention:
    torch.manual_seed(0)
    return PrefixLinearAttention(d_model, num_heads=num_heads, feature_dim=feature_dim, **options).double()


def full_taylor(x):
    """All 1 + f + f^2 features: [1, x / f^(1/4), vec(x x^T) / sqrt(2 f)]."""
    f = x.shape[-1]
    pairs = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2 * f)
    return torch.cat([torch.ones_like(x[..., :1]), x / f**0.25, pairs], -1)


def definition(module, x, prefix):
    """One row (length, d_model), token by token from the paper's equation; nothing shared with the layer."""
    heads, f = module.num_heads, module.key_dim

    def split(weight, rows):
        return linear(rows, weight).view(rows.shape[0], heads, weight.shape[0] // heads)

    q = full_taylor(split(module.q_proj.weight, x))
    k, v = full_taylor(split(module.k_proj.weight, x)), split(module.v_proj.weight, x)
    ke = full_taylor(split(module.encoder_k_proj.weight, x[:prefix]))
    ve = split(module.encoder_v_proj.weight, x[:prefix])
    assert q.shape[-1] == 1 + f + f * f
    rows = []
    for i in range(x.shape[0]):
        row = []
        for h in range(heads):
            weights = torch.cat([k[: i + 1, h] @ q[i, h], ke[:, h] @ q[i, h]])
            values = torch.cat([v[: i + 1, h], ve[:, h]])
            row.append(weights @ values / (weights.sum() + 1e-12))
        rows.append(torch.cat(row))
    return linear(torch.stack(rows), module.out_proj.weight)


def prefixed(rows, length, prefix):
    return Layout.full(rows, length, prefix_lengths=[prefix] * rows)


@pytest.mark.parametrize("prefix", [0, 1, 7, 20, 33])
def test_forward_is_the_definition(prefix):
    module, x = layer(), torch.randn(2, 20, 12, dtype=torch.float64)
    y = module(x, layout=prefixed(2, 20, prefix)).y
    for row in range(2):
        expected = definition(module, x[row], min(prefix, 20))
        assert (y[row] - expected).abs().max() < EXACT


@pytest.mark.parametrize("prompt", [5, 12, 40], ids=["shorter", "equal", "longer"])
def test_parallel_chunked_and_recurrent_agree(prompt):
    """A prompt of L tokens with M = 12, over more than one chunk of 64, then tokens in pieces and one by one."""
    module, total = layer(), 80
    x = torch.randn(2, total, 12, dtype=torch.float64)
    whole = module(x, layout=prefixed(2, total, min(12, prompt)), return_state=True)
    expected = torch.stack([definition(module, row, min(12, prompt)) for row in x])
    assert (whole.y - expected).abs().max() < EXACT
    for pieces in ([1] * (total - prompt), [total - prompt], [3, total - prompt - 3]):
        first = module(x[:, :prompt], layout=prefixed(2, prompt, 12), return_state=True)
        outputs, state = [first.y], first.state.clone()
        for piece in x[:, prompt:].split(pieces, dim=1):
            if len(pieces) > 2:
                outputs.append(module.step(piece[:, 0], state)[:, None])
            else:
                result = module(piece, state, return_state=True)
                outputs.append(result.y)
                state = result.state
        assert (torch.cat(outputs, 1) - expected).abs().max() < EXACT
        assert (state.matrix - whole.state.matrix).abs().max() < EXACT


def test_without_a_prefix_it_is_causal_linear_attention():
    module = layer()
    causal = LinearAttention(12, num_heads=3, key_dim=4, feature_map="taylor", epsilon=1e-12).double()
    causal.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("encoder")})
    x = torch.randn(2, 70, 12, dtype=torch.float64)
    expected = causal(x, return_state=True)
    for layout in (None, Layout.full(2, 70), prefixed(2, 70, 0)):
        found = module(x, layout=layout, return_state=True)
        assert (found.y - expected.y).abs().max() < EXACT
        assert (found.state.matrix - expected.state.matrix).abs().max() < EXACT
    assert type(found.state) is type(expected.state)
    assert module.state_bytes(1000) == causal.state_bytes(10) == 3 * 15 * 5 * 8


def test_tokens_of_the_prefix_see_all_of_it_and_nothing_behind():
    module, x = layer(), torch.randn(1, 12, 12, dtype=torch.float64, requires_grad=True)
    y = module(x, layout=prefixed(1, 12, 5)).y
    for i in range(12):
        seen = torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) > 0
        assert seen.tolist() == [j <= max(i, 4) for j in range(12)]


def test_each_row_and_each_document_has_its_own_prefix():
    module = layer()
    x = torch.randn(2, 30, 12, dtype=torch.float64)
    rows, prefixes = [[4, 9, 1, 10], [20, 7]], [2, 9, 1, 0, 30, 5]
    layout = Layout.packed(rows, 30, capacity=8, prefix_lengths=prefixes)
    packed = module(x, layout=layout, return_state=True)
    slot = 0
    for row, lengths in enumerate(rows):
        column = 0
        for length in lengths:
            document = x[row, column : column + length]
            expected = definition(module, document, min(prefixes[slot], length))
            assert (packed.y[row, column : column + length] - expected).abs().max() < EXACT
            column, slot = column + length, slot + 1
    assert not packed.state.matrix[slot:].any()


def test_left_padding_inside_the_prefix_changes_nothing():
    """The prefix counts from the first real token, whatever the padding holds, also for prompts longer than it."""
    module, lengths, prefix = layer(), [3, 9, 16], 9
    x = torch.randn(3, 16, 12, dtype=torch.float64)
    layout = Layout.left_padded(lengths, 16, prefix_lengths=[prefix] * 3)
    results = []
    for scale in (1.0, 1e3):
        padded = torch.where(layout.valid[..., None], x, scale * x)
        results.append(module(padded, layout=layout, return_state=True))
    for result in results:
        for row, length in enumerate(lengths):
            alone = module(x[row : row + 1, -length:], layout=prefixed(1, length, prefix), return_state=True)
            assert (result.y[row, -length:] - alone.y[0]).abs().max() < EXACT
            assert (result.state.matrix[row] - alone.state.matrix[0]).abs().max() < EXACT
    assert torch.equal(results[0].state.matrix, results[1].state.matrix)


def test_compat_mask_adds_phi_of_zero_for_padding():
    """Released code: a pad's keys are zero before the map, so it adds its value with weight 1 in both readings."""
    module, pads, prefix = layer(), 4, 10
    x = torch.randn(1, 16, 12, dtype=torch.float64)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[:, :pads] = True
    layout = prefixed(1, 16, prefix).with_compat_mask(mask)
    heads, f = module.num_heads, module.key_dim

    def split(weight):
        return linear(x[0], weight).view(16, heads, -1)

    zero = mask[0, :, None, None]
    q = full_taylor(split(module.q_proj.weight))
    k = full_taylor(split(module.k_proj.weight).masked_fill(zero, 0))
    ke = full_taylor(split(module.encoder_k_proj.weight).masked_fill(zero, 0))[:prefix]
    assert torch.equal(k[:pads], torch.eye(1 + f + f * f, dtype=x.dtype)[0].expand(pads, heads, -1))
    v, ve = split(module.v_proj.weight), split(module.encoder_v_proj.weight)[:prefix]
    causal = torch.einsum("ihd,jhd->hij", q, k).tril()
    encoder = torch.einsum("ihd,jhd->hij", q, ke)
    numerator = torch.einsum("hij,jhe->ihe", causal, v) + torch.einsum("hij,jhe->ihe", encoder, ve)
    divisor = (causal.sum(-1) + encoder.sum(-1)).T[..., None]
    expected = linear((numerator / divisor).flatten(1), module.out_proj.weight)
    assert (module(x, layout=layout).y[0] - expected).abs().max() < EXACT
    exact = module(x, layout=Layout.left_padded([12], 16, prefix_lengths=[prefix - pads])).y[0, pads:]
    assert (exact - expected[pads:]).abs().max() > 1e-2  # the leak is real, which is why masks are exact by default


def test_paper_sizes():
    """16 heads of f = 16: 153 features, 64 values and the normaliser a head."""
    module = PrefixLinearAttention(1024, num_heads=16)
    assert module.init_state(1, device="meta").matrix.shape == (1, 16, 153, 65)
    d, f = 1024, 16 * 16
    assert sum(p.numel() for p in module.parameters()) == 3 * d * f + 3 * d * d
    assert not any(name.endswith("bias") for name, _ in module.named_parameters())


def test_gradients_flow_through_the_encoder_and_the_state_given():
    module = layer(d_model=4, num_heads=1, feature_dim=2)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(2, 1, 6, 5, dtype=torch.float64).abs().requires_grad_()
    state = module.init_state(2)
    layout = prefixed(2, 5, 3)

    def run(x, matrix):
        state.matrix = matrix
        result = module(x, state, layout=layout, return_state=True)
        return result.y, result.state.matrix

    assert torch.autograd.gradcheck(run, (x, matrix))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_near_float32(autocast):
    """Inputs and maps round to 8 bits; sums and the normaliser are float32, so the error does not grow with length."""
    module = layer(d_model=32, num_heads=2, feature_dim=8).float()
    x, layout = torch.randn(2, 300, 32), prefixed(2, 300, 150)
    expected = module(x, layout=layout).y
    low = module if autocast else copy.deepcopy(module).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = low(x if autocast else x.bfloat16(), layout=layout, return_state=True)
    assert found.state.matrix.dtype == torch.float32
    # A weight 1 + s + s^2/2 of |s| about 1 is off by some eps, and an output is a mean of values of size one.
    assert (found.y.float() - expected).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_memory_is_linear_in_length():
    """Bytes that the forward keeps for the backward, at twice the length: no length x length table."""

    def kept(length):
        module, total = layer().float(), 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(torch.randn(1, length, 12), layout=prefixed(1, length, length // 2)).y.sum()
        return total

    assert kept(1024) < 2.1 * kept(512)


def test_a_compiled_layer_takes_other_prefixes_without_recompiling():
    module = layer().float()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 9, 12)
    torch._dynamo.reset()
    for prefixes in ([2, 5], [0, 9], [9, 1]):
        layout = Layout.full(2, 9, prefix_lengths=prefixes)
        with torch.compiler.set_stance("default" if prefixes == [2, 5] else "fail_on_recompile"):
            torch.testing.assert_close(compiled(x, layout=layout).y, module(x, layout=layout).y)


def test_bad_arguments_name_the_value():
    with pytest.raises(ValueError, match="d_model=12 is not divisible by num_heads=5"):
        PrefixLinearAttention(12, num_heads=5)
    with pytest.raises(ValueError, match="key_dim is 0"):
        PrefixLinearAttention(12, num_heads=3, feature_dim=0)
    with pytest.raises(ValueError, match=r"layout is for a grid of \(1, 4\)"):
        layer()(torch.randn(1, 5, 12, dtype=torch.float64), layout=prefixed(1, 4, 2))
    with pytest.raises(ValueError, match="has no prefix_lengths"):
        Layout.full(1, 4).prefixes()
    with pytest.raises(ValueError, match=r"compat_mask is \(1, 3\)"):
        prefixed(1, 4, 2).with_compat_mask(torch.zeros(1, 3, dtype=torch.bool))
