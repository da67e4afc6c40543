"""The figures by which each task is judged, as logs, reports and benches show them. Imports no PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation. ``name`` is its name in ``log.jsonl``."""

    name: str
    label: str  # on axes and in tables
    unit: str = ""
    larger_is_better: bool = True
    digits: int = 2
    tabulated: bool = True  # in tables of compared recipes

    @property
    def title(self) -> str:
        """The label with the unit: ``top-1 %``."""
        return f"{self.label} {self.unit}".rstrip()

    def number(self, value: float, digits: int | None = None) -> str:
        """The value with the unit: ``48.20 %``."""
        return f"{value:.{self.digits if digits is None else digits}f} {self.unit}".rstrip()

    def text(self, value: float) -> str:
        """The label, the value and the unit: ``top-1 48.20 %``."""
        return f"{self.label} {self.number(value)}"

    def key(self, value: float) -> float:
        """A number that is larger for better values."""
        return value if self.larger_is_better else -value


# By the name of the task. Curves and tables show the first one, which every evaluation measures.
METRICS = {
    "classification": (Metric("top1", "top-1", "%"), Metric("top5", "top-5", "%", tabulated=False)),
    "diffusion": (
        Metric("val_loss", "held-out loss", larger_is_better=False, digits=4),
        Metric("frechet_distance", "Fréchet distance", larger_is_better=False),
        Metric("sample_accuracy", "samples of the requested class", "%", digits=1),
    ),
}
DIFFUSION_MODELS = "vitlocal_dit_"  # the start of their names; timm has no diffusion transformers


def task_name(model_name: str) -> str:
    """The task that a model is for: a key of :data:`METRICS`."""
    return "diffusion" if model_name.startswith(DIFFUSION_MODELS) else "classification"


def metrics_of(model_name: str) -> tuple[Metric, ...]:
    """The metrics of the task that a model is for."""
    return METRICS[task_name(model_name)]


def is_evaluated(record: Mapping[str, Any], metric: Metric) -> bool:
    """Whether a record of ``log.jsonl`` has the metric."""
    return record.get(metric.name) is not None
