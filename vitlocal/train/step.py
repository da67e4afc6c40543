"""One training step, from uint8 images on the device to updated weights, without waiting for the device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitlocal.config import Config
from vitlocal.data.augment import Augment, step_generator
from vitlocal.data.source import Batch
from vitlocal.errors import ConfigError
from vitlocal.train.ema import Average

RUN_AHEAD = 2  # steps that the host may be ahead of a GPU: more, and the budget's clock would not be true


def choose_precision(wish: str, device: torch.device) -> torch.dtype:
    """The type that matrix products run in; ConfigError where the device does not have it."""
    if wish == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if wish == "fp16" and device.type != "cuda":
        raise ConfigError("train.precision: fp16 needs a CUDA device; use fp32, or bf16 where the CPU has it")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wish]


def step_seed(seed: int, step: int) -> int:
    """The seed of PyTorch's own generators in one step (drop path draws from them)."""
    return int(step_generator(seed, step).integers(2**62)) ^ 0x5EED


class Step:
    """Augments, runs the model forward and backward, and updates weights and their average."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average | None, config: Config,
        device: torch.device,
    ):  # fmt: skip
        self.model, self.optimizer, self.average, self.config = model, optimizer, average, config
        self.device = device
        self.augment = Augment(config.augment).to(device)
        self.precision = choose_precision(config.train.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self._ahead: deque[torch.cuda.Event] = deque()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def __call__(self, batch: Batch, step: int, lr: float) -> Tensor:
        """Trains on one batch at learning rate ``lr``; returns the loss, a detached 0-D tensor on the device."""
        train = self.config.train
        seed = self.config.run.seed
        torch.manual_seed(step_seed(seed, step))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        mixed = self.augment(batch.images, batch.labels, step_generator(seed, step))
        with self.autocast():
            logits = self.model(mixed.images)
        logits = logits.float()
        loss = F.cross_entropy(logits, mixed.labels, label_smoothing=train.label_smoothing)
        if mixed.share < 1:
            other = F.cross_entropy(logits, mixed.others, label_smoothing=train.label_smoothing)
            loss = mixed.share * loss + (1 - mixed.share) * other
        self.scaler.scale(loss).backward()
        if train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model)
        self._hold_back()
        return loss.detach()

    def _hold_back(self) -> None:
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        self._ahead.append(event)
        if len(self._ahead) > RUN_AHEAD:
            self._ahead.popleft().synchronize()  # device sync, with the step before the last one only
