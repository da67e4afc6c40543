"""timm's optimizer, schedule, Mixup, loss and weight average.  python timm_train.py data/sample 2m"""

import sys

import torch
from timm import create_model
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy

import vitlocal
import vitlocal.models  # registers our models with timm

UPDATES = 1000  # of the schedule: timm counts updates, and a budget may be a time


def train(folder: str, length: str, batch_size: int = 64, **model_options) -> float:
    pixels = dict(size=48, dtype=torch.float32, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    loader = vitlocal.Loader(folder, "train", batch_size, scale=(0.35, 1), **pixels)
    budget = vitlocal.Budget(length, images_per_epoch=loader.images_per_epoch)
    classes = len(loader.classes)
    model = create_model("vitlocal_tiny_patch8_64", num_classes=classes, **model_options)
    average = ModelEmaV3(model, decay=0.99, use_warmup=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)  # not for norms and biases
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=UPDATES, updates_per_epoch=1, step_on_epochs=False, warmup_epochs=UPDATES // 20
    )
    mixup = Mixup(mixup_alpha=0.1, cutmix_alpha=0.1, label_smoothing=0.1, num_classes=classes)
    loss_of = SoftTargetCrossEntropy()
    while not budget.over:
        for images, labels in loader:
            schedule.step_update(round(UPDATES * budget.fraction))
            images, targets = mixup(images, labels)  # it changes the images in place: they belong to the caller
            loss_of(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            budget.step(len(images))
            average.update(model, step=budget.progress.step)
            if budget.over:
                break
    top1 = AverageMeter()
    with vitlocal.Loader(folder, "val", batch_size, **pixels) as val, torch.inference_mode():
        for images, labels in val:
            top1.update(accuracy(average.module.eval()(images), labels)[0].item(), len(images))
    return top1.avg / 100


if __name__ == "__main__":
    print(f"top-1: {train(*sys.argv[1:]):.1%}")
