"""PyTorch's form of the operations in op_forms.py, on the same arguments in channels-last memory.

Maps are (B, C, H, W), kernels (O, I, 3, 3), both in channels-last memory; q, k, v (B, N, h, d) and
all else as in op_forms.py.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.op_forms import Stage
from benchmarks.timing import Work
from benchmarks.torch_stvit import SuperTokenAttention


def _depthwise(stage: Stage, x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    return x + F.conv2d(x, kernel, bias, padding=1, groups=x.shape[1])


def _layer_norm(stage: Stage, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # which would copy to float32
        weights = (scale.to(x.dtype), bias.to(x.dtype))
        y = F.layer_norm(x.permute(0, 2, 3, 1), scale.shape, *weights, 1e-6)
    return y.permute(0, 3, 1, 2)


@functools.cache
def _sampling(stage: Stage) -> nn.Module:
    module = SuperTokenAttention(stage.width, stage.heads, True, stage.cell, stage.n_iter)
    module.stoken_refine = nn.Identity()
    return module


def _attention(stage: Stage, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _pointwise_gelu(stage: Stage, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x.permute(0, 2, 3, 1), weight.T, bias)).permute(0, 3, 1, 2)


FORMS: dict[str, Callable[..., Tensor]] = {
    "depthwise": _depthwise,
    "gelu_depthwise": lambda stage, x, *weights: _depthwise(stage, F.gelu(x), *weights),
    "layer_norm": _layer_norm,
    "batch_norm": lambda stage, x, scale, bias: F.batch_norm(
        x, None, None, scale, bias, training=True
    ),
    "super_tokens": lambda stage, x: _sampling(stage)(x),
    "attention": _attention,
    "downsample": lambda stage, x, kernel, bias: F.conv2d(x, kernel, bias, stride=2, padding=1),
    "pointwise_gelu": _pointwise_gelu,
}


def moved(name: str, array: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An argument of an operation as PyTorch has it; maps in `dtype`, weights in float32."""
    x = torch.tensor(array, device=device)
    if name == "kernel":
        return x.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    if name == "x":
        x = x.permute(0, 3, 1, 2)  # channels-last, as it lies
    return x.to(dtype) if array.ndim == 4 else x


def works(
    op: str, stage: Stage, arguments: Mapping[str, np.ndarray], device: torch.device, narrow: bool
) -> dict[str, Callable[[], object]]:
    """One run of the operation by pass, `forward` and `gradient` (which includes the former).

    Args:
      op: its name.
      stage: whose shapes it has.
      arguments: by name, as in op_forms.py.
      device: where it runs.
      narrow: in bfloat16.
    """
    dtype = torch.bfloat16 if narrow else torch.float32
    given = [moved(name, x, device, dtype) for name, x in arguments.items()]
    learned = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in given]

    def run(values: list[Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            return FORMS[op](stage, *values)

    def forward() -> Tensor:
        with torch.inference_mode():
            return run(given)

    dy = torch.ones_like(forward()).clone()

    def gradient() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = run(learned)
        return y, torch.autograd.grad(y, learned, dy)

    return {"forward": forward, "gradient": gradient}


def repeated(once: Callable[[], object], device: torch.device) -> Work:
    """For `timing.alternate`."""

    def work(times: int) -> None:
        for _ in range(times):
            once()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return work
