"""FFCV's own loader with our decoder, for random crops that grow.  python ffcv_loader.py data/sample 2m"""

import sys
from pathlib import Path

import torch
from ffcv.fields.basics import IntDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import Squeeze, ToTensor, ToTorchImage
from torch.nn.functional import cross_entropy

import vitlocal


def train(folder: str, length: str, batch_size: int = 64, **model_options) -> tuple[float, float]:
    """Returns the mean loss of the first and of the last epoch."""
    crops = vitlocal.CropDecoder(32)  # in the place of FFCV's image decoder
    loader = Loader(
        str(next(Path(folder).glob("train_*.beton"))),
        batch_size=batch_size,
        num_workers=1,
        order=OrderOption.RANDOM,
        pipelines={"image": [crops, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )
    curriculum = vitlocal.Curriculum.parse("32px until 50%, 48px")
    budget = vitlocal.Budget(length, images_per_epoch=len(loader) * batch_size)
    classes = Path(folder, "classes.txt").read_text(encoding="utf-8").splitlines()
    model = vitlocal.create_model("vitlocal_tiny_patch8_64", num_classes=len(classes), **model_options)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = vitlocal.LRSchedule("cosine", peak=2e-3, warmup=vitlocal.Length.parse("5%"))
    epochs = []
    while not budget.over:
        crops.size = curriculum.size(budget.progress)  # of the next epoch; nothing is compiled again
        losses = []
        for images, labels in loader:  # (B, 3, S, S) uint8 and (B,)
            optimizer.param_groups[0]["lr"] = schedule(budget.progress)
            loss = cross_entropy(model(images.float() / 127.5 - 1), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            budget.step(len(images))
            losses.append(loss.item())
            if budget.over:
                break
        epochs.append(sum(losses) / len(losses))
    return epochs[0], epochs[-1]


if __name__ == "__main__":
    print("loss of the first and the last epoch:", *train(*sys.argv[1:]))
