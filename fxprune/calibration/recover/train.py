"""train: a student taught by the dense program, from any step to the end, with the best that was measured kept."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxprune.calibration.batches import Batch, batch_of, check_call
from fxprune.calibration.checkpoint import Checkpoint
from fxprune.capture.capture import Capture
from fxprune.check.calls import Call
from fxprune.errors import InputError
from fxprune.graph.compat import GroupNormGoesBackward

from .feed import Feed
from .matching import Distance
from .student import Student, Tapped

# Validation comes about every 5% of a run. A validated batch costs half as much as one that is trained on, so with so
# many steps for each of them it takes a tenth of the time at most.
_SHARE = 0.05
_STEPS_A_BATCH = 5
_WARM_UP = 10
_LAST_RATE = 0.02
_MOST_IN_A_ROW = 10


@dataclasses.dataclass(frozen=True)
class Length:
    """How long to train: so many steps, or so many seconds where no steps are given."""

    seconds: float
    steps: int | None

    def share(self, standing: Standing) -> float:
        """How much of it is over, from 0."""
        return standing.seconds / self.seconds if self.steps is None else standing.step / self.steps

    def is_over(self, standing: Standing) -> bool:
        """Whether to stop: in time for a last validation, and not before the first step."""
        if self.steps is not None:
            return standing.step >= self.steps
        return standing.step > 0 and standing.seconds + standing.validation >= self.seconds

    def is_due(self, standing: Standing, batches: int) -> bool:
        """Whether to measure now how training goes, on so many batches."""
        steps = standing.step - standing.validated
        if steps < _STEPS_A_BATCH * batches:
            return False
        if self.steps is not None:
            return steps >= math.ceil(_SHARE * self.steps)
        return self.share(standing) - standing.validated_share >= _SHARE


@dataclasses.dataclass
class Standing:
    """Where a training stands.

    step        batches gone through; `seconds` is the time they took, with validation
    before      the validation loss at the start; `best` the lowest so far
    validated   the step of the last validation, which took `validation` seconds; `validated_share` of the run was over
    in_a_row    steps that were skipped one after the other, up to now
    """

    step: int = 0
    seconds: float = 0.0
    before: float = math.nan
    best: float = math.inf
    validated: int = 0
    validated_share: float = 0.0
    validation: float = 0.0
    in_a_row: int = 0


class Trainer:
    """Teaches a student what the dense program gives; `run` answers with the best values."""

    def __init__(self, captured: Capture, student: Student, taps: Sequence[str], distance: Distance) -> None:
        self._captured, self._student, self._distance = captured, student, distance
        self._teacher = Tapped(captured.program, taps)
        self._pupil = Tapped(student.program, taps)
        self._optimiser = torch.optim.Adam(list(student.trained.values()), betas=(0.9, 0.98))
        self.standing = Standing()
        self.best: dict[str, Tensor] = {}

    def run(self, feed: Feed, length: Length, rate: float, file: Checkpoint, *, progress: bool) -> dict[str, Tensor]:
        """Trains to the end of `length`, from where `resume` put it. The file is written after each validation."""
        held_out = [self._batch(call) for call in feed.held_out]
        feed.skip(self.standing.step)
        clock = _Clock(self.standing)
        with torch.inference_mode(False), _bar(self.standing, length, progress) as bar:
            if not self.best:
                self._validate(held_out, length, clock)
                self.standing.before = self.standing.best
                self._write(file)
            # What comes out as the dense model does has nothing to learn.
            while self.standing.before > 0 and not length.is_over(self.standing):
                loss = self._step(feed.next(), rate * _slope(self.standing.step, length.share(self.standing)))
                clock.tick()
                if length.is_due(self.standing, len(held_out)):
                    self._validate(held_out, length, clock)
                    self._write(file)
                _show(bar, self.standing, length, loss)
            if self.standing.validated < self.standing.step:
                self._validate(held_out, length, clock)
        return self.best

    def resume(self, held: dict[str, Any]) -> None:
        """Goes on from what a file holds."""
        self.standing = Standing(**held["standing"])
        self._student.put(held["now"])
        self.best = {name: best.to(self._student.trained[name].device) for name, best in held["best"].items()}
        self._optimiser.load_state_dict(held["optimiser"])

    def _write(self, file: Checkpoint) -> None:
        now = {name: tensor.detach() for name, tensor in self._student.trained.items()}
        state = self._optimiser.state_dict()
        file.write(standing=dataclasses.asdict(self.standing), now=now, best=self.best, optimiser=state)

    def _batch(self, call: Call) -> Batch:
        check_call(self._captured, call)
        return batch_of(self._captured, call)

    def _loss(self, batch: Batch) -> Tensor:
        self._pupil.values = self._student.values()
        with torch.no_grad():
            wanted = self._teacher.forward(batch)
        return self._distance(self._pupil.forward(batch), wanted, batch)

    def _step(self, call: Call, rate: float) -> float:
        """One batch; where its loss or a gradient is not finite, nothing changes. Answers the loss."""
        batch = self._batch(call)
        parameters = list(self._student.trained.values())
        with torch.enable_grad(), GroupNormGoesBackward():
            loss = self._loss(batch)
        if not loss.requires_grad:
            raise InputError(
                "cannot train the pruned model",
                where=batch.label,
                why="the loss does not depend on any parameter that could be trained",
                do="Give a loss= that keeps gradients, or prune weights that the outputs depend on.",
            )
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        # What never has a gradient Adam never moves, so masked elements stay the +0.0 that they start as.
        for name, gone in self._student.gone.items():
            gradient = self._student.trained[name].grad
            if gradient is not None:
                gradient.masked_fill_(gone, 0.0)
        length = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.standing.step += 1
        if not math.isfinite(float(loss.detach()) + float(length)):
            self._skip(batch)
            return math.nan
        self.standing.in_a_row = 0
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        return float(loss.detach())

    def _skip(self, batch: Batch) -> None:
        self.standing.in_a_row += 1
        if self.standing.in_a_row >= _MOST_IN_A_ROW:
            raise InputError(
                "cannot go on training",
                where=batch.label,
                why=f"the loss or its gradient was NaN or infinite in {_MOST_IN_A_ROW} steps, one after the other",
                do="Give a lower learning_rate=, or look at this batch with the model itself.",
            )

    @torch.no_grad()
    def _validate(self, held_out: Sequence[Batch], length: Length, clock: _Clock) -> None:
        losses = [float(self._loss(batch)) for batch in held_out]
        loss = sum(losses) / len(losses)
        if not self.best and not math.isfinite(loss):
            bad = next(batch for batch, loss in zip(held_out, losses) if not math.isfinite(loss))
            raise InputError(
                "cannot measure how far the pruned model is from the dense one",
                where=bad.label,
                why="one of them gives NaN there, or numbers whose squares are infinite",
                do="Look at this batch with the model itself, and with the result of transform(selection=...).",
            )
        if not self.best or loss < self.standing.best:
            self.standing.best = loss
            self.best = {name: tensor.detach().clone() for name, tensor in self._student.trained.items()}
        self.standing.validation = clock.tick()
        self.standing.validated, self.standing.validated_share = self.standing.step, length.share(self.standing)


class _Clock:
    """Adds the time that passes to a standing."""

    def __init__(self, standing: Standing) -> None:
        self._standing, self._last = standing, time.perf_counter()

    def tick(self) -> float:
        """The seconds since the last tick."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        self._standing.seconds += passed
        return passed


def _slope(step: int, share: float) -> float:
    """The share of the learning rate at a step: it rises for ten of them, and falls to the end of the run."""
    return min(1.0, (step + 1) / _WARM_UP) * max(_LAST_RATE, 1.0 - share)


def _bar(standing: Standing, length: Length, progress: bool) -> Any:
    return tqdm(
        total=length.seconds if length.steps is None else length.steps,
        initial=_done(standing, length),  # pyright: ignore[reportArgumentType]
        desc="recover",
        disable=None if progress else True,
        leave=False,
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
    )


def _show(bar: Any, standing: Standing, length: Length, loss: float) -> None:
    bar.set_postfix_str(f"loss {loss:.4f}, best {standing.best:.4f}", refresh=False)
    bar.update(_done(standing, length) - bar.n)


def _done(standing: Standing, length: Length) -> float:
    return standing.step if length.steps is not None else min(length.seconds, standing.seconds)
