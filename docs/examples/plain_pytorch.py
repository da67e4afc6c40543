"""Plain PyTorch: images that grow, a budget, a restart.  python plain_pytorch.py data/sample 2m checkpoint.pt"""

import sys
from pathlib import Path

import torch

import vitlocal


def train(folder: str, length: str, checkpoint: str, batch_size: int = 64, **model_options) -> float:
    pixels = dict(dtype=torch.float32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    curriculum = vitlocal.Curriculum.parse("32px until 50%, 48px until 80%, 64px")
    loader = vitlocal.Loader(folder, "train", batch_size, scale=(0.35, 1), **pixels)
    budget = vitlocal.Budget(length, images_per_epoch=loader.images_per_epoch)
    model = vitlocal.create_model("vitlocal_tiny_patch8_64", num_classes=len(loader.classes), **model_options)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    parts = dict(model=model, optimizer=optimizer, loader=loader, budget=budget)
    if Path(checkpoint).exists():
        for name, state in torch.load(checkpoint).items():
            parts[name].load_state_dict(state)
    while not budget.over:  # each turn is an epoch, or after a restart the rest of one
        loader.set_size(curriculum.size(budget.progress))
        for images, labels in loader:  # (B, 3, S, S) float32 and (B,) int64
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - budget.fraction)
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            budget.step(len(images))
            if budget.over:
                break
        with budget.pause():
            torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
    val = vitlocal.Loader(folder, "val", batch_size, size=64, **pixels)  # centre crops, in order
    with torch.inference_mode():
        return sum(int((model.eval()(images).argmax(1) == labels).sum()) for images, labels in val) / val.num_samples


if __name__ == "__main__":
    print(f"top-1: {train(*sys.argv[1:]):.1%}")
