"""Optimizers: fused AdamW, Muon for matrices, the choice of one, and averages of the weights.

Muon is from Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
Shape letters: M matrices of one shape, R rows, C columns.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from vitlocal.errors import ConfigError, DataError
from vitlocal.progress import Length, Progress
from vitlocal.train.own_optimizer import OwnOptimizer
from vitlocal.train.soap import Soap

# A quintic. Its iteration brings all singular values quickly into the range from 0.7 to 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# About the root mean square of AdamW's updates, so that one learning rate serves both optimizers
# (Liu et al. 2025, arXiv 2502.16982, section 2.2).
UPDATE_RMS = 0.2


def orthogonalized(matrices: Tensor, precision: torch.dtype) -> Tensor:
    """Approximates the nearest (semi-)orthogonal matrices: (M, R, C) float32 -> the same shape, in ``precision``.

    float16 holds the iteration, in which no singular value exceeds 1.3. Gradients may exceed its range, so they are
    divided by their norm first. bfloat16 has the range of float32.
    """
    first, second, third = COEFFICIENTS
    x = matrices if precision == torch.float16 else matrices.to(precision)
    transposed = x.shape[1] > x.shape[2]
    if transposed:  # so that the Gram matrix has the shorter side
        x = x.mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(precision)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return x.mT.contiguous() if transposed else x


class Muon(OwnOptimizer):
    """Momentum (Nesterov) whose matrices are orthogonalized before each update, with decoupled weight decay.

    Matrices of one shape are orthogonalized together in batched products. A 1×1 convolution is a matrix. ``parts`` maps
    the identity of a parameter to the number of matrices that it stacks by rows (3 for queries, keys and values).
    ``precision`` is the type of the products.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], parts: Mapping[int, int], lr: float, momentum: float,
        weight_decay: float, precision: torch.dtype = torch.float32,
    ):  # fmt: skip
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.parts, self.precision = parts, precision

    def new_state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state before the first step."""
        return {"momentum": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # it takes no closure
        for group in self.param_groups:
            active = self.active(group)
            if not active:
                continue
            momenta = [self.state[p]["momentum"] for p in active]
            grads = [p.grad for p in active]
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            directions = torch._foreach_lerp(grads, momenta, group["momentum"])  # Nesterov
            torch._foreach_mul_(active, 1 - group["lr"] * group["weight_decay"])
            self._update(active, directions, group["lr"])

    def _update(self, parameters: list[nn.Parameter], directions: Sequence[Tensor], lr: float) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for p, direction in zip(parameters, directions, strict=True):
            parts = self.parts.get(id(p), 1)
            for target, matrix in zip(p.chunk(parts), direction.chunk(parts), strict=True):
                by_shape.setdefault(tuple(matrix.shape[:2]), []).append((target, matrix.flatten(1)))
        for shape, members in by_shape.items():
            stacked = torch.stack([matrix for _, matrix in members])  # (M, R, C)
            updates = orthogonalized(stacked, self.precision).to(stacked.dtype)
            scale = -lr * UPDATE_RMS * max(shape) ** 0.5
            changes = [update.view_as(target) for update, (target, _) in zip(updates, members, strict=True)]
            torch._foreach_add_([target for target, _ in members], changes, alpha=scale)


class CombinedOptimizer:
    """Several optimizers for disjoint parameters, used as one.

    With fp16, PyTorch's GradScaler reads once per step whether gradients overflowed. This is a device sync, which fused
    AdamW alone avoids.
    """

    def __init__(self, *members: torch.optim.Optimizer):
        self.members = members
        self._collect_groups()

    def _collect_groups(self) -> None:
        self.param_groups: list[dict[str, Any]] = [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(number): member.state_dict() for number, member in enumerate(self.members)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`. Raises ConfigError if its members had other parameters."""
        for number, member in enumerate(self.members):
            try:
                member.load_state_dict(state[str(number)])
            except ValueError as error:
                raise ConfigError(
                    "run.folder: the checkpoint is of another version of vitlocal, whose train.optimizer treated "
                    f"other weights as matrices ({error}); continue with that version, or use another --run.folder"
                ) from error
        self._collect_groups()  # loading replaces them


MATRIX_OPTIMIZERS = ("muon", "soap")


