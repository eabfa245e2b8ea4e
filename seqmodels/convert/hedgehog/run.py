"""A conversion from the first measurement to the finished folder; it can be killed at any time and goes on.

While it runs, everything is in ``OUT.partial``: the settings, and one checkpoint with the parameters
under training, the optimiser, the random generators, and all numbers measured so far. ``OUT`` appears at
the end, whole.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqmodels.configuration import dump_yaml
from seqmodels.convert.files import ConversionError, check_new, new_folder
from seqmodels.convert.hedgehog import measures, pictures, report
from seqmodels.convert.hedgehog.cores import ablated
from seqmodels.convert.hedgehog.data import ConversionData, model_tokenizer
from seqmodels.convert.hedgehog.distillation import Distillation
from seqmodels.convert.hedgehog.families import check_convertible
from seqmodels.convert.hedgehog.finetuning import add_trainable, check_peft, merged
from seqmodels.convert.hedgehog.models import check_swap, load_original, swap_attention
from seqmodels.convert.hedgehog.progress import Progress
from seqmodels.convert.hedgehog.settings import ConversionSettings
from seqmodels.convert.hedgehog.work import open_work
from seqmodels.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_files,
    generator_states,
    list_checkpoints,
    load_checkpoint,
    restore_generators,
    save_checkpoint,
)
from seqmodels.training.config import OptimizerConfig
from seqmodels.training.distributed import Processes, device_named
from seqmodels.training.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from seqmodels.training.schedule import learning_rate_factor

_LOGGED = 50  # rows of history a stage
_FIDELITY_ROWS = 8  # held-out rows whose weights are compared


def convert_model(
    settings: ConversionSettings, out: str | Path, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Converts ``settings.model`` into the folder ``out`` and returns what ``out/report.json`` holds.

    Args:
        resume: go on with the conversion in ``OUT.partial`` (from the start when there is none).
        progress: who is told how far it is; nobody when None.

    Raises:
        ConversionError: ``out`` is taken, another conversion is in ``OUT.partial``, or a model that
            cannot be converted. ConfigError, CorpusError, CheckpointError: see those.
    """
    settings.check()
    final = check_new(out)
    work = open_work(final, settings, resume)
    progress = progress or Progress(None)
    try:
        conversion = Conversion(settings, work, progress)
        conversion.run()
        with new_folder(final) as folder:
            conversion.write(folder)
    except BaseException:
        if not list_checkpoints(work):  # nothing to go on from, and in the way of the next attempt
            shutil.rmtree(work)
        raise
    finally:
        progress.close()
    shutil.rmtree(work)
    return conversion.summary()


