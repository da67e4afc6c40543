"""A diffusion transformer in plain PyTorch: loss and samples.  python diffusion.py data/shapes 2m out.png"""

import sys

import torch
from torchvision.utils import save_image

import vitlocal
from vitlocal.tasks.noise_schedule import NoiseSchedule, denoising_losses
from vitlocal.tasks.sampling import SamplerOptions, sample, sample_keys


def train(folder: str, length: str, batch_size: int = 64, **model_options) -> tuple[float, torch.Tensor]:
    """Returns the last squared error of the noise, and a sample of each class, (K, 3, 32, 32) from -1 to 1."""
    curriculum = vitlocal.Curriculum.parse("16px until 60%, 32px")
    squares = dict(scale=(1, 1), ratio=(1, 1))  # the central square of each photo, perhaps mirrored
    loader = vitlocal.Loader(
        folder, "train", batch_size, size=16, **squares, dtype=torch.float32, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    budget = vitlocal.Budget(length, images_per_epoch=loader.images_per_epoch)
    classes, schedule = len(loader.classes), NoiseSchedule()
    model = vitlocal.create_model("vitlocal_dit_tiny_patch4_32", num_classes=classes, **model_options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    while not budget.over:
        loader.set_size(curriculum.size(budget.progress))
        for images, labels in loader:  # (B, 3, S, S) float32 from -1 to 1, and (B,) int64
            times = torch.randint(schedule.steps, (len(images),))
            noise = torch.randn_like(images)
            labels = torch.where(torch.rand(len(images)) < 0.1, classes, labels)  # no class, for guidance
            output = model(schedule.add_noise(images, times, noise), times, labels)
            error, bound = denoising_losses(schedule, output, images, times, noise)
            (error + bound).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            budget.step(len(images))
            if budget.over:
                break
    each = torch.arange(classes)
    how = SamplerOptions(steps=25, guidance=3.0)
    keys = sample_keys(0, each, torch.zeros_like(each))
    return error.mean().item(), sample(model, schedule, each, keys, 32, how, device=torch.device("cpu"))


if __name__ == "__main__":
    loss, images = train(*sys.argv[1:3])
    save_image(images / 2 + 0.5, sys.argv[3])
    print(f"squared error of the noise: {loss:.4f}; the samples are in {sys.argv[3]}")
