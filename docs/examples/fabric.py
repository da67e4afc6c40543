"""Lightning Fabric, here with two processes.  python fabric.py data/sample 2m run.ckpt 2"""

import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch.nn.functional import cross_entropy

import vitlocal


def train(
    folder: str, length: str, checkpoint: str, devices: str = "1", batch_size: int = 64, **model_options
) -> float:
    fabric = Fabric(devices=int(devices))
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    # The loader reads the part of this process, because launch() came before. Fabric need not divide it again.
    pixels = dict(
        size=32, device=fabric.device, dtype=torch.float32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    loader = vitlocal.Loader(folder, "train", batch_size, scale=(0.35, 1), **pixels)
    budget = vitlocal.Budget(length, images_per_epoch=loader.images_per_epoch)
    model = vitlocal.create_model("vitlocal_tiny_patch8_64", num_classes=len(loader.classes), **model_options)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), weight_decay=0.05))
    schedule = vitlocal.LRSchedule("cosine", peak=2e-3, warmup=vitlocal.Length.parse("5%"))
    state = dict(model=model, optimizer=optimizer, loader=loader, budget=budget)
    if Path(checkpoint).exists():
        fabric.load(checkpoint, state)
    while not budget.over:  # all processes have the same number of batches, and rank 0's time
        for images, labels in loader:
            optimizer.param_groups[0]["lr"] = schedule(budget.progress)
            fabric.backward(cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
            budget.step(len(images) * fabric.world_size)
            if budget.over:
                break
        with budget.pause():
            fabric.save(checkpoint, state)
    val = vitlocal.Loader(folder, "val", batch_size, **pixels)
    model.eval()
    with torch.no_grad():
        correct = sum((model(images).argmax(1) == labels).sum() for images, labels in val)
    return fabric.all_reduce(correct, reduce_op="sum").item() / val.num_samples


if __name__ == "__main__":
    print(f"top-1: {train(*sys.argv[1:]):.1%}")
