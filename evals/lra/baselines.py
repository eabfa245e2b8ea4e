"""What needs no sequence model: the commonest label, the first token, and a bag of tokens."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from seqmodels.tasks.lra import Examples, TaskData

DECAYS = (0.0, 1e-4, 1e-3, 1e-2)  # of the bag's weights: chosen by validation
STEPS = 100


def baselines(data: TaskData) -> dict[str, float]:
    """Test accuracy in [0, 1] by name. ``data`` are single sequences of token ids."""
    if data.vocab_size is None or data.train.sequences != 1:
        raise ValueError("the baselines count tokens: they need a task of single token sequences, such as listops")
    return {
        "label_prior": _share(np.full(len(data.test), _commonest(data.train.labels)), data.test),
        "first_token": _first_token(data, data.vocab_size),
        "bag_of_tokens": _bag(data, data.vocab_size),
    }


def _commonest(labels: np.ndarray) -> int:
    return int(np.bincount(labels).argmax())


def _share(predictions: np.ndarray, examples: Examples) -> float:
    return float((predictions == examples.labels).mean())


def _first_token(data: TaskData, vocab_size: int) -> float:
    """The commonest label after each first token: in ListOps, the operator at the root."""
    first = data.train.values[data.train.offsets[:-1]]
    table = np.full(vocab_size, _commonest(data.train.labels))
    for token in np.unique(first):
        table[token] = _commonest(data.train.labels[first == token])
    return _share(table[data.test.values[data.test.offsets[:-1]]], data.test)


def _counts(examples: Examples, vocab_size: int) -> torch.Tensor:
    """(examples, vocab_size + 1): the share of each token, and the length in thousands."""
    rows = np.repeat(np.arange(len(examples)), examples.lengths)
    flat = np.bincount(rows * vocab_size + examples.values, minlength=len(examples) * vocab_size)
    counts = torch.from_numpy(flat.reshape(len(examples), vocab_size)).double()
    length = counts.sum(1, keepdim=True)
    return torch.cat([counts / length, length / 1000], 1)


def _bag(data: TaskData, vocab_size: int) -> float:
    """Multinomial logistic regression on standardised token shares, fitted to the end by L-BFGS."""
    train = _counts(data.train, vocab_size)
    mean, std = train.mean(0), train.std(0).clamp_min(1e-12)
    parts = [(_counts(part, vocab_size) - mean) / std for part in (data.train, data.validation, data.test)]
    labels = torch.from_numpy(data.train.labels)
    best = (-1.0, 0.0)
    for decay in DECAYS:
        classes = int(labels.max()) + 1
        weight = torch.zeros(classes, vocab_size + 1, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure(weight=weight, bias=bias, optimizer=optimizer, decay=decay) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(parts[0] @ weight.T + bias, labels) + decay * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found = [(part @ weight.T + bias).argmax(1).numpy() for part in parts[1:]]
        best = max(best, (_share(found[0], data.validation), _share(found[1], data.test)))
    return best[1]
