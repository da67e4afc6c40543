"""Published top-1 accuracies on ImageNet-1k of Vision Transformers with 16-px patches, for a law of accuracy.

Multiply-adds are counted from our models of these sizes. The rows of EfficientTrain++ have small images first: its
"epochs" are the compute, in epochs at 224 px. ViT-B of DeiT III was trained at 192 px, then 20 epochs at 224 px. A
source in brackets was read second-hand, from this project's notes on the paper.
"""

MACS = {"Ti": 1.254e9, "S": 4.599e9, "B": 17.564e9}  # at 224 px
IMAGENET = 1_281_167  # images in an epoch

# Recipe: (source, rows of model, epochs, top-1 %). A recipe with a single row cannot support a law: it is a check.
PUBLISHED: dict[str, tuple[str, tuple[tuple[str, float, float], ...]]] = {
    "DeiT": (
        "facebookresearch/deit, README_deit.md, Model Zoo; [75 to 225 epochs: Budgeted Training, ICLR 2023, the best "
        "baselines with shorter learning rate schedules]",
        (("Ti", 300, 72.2), ("S", 300, 79.9), ("B", 300, 81.8), ("S", 75, 73.2), ("S", 150, 78.1), ("S", 225, 79.6),
         ("B", 75, 77.4), ("B", 150, 79.2), ("B", 225, 79.6)),
    ),
    "EfficientTrain++": (
        "LeapLabTHU/EfficientTrain, EVAL.md, ImageNet-1K trained models",
        (("Ti", 100, 72.5), ("Ti", 150, 73.4), ("Ti", 200, 73.8), ("Ti", 300, 74.4),
         ("S", 100, 79.9), ("S", 150, 80.6), ("S", 200, 81.0), ("S", 300, 81.4)),
    ),
    "plain ViT": (
        "google-research/big_vision, configs/vit_s16_i1k.py (90 epochs); arXiv 2205.01580, abstract (300 epochs: 80 %)",
        (("S", 90, 76.5), ("S", 300, 80.0)),
    ),
    "DeiT III": (
        "facebookresearch/deit, README_revenge.md, Model Zoo and training commands",
        (("S", 800, 81.4), ("B", 800, 83.8)),
    ),
    "AlgoPerf, NAdamW": (
        "mlcommons/submissions_algorithms, artifacts/leaderboard_v2/time_to_targets_steps.csv: 152,461 steps to the "
        "benchmark's target of 77.309 % (taken as batches of 1024 images)",
        (("S", 121.9, 77.31),),
    ),
}  # fmt: skip
