"""The peer's side of a comparison: the same steps as a user of PyTorch would have them fastest.

Channels-last memory, autocast where the dtype is bfloat16, fused AdamW, the moving average in a few
kernels over all tensors, cuDNN's choice by trial, and `torch.compile`.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import RECIPE, Case
from benchmarks.timing import Contender, cores, seconds
from benchmarks.torch_stvit import DropPath, STViT, adamw_groups
from stvit_jax import torch_weights
from stvit_jax.errors import UserError
from stvit_jax.models.settings import SETTINGS

Forward = Callable[[Tensor], Tensor]

# What `torch.compile` is tried with; on CPU the other modes tune for the same kernels.
COMPILE_MODES = {"cpu": ("default",), "cuda": ("default", "max-autotune")}


def prepare(platform: str) -> torch.device:
    """The device of JAX's platform, and what is set for all of PyTorch.

    Raises:
      UserError: PyTorch has no such device.
    """
    torch.set_num_threads(cores())
    torch.backends.cudnn.benchmark = True
    if platform == "cpu":
        return torch.device("cpu")
    if platform != "gpu" or not torch.cuda.is_available():
        raise UserError(
            f"JAX runs on a {platform} here and PyTorch {torch.__version__} does not: install a "
            "PyTorch with CUDA, or set JAX_PLATFORMS=cpu"
        )
    return torch.device("cuda")


def network(case: Case, model: Any, variables: Mapping[str, Any], device: torch.device) -> STViT:
    """The peer of a Flax network, with its weights."""
    settings = {field: getattr(model, field) for field in SETTINGS}
    peer = STViT(**settings, drop_path_rate=case.drop_path)
    state = torch_weights.to_torch(variables)
    peer.load_state_dict({name: torch.tensor(array) for name, array in state.items()}, strict=True)
    return peer.to(device, memory_format=torch.channels_last)


def outputs(
    peer: STViT, mode: str, images: np.ndarray, targets: np.ndarray
) -> dict[str, np.ndarray]:
    """As `flax_steps.outputs`; `peer` stays as it is."""
    peer = copy.deepcopy(peer).train(mode == "train")
    for module in peer.modules():
        if isinstance(module, DropPath):
            module.rate = 0.0
    device = next(peer.parameters()).device
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        logits = peer(to_device(images, device))
        loss = F.cross_entropy(logits, torch.tensor(targets, device=device))
    found = {"logits": logits} | ({"loss": loss} if mode == "train" else {})
    return {name: value.cpu().numpy() for name, value in found.items()}


def to_device(images: np.ndarray, device: torch.device) -> Tensor:
    """Images (B, H, W, 3) as (B, 3, H, W) in channels-last memory."""
    x = torch.tensor(images).permute(0, 3, 1, 2)
    return x.to(device).contiguous(memory_format=torch.channels_last)


def contender(
    case: Case, peer: STViT, images: np.ndarray, targets: np.ndarray, compile_mode: str | None
) -> Contender:
    """A copy of the peer at work, on the peer's device.

    Args:
      case: what is run.
      peer: as `network` makes it.
      images: (B, H, W, 3).
      targets: (B, K).
      compile_mode: of `torch.compile`; None: eager.
    """
    device = next(peer.parameters()).device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32 in products of float32, as XLA has it
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    peer = copy.deepcopy(peer).train(case.mode == "train")
    inputs, labels = to_device(images, device), torch.tensor(targets, device=device)
    run = torch.compile(peer, mode=compile_mode) if compile_mode else peer

    def forward(images: Tensor) -> Tensor:
        # One context a pass: within one, weights stay as they were narrowed first.
        with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            return run(images)

    step = training_step(case, peer, forward, labels) if case.mode == "train" else forward

    def work(times: int) -> None:
        with torch.inference_mode(case.mode == "infer"):
            for _ in range(times):
                if compile_mode:
                    torch.compiler.cudagraph_mark_step_begin()
                step(inputs)
        if on_gpu:
            torch.cuda.synchronize()

    first_seconds = seconds(lambda: work(1))
    work(2)  # the second and third may still compile or record
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
    return Contender(work, None, first_seconds, peak)


def training_step(case: Case, peer: STViT, forward: Forward, labels: Tensor) -> Forward:
    """Forward, loss, backward, AdamW and moving average, as a function of the images.

    Args:
      case: what is run.
      peer: whose parameters learn.
      forward: its pass, as it is run.
      labels: (B, K).
    """
    optimizer = torch.optim.AdamW(
        adamw_groups(peer, RECIPE.weight_decay), lr=case.learning_rate, fused=True
    )
    statistics = [b for name, b in peer.named_buffers() if "running_" in name]
    values = [*(p.detach() for p in peer.parameters()), *statistics]
    averages = [value.clone() for value in values]

    def step(images: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(averages, values, 1 - RECIPE.ema_decay)
        return loss

    return step