def build_optimizer(
    model: Any,
    name: str = "adamw",
    *,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    muon_momentum: float = 0.95,
    soap_every: int = 10,
    precision: torch.dtype = torch.float32,
) -> torch.optim.Optimizer | CombinedOptimizer:
    """Fused AdamW without weight decay on norms, biases, position embeddings and class tokens.

    With ``name`` in ``MATRIX_OPTIMIZERS``, that one updates the matrices of the blocks and AdamW the rest. Muon
    multiplies matrices in ``precision``. The learning rates are set before each step.
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    matrices = block_matrices(model) if name in MATRIX_OPTIMIZERS else {}
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=(*exempt, *matrices))
    if name in MATRIX_OPTIMIZERS and not matrices:
        raise ConfigError(f"train.optimizer: {type(model).__name__} has no blocks with matrices; use adamw")
    taken = {id(p) for p in matrices.values()}
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in taken]
    adamw = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    if not matrices:
        return adamw
    if name == "soap":
        # The width is the shorter side. Of square matrices, only PVTv2's queries have it as their input.
        columns = {
            id(p)
            for path, p in matrices.items()
            if len(p) > p.shape[1] or (len(p) == p.shape[1] and path.endswith("attn.q.weight"))
        }
        soap = Soap(matrices.values(), columns, 0.0, betas, eps, weight_decay, soap_every)
        return CombinedOptimizer(adamw, soap)
    stacked = {"qkv": 3, "kv": 2}  # matrices in one weight
    parts = {id(p): stacked.get(path.split(".")[-2], 1) for path, p in matrices.items()}
    return CombinedOptimizer(adamw, Muon(matrices.values(), parts, 0.0, muon_momentum, weight_decay, precision))


def block_matrices(model: nn.Module) -> dict[str, Any]:
    """The weights of the linear layers and 1×1 convolutions in the model's blocks, by name."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if "blocks." in name and _is_matrix(module) and module.weight.requires_grad
    }


def _is_matrix(module: nn.Module) -> bool:
    """Whether the module multiplies its input by one matrix, made from its weight."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def optimizer_state(optimizer: torch.optim.Optimizer | CombinedOptimizer) -> Callable[[nn.Parameter], dict[str, Any]]:
    """A function from a parameter to its optimizer state, which may be changed; empty before the first step."""
    members = optimizer.members if isinstance(optimizer, CombinedOptimizer) else (optimizer,)
    owners = {id(p): member for member in members for group in member.param_groups for p in group["params"]}
    return lambda parameter: owners[id(parameter)].state[parameter] if id(parameter) in owners else {}


def new_state(member: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    """The state that ``member``, one of :func:`build_optimizer`'s, creates at the first step of ``weight``."""
    if isinstance(member, OwnOptimizer):
        return member.new_state(weight)
    return {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}


def _states(
    optimizer: torch.optim.Optimizer | CombinedOptimizer,
) -> Iterator[tuple[torch.optim.Optimizer, nn.Parameter, dict[str, Any]]]:
    for member in optimizer.members if isinstance(optimizer, CombinedOptimizer) else (optimizer,):
        states: Any = member.state
        yield from ((member, p, values) for p, values in states.items() if values)


def moments(optimizer: torch.optim.Optimizer | CombinedOptimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each trained weight with each of its moments. Counts of steps are none."""
    for _, parameter, values in _states(optimizer):
        yield from ((parameter, value) for name, value in values.items() if name != "step")


def check_moments(optimizer: torch.optim.Optimizer | CombinedOptimizer) -> None:
    """Raises DataError if the state that was loaded belongs to other weights. PyTorch does not look at it."""
    for member, parameter, values in _states(optimizer):
        own = new_state(member, parameter.detach().to("meta"))
        if values.keys() != own.keys() or not all(isinstance(value, Tensor) for value in values.values()):
            raise DataError(f"the optimizer has {', '.join(map(str, values))} for a weight, expected {', '.join(own)}")
        for name, value in values.items():
            if value.shape != own[name].shape:
                found, expected, of = tuple(value.shape), tuple(own[name].shape), tuple(parameter.shape)
                raise DataError(f"the optimizer has {name} {found} for a weight of {of}, expected {expected}")


class ModelEma:
    """A copy of a model whose weights follow it: w <- decay * w + (1 - decay) * new.

    The decay of a step is ``decay`` or, if there is a ``length``, follows from it: the training after which the average
    has forgotten all but 1/e of a weight.
    """

    def __init__(self, trained: nn.Module, decay: float = 0.0, length: Length | None = None):
        self.decay, self._length = decay, length
        self.model = copy.deepcopy(trained).eval().requires_grad_(False)
        # Lists, made once: a step would take a notable part of a millisecond to make them.
        self._averages, self._weights = list[Tensor](self.model.parameters()), list[Tensor](trained.parameters())
        self._buffers = list(zip(self.model.buffers(), trained.buffers(), strict=True))

    def decay_between(self, before: Progress, after: Progress) -> float:
        """The decay of a step that leads from ``before`` to ``after``."""
        if self._length is None:
            return self.decay
        elapsed = self._length.elapsed(after) - self._length.elapsed(before)
        return math.exp(-max(0.0, elapsed) / self._length.value)

    def start_weight(self, now: Progress) -> float:
        """The weight, from 0 to 1, that the average at ``now`` gives to the model it started from."""
        return self.decay**now.step if self._length is None else self.decay_between(Progress(), now)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Moves the average towards the trained model; buffers are copied."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
        for mine, buffer in self._buffers:
            mine.copy_(buffer)
