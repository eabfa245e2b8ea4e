"""The training loop: one process, or one of several under torchrun.

A step is: ``accumulation`` micro-batches forward and backward, gradients averaged over
processes, a look at whether everything is finite, clip, AdamW. Everything that decides a weight
is in the configuration, the corpus and the checkpoint, so a run that was killed and goes on ends
with the weights of one that was not (bit for bit on the same machine and number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

from seqmodels.configuration import dump_yaml
from seqmodels.mixers.base import Mixer
from seqmodels.models import LanguageModel
from seqmodels.models.running_parts import running_parts
from seqmodels.tasks.text import PackedText, TextBatch
from seqmodels.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    generator_states,
    load_checkpoint,
    restore_generators,
    save_checkpoint,
)
from seqmodels.training.config import TrainConfig
from seqmodels.training.curriculum import Curriculum, check_carried_ramps
from seqmodels.training.data import TextData, load_text
from seqmodels.training.display import Display
from seqmodels.training.distributed import Processes, gradient_exchange, parallelize, processes
from seqmodels.training.divergence import (
    diverged,
    first_non_finite_output,
    non_finite_gradients,
)
from seqmodels.training.feed import Feed, micro_batch_rows
from seqmodels.training.gradients import check_sparse_gradients, clip_gradients, gradient_norm, settle_sparse_gradients
from seqmodels.training.objective import ObjectiveOutput, buffers_kept, make_objective, state_template
from seqmodels.training.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
    sparse_parameters,
)
from seqmodels.training.plot import plot_losses
from seqmodels.training.reading import reading_plan
from seqmodels.training.run_folder import RunFolder
from seqmodels.training.schedule import learning_rate_factor


class TrainingResult(NamedTuple):
    """A finished run: its folder, the model with its last weights, and the data it was trained on."""

    run: RunFolder
    model: LanguageModel
    data: TextData


def train(config: TrainConfig, folder: Path, *, resume: bool = False, console: Console | None = None) -> TrainingResult:
    """Trains a language model as ``config`` says into the run folder ``folder``.

    Args:
        config: see :class:`~seqmodels.training.config.TrainConfig`.
        folder: made when it is not there.
        resume: go on from the newest complete checkpoint of ``folder`` (from the start when there is none).
        console: where progress goes; silent when None.

    Raises:
        RunFolderError, CheckpointError, CorpusError, ConfigError: see those.
        TrainingDiverged: the loss or a gradient is not finite.
    """
    with processes(config.device) as here:
        trainer = Trainer(config, folder, here, resume=resume, console=console if here.is_main else None)
        trainer.fit()
        return TrainingResult(trainer.run, trainer.model, trainer.data)


class Trainer:
    """The pieces of a run and the loop over them."""

    def __init__(
        self, config: TrainConfig, folder: Path, here: Processes, *, resume: bool, console: Console | None
    ) -> None:
        self.config = config
        self.here = here
        for span in reading_plan(config):
            micro_batch_rows(config, span, here.world_size)  # refused before text is read
        # The main process tokenises; the others then find the cache.
        here.on_main(self._load_text)
        self.data = self._load_text()
        self.feed = Feed(config, self.data, here)
        torch.manual_seed(config.seed)
        self.model = LanguageModel(config.model).to(here.device)
        sparse = sparse_parameters(self.model)
        sharded = config.parallel == "fsdp" and here.world_size > 1
        check_sparse_gradients(sparse, sharded=sharded, compiled=config.compile)
        self._template = state_template(self.model) if self.feed.longest is not None else None
        if config.curriculum is not None:
            check_carried_ramps(config.curriculum, self.model, self.feed.spans)
        self.run = self._open_run(folder, resume)
        objective = make_objective(self.model, self.feed.masking, self.feed.longest)
        self.parts = objective.parts
        if config.compile:
            objective.compile()
        curriculum = config.curriculum
        blocks = list(self.model.backbone.blocks)
        self.objective = parallelize(
            objective, blocks, config.parallel, here, whole=curriculum is None, apart=sparse_parameters(objective)
        )
        self.curriculum = None
        if curriculum is not None:
            self.curriculum = Curriculum(curriculum, self.model, config.steps, config.seed)
        part = self.curriculum.part if self.curriculum else lambda name: None
        self.optimizer = make_optimizer(self.model, config.optimizer, part)
        self._layers = [layer for layer in self.model.modules() if isinstance(layer, Mixer)]
        # Dropout differs from process to process; the weights above do not.
        torch.manual_seed(config.seed * 1_000_003 + here.rank)

        self.step = 0
        self._loss_sum, self._loss_count = [0.0] * len(self.parts), 0  # since the last metric row
        self._aux: dict[str, float] = {}  # the layers' losses and metrics in the last step
        self._carried_share = 0.0
        latest = self.run.latest() if resume else None
        if latest is not None:
            self._restore(latest)
        here.on_main(lambda: self.run.rewind(self.step))
        self.display = Display(console, config.steps, self.step)
        if latest is not None:
            self.display.message(f"going on from {latest}")

    def fit(self) -> None:
        """Runs the steps that are left, then draws the curves."""
        config = self.config
        try:
            clock, counted = time.perf_counter(), self.step
            while self.step < config.steps:
                factor = learning_rate_factor(config.schedule, self.step, config.steps)
                if self.curriculum:
                    self.curriculum.begin(self.step)
                self.feed.begin(self.step)
                losses, gradient_norm = self._take_step(factor)
                self._loss_sum = [total + loss for total, loss in zip(self._loss_sum, losses, strict=True)]
                self._loss_count += 1
                self.display.step(self.step)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    seconds = time.perf_counter() - clock
                    self._log(factor, gradient_norm, (self.step - counted) / seconds)
                    clock, counted = time.perf_counter(), self.step
                aside = time.perf_counter()
                if self.data.validation and (self.step % config.validate_every == 0 or self.step == config.steps):
                    self._validate(self.data.validation)
                if self.step % config.checkpoint.every == 0 or self.step == config.steps:
                    self._save()
                clock += time.perf_counter() - aside
        finally:
            self.display.close()
        if self.here.is_main:
            plot_losses(list(self.run.rows()), self.run.path / "loss.png")
        self.display.message(f"run folder: {self.run.path}")

    def _take_step(self, factor: float) -> tuple[list[float], float]:
        config = self.config
        self.objective.train()
        batches = self.feed.batches()
        mean, aux, states = torch.zeros((), device=self.here.device), {}, []
        for index, batch in enumerate(batches):
            with gradient_exchange(self.objective, last=index == config.accumulation - 1):
                loss, parts, aux, state = self._forward(self.feed.arguments(batch, index))
                with buffers_kept(self.model, config.model.activation_checkpointing or self.feed.recomputes):
                    (loss / config.accumulation).backward()
            numbers = torch.cat([parts, *(value.reshape(1) for value in aux.values())]).detach()
            mean = mean + numbers / config.accumulation
            states.append(state)
        settle_sparse_gradients(self.model.parameters(), self.here)
        norm = gradient_norm(self.model.parameters())
        *losses, norm_value = torch.cat([self.here.mean(mean), norm.to(mean)[None]]).tolist()
        self._aux = dict(zip(aux, losses[len(self.parts) :], strict=True))
        del losses[len(self.parts) :]
        if not all(map(math.isfinite, (*losses, norm_value))):
            self._stop(batches, losses, norm_value)  # before clipping, which spreads a NaN to all gradients
        if config.optimizer.gradient_clip is not None:
            clip_gradients(self.model.parameters(), config.optimizer.gradient_clip, norm)
        curriculum = self.curriculum
        own = (lambda part: curriculum.factor(part, self.step)) if curriculum else lambda part: 1.0
        set_learning_rate(self.optimizer, factor, own)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for layer in self._layers:
            layer.after_optimizer_step()
        self._carried_share = self.feed.carried_share(batches)
        self.feed.keep(states)
        self.step += 1
        return losses, norm_value

    def _load_text(self) -> TextData:
        return load_text(self.config.data, seed=self.config.seed, vocab_size=self.config.model.vocab_size)

    def _forward(self, arguments: tuple[Any, ...]) -> ObjectiveOutput:
        with torch.autocast(self.here.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return self.objective(*arguments)

    def _log(self, factor: float, gradient_norm: float, steps_per_second: float) -> None:
        means = {name: total / self._loss_count for name, total in zip(self.parts, self._loss_sum, strict=True)}
        self._loss_sum, self._loss_count = [0.0] * len(self.parts), 0
        tokens_per_step = self.config.batch_size * self.config.data.sequence_length
        self._write(
            **means,
            bits_per_byte=means["loss"] / math.log(2) / self.data.train.bytes_per_token,
            learning_rate=self.config.optimizer.learning_rate * factor,
            gradient_norm=gradient_norm,
            tokens=self.step * tokens_per_step,
            tokens_per_second=steps_per_second * tokens_per_step,
            **({"layers": self._aux} if self._aux else {}),
            **self._reading(),
            **self._stage(),
        )

    def _reading(self) -> dict[str, Any]:
        """How the last step read the text, where that is not the same in all steps."""
        if self.feed.reader.plain:
            return {}
        span = self.feed.reader.span(self.step - 1)
        reading = {"sequence_length": span.sequence_length, "windows": span.windows, "rows": span.rows}
        return reading | ({"carried_share": self._carried_share} if span.carry else {})

    def _stage(self) -> dict[str, Any]:
        """The curriculum's stage of the last step, and the gates by part."""
        if self.curriculum is None:
            return {}
        stage = self.curriculum.stages[self.curriculum.stage(self.step - 1)]
        return {"stage": stage.name, "gates": self.curriculum.gates()}

    @torch.no_grad()
    def _validate(self, data: PackedText) -> None:
        """Mean loss over a fixed sample of held-out rows, the same at every validation."""
        self.objective.eval()
        total = torch.zeros(len(self.parts), device=self.here.device)
        for count, arguments in self.feed.validation(data):
            total += self._forward(arguments).parts * count
        losses = self.here.mean(total / self.feed.validation_rows(data)).tolist()
        means = {f"validation_{name}": loss for name, loss in zip(self.parts, losses, strict=True)}
        self._write(**means, validation_bits_per_byte=losses[0] / math.log(2) / data.bytes_per_token)

    def _write(self, **values: Any) -> None:
        row = {"step": self.step, **values, "time": time.time()}
        if self.here.is_main:
            self.run.append(row)
            self.display.row(row)

    def _save(self) -> None:
        checkpoint = Checkpoint(
            model=self._weights(),
            optimizer=optimizer_tensors(self.model, self.optimizer),
            rng=generator_states(self.here.device),
            carried=self.feed.state_tensors(),
            trainer={
                "step": self.step,
                "rows": self.feed.reader.number(self.step),
                "corpus": self.data.digest,
                "world_size": self.here.world_size,
                "loss_sum": self._loss_sum,
                "loss_count": self._loss_count,
            },
        )
        save_checkpoint(
            self.run.checkpoints,
            self.step,
            checkpoint,
            dump_yaml(self.config),
            self.here,
            keep=self.config.checkpoint.keep,
            parts=running_parts(self.model),
        )

    def _restore(self, path: Path) -> None:
        checkpoint = load_checkpoint(path, self._weights(), self.here)
        if checkpoint.trainer["corpus"] != self.data.digest:
            raise CheckpointError(
                f"{path} was trained on another text: the files of {self.config.data.source!r} or the tokenizer have "
                "changed since, so its data position means nothing. Start a new run, or restore the files"
            )
        # Names were compared above; a tensor with two names is stored under the first one only.
        self.model.load_state_dict(checkpoint.model, strict=False)
        try:
            untrained = self.curriculum.untrained(checkpoint.trainer["step"]) if self.curriculum else ()
            load_optimizer_tensors(self.model, self.optimizer, checkpoint.optimizer, untrained)
        except KeyError as error:
            raise CheckpointError(
                f"{path / 'optimizer.safetensors'} has no entry {error}; it belongs to another model"
            ) from error
        restore_generators(checkpoint.rng, self.here.device)
        self.step = checkpoint.trainer["step"]
        self._loss_sum, self._loss_count = checkpoint.trainer["loss_sum"], checkpoint.trainer["loss_count"]
        self.feed.load_states(checkpoint.carried, self._template)

    def _weights(self) -> dict[str, Tensor]:
        """The state dict without the second name of a shared tensor."""
        seen: set[int] = set()
        weights = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                weights[name] = tensor.detach()
        return weights

    def _open_run(self, folder: Path, resume: bool) -> RunFolder:
        self.here.on_main(lambda: (RunFolder.resume if resume else RunFolder.create)(folder, self.config))
        return RunFolder(folder)

    def _stop(self, batches: list[TextBatch], losses: list[float], norm: float) -> None:
        """Saves the batch and the weights before this step, and raises :class:`TrainingDiverged`."""
        weights = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self._weights().items()
        }
        raise diverged(
            self.run.path / f"diverged_step_{self.step:08d}",
            f"step {self.step}: {', '.join(f'{a} {b}' for a, b in zip(self.parts, losses, strict=True))}, "
            f"gradient norm {norm}",
            batches,
            weights if self.here.is_main else None,
            rank=self.here.rank,
            output=first_non_finite_output(self.objective, self._replay(batches)),
            gradients=non_finite_gradients(self.model),
            carried=self.feed.state_tensors(),
        )

    def _replay(self, batches: list[TextBatch]) -> Iterator[Tensor]:
        for index, batch in enumerate(batches):
            yield self._forward(self.feed.arguments(batch, index)).loss
