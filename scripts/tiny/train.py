"""The training loop: packed rows, a schedule by time, checkpoints to resume from."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tiny.model import Shape, TinyLlama
from tiny.optimizer import make_optimizers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from tiny.data import Packer

    Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

logger = logging.getLogger(__name__)

ROWS_PER_STEP = 8
WARMUP_STEPS = 40
DECAY_START = 0.3
CHECKPOINT_EVERY_S = 240.0
LOG_EVERY = 50
BALANCE_WEIGHT = 0.01


@dataclass(frozen=True, slots=True)
class Budget:
    """When training ends: after `seconds` of it, or after `steps` if that comes first."""

    seconds: float
    steps: int | None = None

    def progress(self, elapsed_s: float, step: int) -> float:
        """Return the share of the budget that is used, 1 or more when it is spent."""
        by_steps = step / self.steps if self.steps else 0.0
        return max(elapsed_s / self.seconds, by_steps)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What the model card says about a run; `loss` is a running mean in nats per token."""

    steps: int
    tokens: int
    seconds: float
    loss: float
    tokens_by_source: dict[str, int]


def learning_rate_factor(progress: float, step: int) -> float:
    """Return the share of the peak rate: warm-up, a plateau, then linear to zero."""
    decay = min(1.0, (1.0 - progress) / (1.0 - DECAY_START))
    return max(0.0, min((step + 1) / WARMUP_STEPS, decay))


class Trainer:
    """A model in training, with all that a checkpoint holds."""

    def __init__(self, shape: Shape, packer: Packer, checkpoint: Path) -> None:
        torch.manual_seed(0)
        self.model = TinyLlama(shape)
        self._optimizers = make_optimizers(self.model)
        self._packer = packer
        self._checkpoint = checkpoint
        self._step, self._elapsed_s, self._loss = 0, 0.0, math.nan
        if checkpoint.exists():
            self._resume()

    def run(self, budget: Budget) -> TrainingResult:
        """Train until `budget` is spent, which it may be already."""
        if budget.progress(self._elapsed_s, self._step) < 1.0:
            self._run(budget)
        tokens = self._step * ROWS_PER_STEP * self.model.shape.n_context
        by_source = dict(self._packer.tokens_by_source)
        return TrainingResult(self._step, tokens, self._elapsed_s, self._loss, by_source)

    def _run(self, budget: Budget) -> None:
        forward = torch.compile(self.model)
        self._backward(forward, torch.zeros(ROWS_PER_STEP, self.model.shape.n_context + 1).long())
        self.model.zero_grad()
        # The clock starts here: the compiler's minute is not training time.
        started_s = saved_s = time.monotonic() - self._elapsed_s
        while (progress := budget.progress(self._elapsed_s, self._step)) < 1.0:
            latest = self._train_step(forward, learning_rate_factor(progress, self._step))
            self._loss = latest if math.isnan(self._loss) else 0.98 * self._loss + 0.02 * latest
            self._step += 1
            now_s = time.monotonic()
            self._elapsed_s = now_s - started_s
            if self._step % LOG_EVERY == 0:
                rate = self._step * ROWS_PER_STEP * self.model.shape.n_context / self._elapsed_s
                logger.info(
                    "step %d, %.0f %%, loss %.4f, %.0f tokens/s",
                    self._step,
                    100 * progress,
                    self._loss,
                    rate,
                )
            if now_s - saved_s > CHECKPOINT_EVERY_S:
                saved_s = now_s
                self._save()
        self._save()

    def _rows(self) -> NDArray[np.int64]:
        return self._packer.rows(ROWS_PER_STEP, self.model.shape.n_context + 1)

    def _train_step(self, forward: Forward, factor: float) -> float:
        loss = self._backward(forward, torch.from_numpy(self._rows()))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def _backward(self, forward: Forward, tokens: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss, imbalance = forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        (loss + BALANCE_WEIGHT * imbalance).backward()
        return float(loss.detach())

    def _resume(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._step, self._elapsed_s = state["step"], state["elapsed_s"]
        self._loss = state["loss"]
        for _ in range(self._step):
            self._rows()
        logger.info("resumed %s at step %d", self._checkpoint.name, self._step)

    def _save(self) -> None:
        partial = self._checkpoint.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "step": self._step,
            "elapsed_s": self._elapsed_s,
            "loss": self._loss,
        }
        torch.save(state, partial)
        partial.replace(self._checkpoint)
