"""Hugging Face Accelerate.  torchrun --nproc-per-node=2 accelerate_train.py data/sample 2m checkpoints"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.functional import cross_entropy

import vitlocal


def train(folder: str, length: str, checkpoint: str, batch_size: int = 64, **model_options) -> float:
    accelerator = Accelerator()
    set_seed(0)
    # The loader reads the part of this process, because Accelerator() came before. prepare() does not divide it again.
    pixels = dict(
        size=32, device=accelerator.device, dtype=torch.float32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    loader = vitlocal.Loader(folder, "train", batch_size, scale=(0.35, 1), **pixels)
    budget = vitlocal.Budget(length, images_per_epoch=loader.images_per_epoch)
    model = vitlocal.create_model("vitlocal_tiny_patch8_64", num_classes=len(loader.classes), **model_options)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    model, optimizer, batches = accelerator.prepare(model, optimizer, vitlocal.as_dataloader(loader))
    accelerator.register_for_checkpointing(loader, budget)
    schedule = vitlocal.LRSchedule("cosine", peak=2e-3, warmup=vitlocal.Length.parse("5%"))
    if Path(checkpoint).exists():
        accelerator.load_state(checkpoint)
    while not budget.over:  # all processes have the same number of batches, and rank 0's time
        for images, labels in batches:
            optimizer.param_groups[0]["lr"] = schedule(budget.progress)
            accelerator.backward(cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
            budget.step(len(images) * accelerator.num_processes)
            if budget.over:
                break
        with budget.pause():
            accelerator.save_state(checkpoint)
    val = vitlocal.Loader(folder, "val", batch_size, **pixels)
    model.eval()
    with torch.no_grad():
        correct = sum((model(images).argmax(1) == labels).sum() for images, labels in val)
    return accelerator.reduce(correct).item() / val.num_samples


if __name__ == "__main__":
    print(f"top-1: {train(*sys.argv[1:]):.1%}")
