"""Counts the memory traffic of a compiled block: python -m vitlocal.bench traffic [--models LIST] [--size 224]

Nothing runs on a GPU, and none is needed. A training step is traced on shapes, and PyTorch's compiler schedules its
kernels for an sm_90 GPU (H100, H200). The bytes are those that these kernels read and write, each tensor once in each
kernel. A block's are the difference between models of three blocks and two. Under fp16 autocast the residual stream is
float32. The compiler's interfaces are private: this was written for PyTorch 2.14.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import device_interface
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx, debug, ir
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import vitlocal.models  # noqa: F401 (registers the models)
from vitlocal.bench.measurement import text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser
from vitlocal.errors import ConfigError
from vitlocal.models.counts import gpu_norms
from vitlocal.models.lffn import LocalFeedForward
from vitlocal.tasks.metrics import task_name

SM_90 = SimpleNamespace(name="sm_90", major=9, multi_processor_count=132, warp_size=32, total_memory=80 * 2**30)
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("matrix products", "attention", "local mix", "other")
COLUMNS = {name: (name, "") for name in ("model", "precision", "pass")} | {
    f"{name}, GB": (f"{name} gb", ".2f") for name in (*KINDS, "in all", "kept for backward")
}


def flash_attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """The operator of a GPU, as ``F.scaled_dot_product_attention`` is called; there is neither mask nor dropout."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@contextmanager
def imagined_gpu() -> Iterator[None]:
    """A context in which PyTorch's compiler takes ``SM_90`` for the machine's GPU. Its caches remember that."""
    found: dict[str, Any] = {
        "get_device_properties": lambda *_: SM_90, "current_device": lambda *_: 0, "is_available": lambda *_: True,
        "get_compute_capability": lambda *_: 90,
    }  # fmt: skip
    interface: dict[str, Any] = {name: staticmethod(value) for name, value in found.items()}
    with (
        patch.multiple(torch.cuda, get_device_properties=found["get_device_properties"], current_device=lambda: 0),
        patch.multiple(device_interface.CudaInterface, **interface),
        patch.dict(device_interface.caching_worker_device_properties, cuda=[SM_90]),
        patch.dict(device_interface.caching_worker_current_devices, cuda=0),
    ):
        yield


def kind_of(kernel: Any) -> str:
    """The kind, of ``KINDS``, of a scheduled kernel."""
    nodes = [scheduled.node for scheduled in kernel.get_nodes()]
    names = " ".join(str(getattr(node, "op_overload", "")) for node in nodes)
    if "local_mix" in names or "attention" in names:
        return "local mix" if "local_mix" in names else "attention"
    return "matrix products" if any(isinstance(node, ir.ExternKernelOut) for node in nodes) else "other"


def scheduled_bytes(graph: Any, fake: FakeTensorMode) -> dict[str, int]:
    """The bytes that the kernels of a GraphModule read and write on a GPU, by kind. Changes ``graph``."""
    gpu, moved = torch.device("cuda", 0), []
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": gpu}
        if node.op == "placeholder":
            value = node.meta["val"]
            with fake:
                moved.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=gpu))
    found = dict.fromkeys(KINDS, 0)
    with imagined_gpu(), V.set_fake_mode(fake):
        FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*moved)
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=moved, shape_env=fake.shape_env)
        with V.set_graph_handler(lowering), V.set_debug_handler(debug.DebugContext()):
            lowering.run(*moved)
            lowering._update_scheduler()
            for kernel in lowering.scheduler.nodes:
                found[kind_of(kernel)] += kernel.get_read_write_buffers_sizes()
    return found


def count_step(name: str, depth: int, size: int, batch: int, precision: torch.dtype) -> dict[str, dict[str, int]]:
    """The bytes of a training step of a model, by pass (forward, backward) and kind of kernel."""
    with torch.device("meta"):
        model = timm.create_model(name, depth=depth, img_size=size, pool="avg").to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, LocalFeedForward):
            module.kernel = "fused"
    tensors = dict([*model.named_parameters(), *model.named_buffers()])

    def loss(images: Tensor, *weights: Tensor) -> tuple[Tensor]:
        replaced = patch.object(F, "scaled_dot_product_attention", flash_attention)
        with torch.autocast("cpu", precision), gpu_norms(), replaced:
            logits = torch.func.functional_call(model, dict(zip(tensors, weights, strict=True)), (images,))
        return (logits.float().square().sum(),)

    with FakeTensorMode() as fake:
        inputs = [torch.empty(batch, 3, size, size).to(memory_format=torch.channels_last)]
        inputs += [torch.empty_strided(t.shape, t.stride(), requires_grad=t.requires_grad) for t in tensors.values()]
        table = select_decomp_table()
        joint: Any = aot_export_joint_simple(loss, tuple(inputs), trace_joint=True, decompositions=table)
    compile_fx._recursive_joint_graph_passes(joint)
    values = [node.meta["val"] for node in joint.graph.find_nodes(op="placeholder")]
    forward: Any
    forward, backward = min_cut_rematerialization_partition(joint, values, num_fwd_outputs=1)
    outputs = [node for node in forward.graph.output_node().args[0] if node.op != "placeholder"]
    kept = {node.meta["val"].untyped_storage()._cdata: node.meta["val"].untyped_storage().nbytes() for node in outputs}
    return {
        "forward": scheduled_bytes(forward, fake) | {"kept for backward": sum(kept.values())},
        "backward": scheduled_bytes(backward, fake),
    }


def count_block(name: str, size: int, batch: int, precision: str) -> list[dict[str, Any]]:
    """A row for each pass: the bytes of a block, in GB."""
    two, three = (count_step(name, depth, size, batch, PRECISIONS[precision]) for depth in (2, 3))
    rows = []
    for direction, counted in three.items():
        found = {kind: value - two[direction][kind] for kind, value in counted.items()}
        found["in all"] = sum(found[kind] for kind in KINDS)
        about = {"model": name, "size": size, "batch_size": batch, "precision": precision, "pass": direction}
        rows.append(about | {f"{kind} gb": value / 1e9 for kind, value in found.items()})
    return rows


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("traffic", __doc__)
    parser.add_argument("--models", default="vitlocal_small_patch16_224,vitlocal_deit_small_patch16_224")
    parser.add_argument("--size", type=at_least(1), default=224, help="image size, px (default: 224)")
    parser.add_argument("--batch", type=at_least(2), default=1024, help="images per step (default: 1024)")
    options = parser.parse_args(argv)
    models = options.models.split(",")
    if others := [name for name in models if task_name(name) != "classification"]:
        raise ConfigError(f"--models: got {', '.join(others)}, expected classifiers; diffusion transformers take no "
                          "images alone")  # fmt: skip
    cases, of = product(models, PRECISIONS), (options.size, options.batch)
    rows = [row for name, precision in cases for row in count_block(name, *of, precision)]
    print(f"a block of {options.batch} images of {options.size} px, compiled for sm_90; counted, not measured:\n")
    print(text_table(rows, COLUMNS))
    write_json(options.json, "memory traffic of a compiled block on an sm_90 GPU, counted in Inductor's kernels", rows)