class Conversion:
    """The pieces of one conversion.

    Attributes:
        measured: scores, fidelity tables and histories so far; saved with every checkpoint.
        checkpoint: where to go on from, until that is done: ``stage`` and ``step`` are its own.
    """

    def __init__(self, settings: ConversionSettings, work: Path, progress: Progress) -> None:
        self.settings, self.work, self.progress = settings, work, progress
        if settings.second_stage and settings.finetuning.method == "lora":
            check_peft()
        pictures.check_matplotlib()
        self.here = Processes(0, 1, device_named(settings.device))
        original = load_original(settings.model)
        check_convertible(original.config, type(original).__name__, settings.data.sequence_length)
        check_swap(original, settings.attention)
        self.data = ConversionData(settings, original.config)
        self.held_out = self.data.held_out()
        nn.Module.to(original, self.here.device)  # transformers wraps its own .to in a type that checkers misread
        self.measured: dict[str, Any] = {"scores": {}, "fidelity": {}, "history": {"1": [], "2": []}}
        self.stage, self.step = 1, 0
        latest = list_checkpoints(work)
        self.checkpoint = latest[-1] if latest else None
        if self.checkpoint is None:
            self._measure_score("teacher", original)
        else:
            trainer = check_files(self.checkpoint)
            if trainer["corpus"] != self.data.text.digest:
                raise CheckpointError(
                    f"{self.checkpoint} was made from another text: the files of {settings.data.source!r} or the "
                    f"tokenizer have changed since. Restore them, or delete {work} to start again"
                )
            self.measured, self.stage, self.step = trainer["measured"], trainer["stage"], trainer["step"]
            self.progress.message(f"going on from {self.checkpoint}: stage {self.stage}, step {self.step}")
        self.model = swap_attention(original, settings.attention)

    def run(self) -> None:
        """What is left of the measurements and of both stages."""
        linear = self.settings.attention.kind != "softmax"
        if self.checkpoint is None:
            self._measure_score("swapped", self.model)
            if linear:
                self._measure_fidelity("swapped")
        if self.stage == 1:
            if self.settings.first_stage and self.model.maps():
                self._distil()
                self._measure_score("distilled", self.model)
                self._measure_fidelity("distilled")
            if linear:
                pictures.draw_attention(self.model, self.held_out[0].to(self.here.device), self.work / "attention.png")
        if self.settings.second_stage:
            self._finetune()
            self._measure_score("finetuned", self.model)
            if linear:
                self._measure_fidelity("finetuned")
        if self.settings.attention.kind == "hedgehog_window":
            for branch in ("window", "linear"):
                with ablated(self.model, branch):
                    self._measure_score(f"without_{branch}", self.model)

    def summary(self) -> dict[str, Any]:
        return report.summary(self.settings, self.measured, self.model)

    def write(self, folder: Path) -> None:
        """Model, tokenizer, report and pictures."""
        self.model.save_pretrained(folder)
        tokenizer = model_tokenizer(self.settings)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / "conversion.yaml").write_text(dump_yaml(self.settings))
        if (self.work / "attention.png").exists():
            shutil.copy(self.work / "attention.png", folder)
        pictures.draw_losses(self.measured["history"], folder / "losses.png")
        report.write(self.summary(), folder)

    def _distil(self) -> None:
        settings = self.settings.distillation
        self.model.requires_grad_(False)
        for parameter in self.model.maps().values():
            parameter.requires_grad_(True)
        observer = Distillation(settings.loss, self.model.config.num_hidden_layers)
        self.model.eval()

        def step(index: int) -> dict[str, Any]:
            with torch.no_grad(), self.model.runtime.observed(observer):
                self.model(input_ids=self.data.train(index).tokens.to(self.here.device), use_cache=False)
            layers = [float(observer.losses[layer]) for layer in sorted(observer.losses)]
            return {"loss": sum(layers) / len(layers), "layers": layers}

        self._train(1, self.model, settings.learning_rate, self.settings.first_stage, step)

    def _finetune(self) -> None:
        settings, offset = self.settings.finetuning, self.settings.first_stage
        torch.manual_seed(self.settings.seed)  # before the updates are drawn; a checkpoint brings its own state
        trained = add_trainable(self.model, settings)

        def step(index: int) -> dict[str, Any]:
            trained.train()
            loss = measures.task_loss(trained, self.data.train(offset + index).to(self.here.device))
            loss.backward()
            return {"loss": float(loss.detach())}

        self._train(2, trained, settings.learning_rate, self.settings.second_stage, step)
        self.model = merged(trained)

    def _train(
        self, stage: int, model: nn.Module, learning_rate: float, steps: int, forward: Callable[[int], dict[str, Any]]
    ) -> None:
        """The loop of either stage; ``forward`` leaves gradients behind."""
        settings = self.settings
        config = OptimizerConfig(
            learning_rate=learning_rate, weight_decay=0.0, betas=(0.9, 0.999), gradient_clip=settings.gradient_clip
        )
        optimizer = make_optimizer(model, config)
        tensors = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad or ".linear_core." in name
        }
        begin, history = 0, self.measured["history"][str(stage)]
        if self.checkpoint is not None and stage == self.stage:
            begin = self._restore(tensors, model, optimizer)
        trainable = [parameter for parameter in tensors.values() if parameter.requires_grad]
        with self.progress.stage(stage, steps, begin) as show:
            for index in range(begin, steps):
                with torch.autocast(self.here.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                    row = forward(index)
                norm = float(torch.nn.utils.clip_grad_norm_(trainable, settings.gradient_clip))
                if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
                    raise self._diverged(stage, f"at step {index}: loss {row['loss']}, gradient norm {norm}")
                set_learning_rate(optimizer, learning_rate_factor(settings.schedule, index, steps))
                optimizer.step()
                optimizer.zero_grad()
                done = index + 1
                if done % max(1, steps // _LOGGED) == 0 or done == steps:
                    history.append({"step": done, **row})
                show(done, row["loss"])
                if done % settings.checkpoint_every == 0 or done == steps:
                    self._save(stage, done, model, tensors, optimizer)
        self.checkpoint = None  # the next stage starts from here, not from a file

    def _save(
        self,
        stage: int,
        step: int,
        model: nn.Module,
        tensors: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        trainer = {"stage": stage, "step": step, "corpus": self.data.text.digest, "measured": self.measured}
        place = step if stage == 1 else self.settings.first_stage + 1 + step
        weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in tensors.items()}
        checkpoint = Checkpoint(
            weights, optimizer_tensors(model, optimizer), generator_states(self.here.device), trainer
        )
        save_checkpoint(self.work, place, checkpoint, dump_yaml(self.settings), self.here, keep=1)

    def _restore(self, tensors: dict[str, nn.Parameter], model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        assert self.checkpoint is not None
        found = load_checkpoint(self.checkpoint, tensors, self.here)
        with torch.no_grad():
            for name, parameter in tensors.items():
                parameter.copy_(found.model[name])
        load_optimizer_tensors(model, optimizer, found.optimizer)
        restore_generators(found.rng, self.here.device)
        return self.step

    def _measure_score(self, name: str, model: nn.Module) -> None:
        self.progress.message(f"measuring: {name}")
        found = measures.score(model, self.held_out, self.here.device)
        self.measured["scores"][name] = {"loss": found.loss, "perplexity": found.perplexity, "tokens": found.tokens}
        self.progress.message(f"  held-out loss {found.loss:.4f} nats, perplexity {found.perplexity:.2f}")
        if not math.isfinite(found.loss):
            if name in ("teacher", "swapped"):
                raise ConversionError(
                    f"the {name} model's held-out loss is {found.loss}; is the original model intact?"
                )
            stage = 1 if name == "distilled" or not self.settings.second_stage else 2
            raise self._diverged(stage, f"unnoticed: the held-out loss behind it ({name}) is {found.loss}")

    def _diverged(self, stage: int, what: str) -> ConversionError:
        key = "distillation" if stage == 1 else "finetuning"
        rate = getattr(self.settings, key).learning_rate
        return ConversionError(
            f"stage {stage} diverged {what}; lower {key}.learning_rate (now {rate:g}) and start again, in another OUT "
            f"or without {self.work}"
        )

    def _measure_fidelity(self, name: str) -> None:
        batches, rows = [], _FIDELITY_ROWS
        for batch in self.held_out:
            if rows > 0:
                batches.append(type(batch)(batch.tokens[:rows], batch.targets[:rows]))
                rows -= len(batch.tokens)
        self.measured["fidelity"][name] = measures.fidelity(self.model, batches, self.here.device)
