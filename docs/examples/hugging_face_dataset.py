"""From a dataset of Hugging Face to batches.  python hugging_face_dataset.py data/colours"""

import io
import sys

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow

import vitlocal

CLASSES = ["red", "green", "blue"]


def colours(count: int) -> Dataset:
    """A dataset in memory. ``datasets.load_dataset(NAME, split="train")`` gives you one of the hub."""
    images = []
    for number in range(count):
        file = io.BytesIO()
        Pillow.new("RGB", (96, 64), CLASSES[number % 3]).save(file, "JPEG")
        images.append({"bytes": file.getvalue(), "path": None})
    rows = {"image": images, "label": [number % 3 for number in range(count)]}
    return Dataset.from_dict(rows, Features(image=Image(), label=ClassLabel(names=CLASSES)))


def convert(dataset: Dataset, folder: str, batch_size: int = 8) -> vitlocal.Loader:
    """Writes the dataset, and opens it."""
    files = dataset.cast_column("image", Image(decode=False))  # files as they are, not decoded
    vitlocal.write(files, folder, "train", sides="96:jpg", progress=False)
    return vitlocal.Loader(folder, "train", batch_size, size=32, dtype=torch.float32)


if __name__ == "__main__":
    with convert(colours(24), sys.argv[1]) as loader:
        for images, labels in loader:
            print(images.shape, [loader.classes[label] for label in labels])
