"""Protocols: which models are trained on which list sizes, and tested on which."""

from __future__ import annotations

import hashlib

import msgspec

from seqmodels.configuration import nearest

ARMS = ("attention", "causal", "prefix")
Sizes = tuple[tuple[int, int], ...]


class Plan(msgspec.Struct, frozen=True):
    """One run. AdamW, linear warm-up, cosine to 0, fresh examples at every step.

    Attributes:
        train_sizes, test_sizes: (|A|, |B|), in the order in which the lists stand. A batch has one size; they
            take turns.
        steps, batch_size, learning_rate, weight_decay, warmup_steps: of the optimiser.
        test_count: examples of each test size.
    """

    vocab_size: int
    train_sizes: Sizes
    test_sizes: Sizes
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    test_count: int


class Cell(msgspec.Struct, frozen=True):
    """A model, a plan and a seed: everything that repeats a run.

    Attributes:
        arm: "causal", "prefix" or "attention".
        layer: registry name of the arm's mixer.
        d_model, num_heads, feature_dim: sizes (``feature_dim`` 0 for attention).
        pairs: times (gated_conv mlp mixer mlp).
        mlp_expansion: inner width over d_model; 0 leaves the MLPs out.
    """

    suite: str
    arm: str
    layer: str
    d_model: int
    num_heads: int
    feature_dim: int
    pairs: int
    mlp_expansion: int
    embedding_std: float
    plan: Plan
    seed: int
    device: str

    @property
    def name(self) -> str:
        width = f"d{self.d_model}" + (f"-f{self.feature_dim}" if self.feature_dim else "")
        return f"{self.suite}/{self.arm}/{width}/lr{self.plan.learning_rate:g}"

    @property
    def digest(self) -> str:
        """Of the whole content."""
        return hashlib.blake2b(msgspec.json.encode(self), digest_size=8).hexdigest()


class Suite(msgspec.Struct, frozen=True):
    """A grid: every arm at every width, learning rate and seed.

    Attributes:
        plan: with the first learning rate; the others replace it.
        attention_steps: of the control, which finds its solution late and at once.
    """

    plan: Plan
    attention_steps: int
    learning_rates: tuple[float, ...]
    d_model: tuple[int, ...]
    feature_dim: tuple[int, ...]
    seeds: int
    pairs: int
    mlp_expansion: int
    embedding_std: float
    device: str

    def cells(self, name: str) -> list[Cell]:
        """Every run; attention, which has no feature width, once for each d_model."""
        arms = [("attention", "attention", 0)]
        arms += [
            (arm, layer, width)
            for width in self.feature_dim
            for arm, layer in (("causal", "linear_attention"), ("prefix", "prefix_linear_attention"))
        ]
        return [
            Cell(
                suite=name, arm=arm, layer=layer, d_model=d_model, num_heads=2, feature_dim=width, pairs=self.pairs,
                mlp_expansion=self.mlp_expansion, embedding_std=self.embedding_std,
                plan=self._plan(arm, rate), seed=seed, device=self.device,
            )
            for seed in range(self.seeds)
            for arm, layer, width in arms
            for d_model in self.d_model
            for rate in self.learning_rates
        ]  # fmt: skip

    def _plan(self, arm: str, rate: float) -> Plan:
        steps = self.attention_steps if arm == "attention" else self.plan.steps
        return msgspec.structs.replace(self.plan, learning_rate=rate, steps=steps)


def both_orders(*sizes: tuple[int, int]) -> Sizes:
    """Each (small, large) pair and its swap."""
    return tuple(order for small, large in sizes for order in ((small, large), (large, small)))


SUITES = {
    "cpu": Suite(
        plan=Plan(
            vocab_size=64,
            train_sizes=both_orders((2, 24), (4, 24)),
            test_sizes=both_orders((2, 24), (4, 24)),
            steps=1200,
            batch_size=64,
            learning_rate=5e-3,
            weight_decay=0.1,
            warmup_steps=100,
            test_count=1000,
        ),
        attention_steps=2500,
        learning_rates=(5e-3,),
        d_model=(48,),
        feature_dim=(4, 8),
        seeds=2,
        pairs=2,
        mlp_expansion=0,
        embedding_std=0.5,
        device="cpu",
    ),
    # Sizes, vocabulary, widths, batch, optimiser and number of seeds of the paper; 48 epochs of 240,000 examples.
    "paper": Suite(
        plan=Plan(
            vocab_size=2048,
            train_sizes=both_orders((4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256)),
            test_sizes=both_orders(
                (1, 32), (4, 32), (4, 128), (16, 256), (4, 256), (16, 512), (4, 512), (8, 768), (16, 768), (4, 768)
            ),
            steps=90_000,
            batch_size=128,
            learning_rate=1e-4,
            weight_decay=0.1,
            warmup_steps=900,
            test_count=1000,
        ),
        attention_steps=90_000,
        learning_rates=(1e-4, 5e-4, 8e-4),
        d_model=(36, 48, 64, 96, 128),
        feature_dim=(4, 8, 16, 24),
        seeds=2,
        pairs=2,
        mlp_expansion=4,
        embedding_std=0.02,
        device="cuda",
    ),
}


def suite_named(name: str) -> Suite:
    """``ValueError`` with the nearest names when there is none."""
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}.{nearest(name, SUITES)} Known: {', '.join(SUITES)}")
    return SUITES[name]
