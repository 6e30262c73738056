"""The training loop: samples, loss, update, and now and then a report, a checkpoint, a validation."""

import logging
import math
import signal
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from stableavatar.data.dataset import Loaded
from stableavatar.data.samples import Batch, stack
from stableavatar.machine import memory_bytes
from stableavatar.models.kernels import check_backend
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.training.config import TrainConfig, parse_sizes
from stableavatar.training.encode import SampleEncoder
from stableavatar.training.estimate import flops_per_sample, table
from stableavatar.training.learner import Learner, check_sharing, check_trainable
from stableavatar.training.objective import Losses, Objective
from stableavatar.training.parts import check_model, load_frozen_parts
from stableavatar.training.processes import gather_objects, make_accelerator, on_main, sum_over_processes, training_dtype
from stableavatar.training.report import GIB, Report, Workers, check_wandb
from stableavatar.training.run_folder import RunFolder, read_record
from stableavatar.training.source import SIGNALS, SampleSource
from stableavatar.training.state import Position
from stableavatar.training.validation import Validation

logger = logging.getLogger(__name__)


class Trainer:
    """One run, from its settings; every process makes its own.

    Raises:
        ValueError: settings, files or clips that cannot be used, before anything is trained.
    """

    def __init__(self, config: TrainConfig) -> None:
        torch.set_flush_denormal(True)  # as in inference: the frames after the reference fade to denormals inside the VAE
        self.config = config
        self.accelerator = make_accelerator(config)
        self.folder = RunFolder(config.output, config.checkpoint.keep)
        self.validation = Validation(config, self.accelerator, self.folder.path)
        check_model(config, frozen=self._needs_encoders())
        check_sharing(config, self.accelerator, [*parse_sizes(config.data.sizes), *self.validation.sizes])
        check_trainable(config)
        check_wandb(config.log)
        check_backend(config.attention, self.accelerator.device, torch.float32)
        start = on_main(self.accelerator, lambda: self.folder.open(config))
        self.source = SampleSource(config, self.accelerator, self.folder.path)
        self.position = self._position(start)
        self.total_steps = self._total_steps()
        self.objective = Objective(config.objective, config.seed)
        self.learner = Learner(config, self.accelerator, self.total_steps, list(self.source.buckets))
        frozen = load_frozen_parts(config) if self._needs_encoders() else {}
        if frozen:
            StableAvatarPipeline(self.learner.transformer, **frozen)  # compares their widths
        self.encoder = SampleEncoder(frozen, self.learner.text_length, self.accelerator.device, config.encoders == "handover")
        if start:
            self.learner.load(start)
        self.report = self._make_report()
        self._since_save: Counter[str] = Counter()
        self._stop_asked = self._stopping = False

    def run(self) -> None:
        """Trains to the end, or to a signal that time is over; either way the last thing is a checkpoint.

        Raises:
            FloatingPointError: a loss or a gradient is not finite.
            ValueError: too many broken clips, or one that only some of the processes that share it can read.
        """
        with self._watching_signals():
            steps = self.source.steps(self.position.epoch, self.position.epoch_step)
            while self.position.step < self.total_steps and not self._stopping:
                self._step(next(steps))
            if self._since_save:
                self._save()
        self.report.close()
        said = "stopped by a signal" if self._stopping else "finished"
        self._say("%s at step %d of %d; the last checkpoint is %s", said, self.position.step, self.total_steps, self.folder.last())
        self._leave()

    def _leave(self) -> None:
        """Ends the group of processes. The wrapped model lets go of it first, or its threads may outlive it and abort the exit."""
        self.accelerator.wait_for_everyone()
        del self.learner
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def _step(self, forwards: list[list[Loaded]]) -> None:
        """One optimiser step, and what is due after it."""
        self.learner.model.train()
        tally, norm, sums = Counter(), None, {}
        for loaded in forwards:
            batch = self._encode(loaded)
            with self.accelerator.accumulate(self.learner.model):
                with self.accelerator.autocast():
                    losses = self.objective(self.learner.model, batch)
                self._count(tally, batch, losses)
                if self.accelerator.sync_gradients:  # before the update: after it the weights would be lost
                    sums = self._agree(tally, forwards)
                norm = self.learner.backward(self._share(batch, losses), self.position.step)
                if norm is not None and not math.isfinite(norm):
                    self._fail(f"the norm of the gradient is not finite ({norm})", forwards)
                self.learner.update()
        ended = self.position.advance(int(sums["samples"]), self.source.plan.steps_per_epoch)
        self._since_save.update({name: sums[name] for name in ("loss", "samples")})
        self._report(sums, norm)
        self._do_what_is_due(ended)

    def _encode(self, loaded: list[Loaded]) -> Batch:
        values = [entry.value for entry in loaded]
        if not self.config.data.cache:
            values = self.encoder.encode(values)
        return stack(values, self.learner.text_length, self.accelerator.device)

    def _share(self, batch: Batch, losses: Losses) -> Tensor:
        """This forward's part of the step's mean loss, as accelerate (which averages over forwards and processes) wants it."""
        places = self.accelerator.num_processes * self.config.accumulation
        return (batch.weights * losses.per_sample).sum() * places / batch.items[0].of

    def _count(self, tally: Counter[str], batch: Batch, losses: Losses) -> None:
        """Adds a forward's sums over samples to those of the step."""
        for name, values in {"loss": losses.per_sample.detach(), **losses.parts}.items():
            tally[name] += (values.double() * batch.weights).sum().cpu()
        tally["samples"] += float(batch.weights.sum())
        bucket = batch.items[0].bucket
        tally["tokens"] += len(batch.items) * bucket.tokens
        tally["flops"] += len(batch.items) * self.report.flops(bucket)

    def _agree(self, tally: Counter[str], forwards: list[list[Loaded]]) -> dict[str, float]:
        """The step's sums over all processes, and what follows for all alike: a loss that is not finite, broken clips, a signal."""
        own = {**tally, "stop": self._stop_asked, "broken": self.source.new_broken, "unlike": self._difference(forwards)}
        sums = sum_over_processes(self.accelerator, own)
        if sums["unlike"]:
            self._fail("processes that share their samples have read different ones", forwards, ValueError)
        sums = {name: value / self.config.parallel.size for name, value in sums.items()}  # of those that share, each counts its samples
        if not math.isfinite(sums["loss"]):
            self._fail(f"the loss is not finite ({sums['loss']})", [] if math.isfinite(tally["loss"]) else forwards)
        if self.source.too_many(int(sums["broken"])):
            self.source.tell_broken()
        self._stopping = sums["stop"] > 0
        return sums

    def _difference(self, forwards: list[list[Loaded]]) -> int:
        """Adds up to 0 over processes that share their samples if all of them could read the same."""
        read = zlib.crc32(repr([(entry.value.name, entry.value.item) for loaded in forwards for entry in loaded]).encode())
        share = self.config.parallel.size
        return read * (-1 if self.accelerator.process_index % share else share - 1)

    def _fail(self, what: str, forwards: list[list[Loaded]], kind: type[Exception] = FloatingPointError) -> None:
        """Raises an error that names the clips of all processes and the checkpoint to go on from; called by all of them."""
        names = gather_objects(self.accelerator, [entry.value.name for loaded in forwards for entry in loaded])
        clips, last = ", ".join(dict.fromkeys(names)), self.folder.last()
        raise kind(f"step {self.position.step + 1}: {what}; clips: {clips}; the last good checkpoint is {last}")

    def _make_report(self) -> Report:
        """Says what the run will cost, and opens its figures."""
        plans, device = self.learner.plans, self.accelerator.device
        self._say("memory of each process by estimate, GiB (activations are those of the largest moment of a step):\n%s",
                  table(plans, round(memory_bytes(device) / GIB, 1)))
        workers = Workers(device, training_dtype(self.config), self.accelerator.num_processes)
        folder = self.folder.path if self.accelerator.is_main_process else None
        return Report(self.config.log, folder, flops_per_sample(plans, self.config), workers, self.position.step, self.total_steps)

    def _report(self, sums: dict[str, float], norm: float) -> None:
        means = {name: sums[name] / max(1, sums["samples"]) for name in ("loss", "masked", "velocity", "motion") if name in sums}
        self.report.step(self.position.step, self.position.epoch, means, norm, self.learner.learning_rate, sums["tokens"], sums["flops"])

    def _do_what_is_due(self, epoch_ended: bool) -> None:
        """Account of broken clips, validation, checkpoint."""
        step, config = self.position.step, self.config
        if epoch_ended:
            self.source.tell_broken()
        with self.report.paused():
            if config.validation.every and step % config.validation.every == 0 and not self._stopping:
                self.validation.videos(step, self.learner, self.encoder)
            if step % config.checkpoint.every == 0:
                self._save()

    def _save(self) -> None:
        """Writes a checkpoint under a temporary name, then gives it its own; called by all processes."""
        step, partial = self.position.step, self.folder.partial(self.position.step)
        loss, measured = self._since_save["loss"] / max(1, self._since_save["samples"]), "mean training loss since the last checkpoint"
        hurried = self.validation.held_out and self._stopping  # when a job's time is over there is none for that loss
        if self.validation.held_out and not hurried:
            loss, measured = self.validation.loss(self.learner, self.encoder), "loss on held-out clips"
            self.report.validation(step, loss)
        on_main(self.accelerator, lambda: partial.mkdir(parents=True, exist_ok=True))
        self.learner.save(partial)
        self.accelerator.wait_for_everyone()
        record = {**asdict(self.position), "places": self.source.plan.places, "clips": len(self.source.clips),
                  "optimizer": self.config.optimizer.name, "measured": measured}
        path = on_main(self.accelerator, lambda: self.folder.publish(step, record, None if hurried else loss))
        self._since_save.clear()
        self._say("saved %s: %s %.5f", path, measured, loss)

    def _position(self, start: Path | None) -> Position:
        """Where to go on. With other clips or another number of samples per step an epoch is cut otherwise, and begins anew.

        Raises:
            ValueError: the checkpoint is of a run with another optimiser.
        """
        if start is None:
            return Position()
        record = read_record(start)
        if (name := record["optimizer"]) != self.config.optimizer.name:
            raise ValueError(f"{start} was saved with optimizer.name={name}, not {self.config.optimizer.name}; resume with the same, or "
                             "give another output and start from its weights")
        position = Position(**{field.name: record[field.name] for field in fields(Position)})
        if (record["places"], record["clips"]) != (self.source.plan.places, len(self.source.clips)):
            self._say("%s was saved with %d samples per step and %d clips, now %d and %d: epoch %d begins anew", start, record["places"],
                      record["clips"], self.source.plan.places, len(self.source.clips), position.epoch)
            position.epoch_step = 0
        self._say("going on from %s: step %d, epoch %d", start, position.step, position.epoch)
        return position

    def _total_steps(self) -> int:
        """Optimiser steps of the whole run, those already done included."""
        position, per_epoch = self.position, self.source.plan.steps_per_epoch
        total = position.step - position.epoch_step + (self.config.epochs - position.epoch) * per_epoch
        return min(total, self.config.max_steps or total)

    def _needs_encoders(self) -> bool:
        return not self.config.data.cache or self.validation.needs_encoders

    @contextmanager
    def _watching_signals(self) -> Iterator[None]:
        """Notes the signals that announce the end of a job's time; the step in work is finished first."""
        def note(number: int, frame: object) -> None:
            self._stop_asked = True

        self._stop_asked = False
        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _say(self, text: str, *values: object) -> None:
        if self.accelerator.is_main_process:
            logger.info(text, *values)
