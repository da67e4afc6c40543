"""Helpers of the tests of training methods: a DeiT-S with given options, a method's plans, options of a short run."""

from __future__ import annotations

from functools import lru_cache

import timm
import torch

from vitlocal.config import read_config
from vitlocal.methods.method import Method, MethodContext
from vitlocal.models.counts import count_macs
from vitlocal.models.shape import model_parts, temporary_shape
from vitlocal.plan import WHOLE_MODEL, Feed, Plan, Shape, fold
from vitlocal.progress import Progress

DEIT_S = "vitlocal_deit_small_patch16_224"
START = Plan(Feed(224, 64))
# 120 training images in batches of 32: four steps per epoch. The model has 4 blocks and a grid of 6 x 6.
COMMON = [
    "--model.depth=4", "--model.heads=4", "--budget.length=4ep", "--evaluate.every=2", "--model.drop_path=0.1",
    "--augment.mixup=0.8", "--train.ema_decay=0.9",
]  # fmt: skip


@lru_cache
def deit_s():
    with torch.device("meta"):
        return timm.create_model(DEIT_S)


@lru_cache
def macs(size: int, shape: Shape) -> int:
    with temporary_shape(deit_s(), shape, WHOLE_MODEL):
        return count_macs(deit_s(), shape.input_size or size)


def context_of(*options: str, images: int = 1000) -> MethodContext:
    """A DeiT-S whose recipe has these options."""
    config = read_config([f"--model.name={DEIT_S}", *(f"--{option}" for option in options)], {})
    return MethodContext(config.recipe, images, macs=macs, parts=model_parts(deit_s()), blocks=12)


def plan_at(method: Method, **progress) -> Plan:
    return fold([method], START, Progress(**progress))
