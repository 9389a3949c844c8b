"""A network beside its peer in PyTorch: checked to be equal work, then timed in turns."""

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import flax_steps, torch_steps, trace
from benchmarks.case import Case, batch_of, variables_of
from benchmarks.limits import share_of_l1, utilisation
from benchmarks.timing import Contender, Seconds, alternate, cores
from stvit_jax.console import say, warn
from stvit_jax.errors import UserError, described
from stvit_jax.models.stvit import create_model
from stvit_jax.summary import summarize

TOLERANCE = 1e-4  # of float32 logits, relative to the largest
CHECKED = 2  # images that both sides are checked on


def run(case: Case, rounds: int, profile: Path | None) -> dict[str, Any]:
    """The row of a case; this process has compared nothing before.

    Args:
      case: what is run.
      rounds: turns of each side.
      profile: a directory for a trace of our steps, whose times by kind are then said; None: none.

    Raises:
      UserError: the two sides do not compute the same, or a device has not the room.
    """
    try:
        contenders, found = measure(case, rounds)
        if profile is not None:
            say_kinds(case, contenders["ours"], profile / f"{case.model}-{case.mode}")
        return row_of(case, contenders, found)
    except (jax.errors.JaxRuntimeError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                f"{case.describe()}: the device's memory is full; use a smaller --batch-size"
            ) from error
        raise


def measure(case: Case, rounds: int) -> tuple[dict[str, Contender], dict[str, Seconds]]:
    """What contends, by name, and how long a step of each takes."""
    device = torch_steps.prepare(jax.default_backend())
    model = create_model(case.model, dtype=jnp.dtype(case.dtype))
    variables = variables_of(model)
    images, targets = batch_of(case, model)
    peer = torch_steps.network(case, model, variables, device)
    say(f"{case.describe()}: comparing what both sides compute")
    few = (case.mode, images[:CHECKED], targets[:CHECKED])
    check_equal_work(
        flax_steps.outputs(model.clone(dtype=jnp.float32), case.mode, variables, *few[1:]),
        torch_steps.outputs(peer, *few),
    )
    say(f"{case.describe()}: compiling ours")
    contenders = {"ours": flax_steps.contender(case, model, variables, images, targets)}
    contenders["eager"] = torch_steps.contender(case, peer, images, targets, None)
    for mode in torch_steps.COMPILE_MODES[device.type]:
        say(f"{case.describe()}: torch.compile, {mode}")
        try:
            contenders[mode] = torch_steps.contender(case, peer, images, targets, mode)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of its many parts, a C++ compiler and Triton among them
            warn(f"torch.compile ({mode}) does not work here, and is left out: {described(error)}")
    say(f"{case.describe()}: timing, {rounds} rounds")
    works = {name: contender.work for name, contender in contenders.items()}
    found = alternate(works, rounds, case.describe())
    if device.type == "cpu" and os.getloadavg()[0] > cores() + 1:  # our own load is at most `cores`
        warn(
            "this machine has other work to do, which costs PyTorch's threads more than ours: they "
            "wait for each other; give both sides one core (taskset -c 0) and read the CPU ratios"
        )
    return contenders, found


def say_kinds(case: Case, ours: Contender, directory: Path) -> None:
    """Traces our steps, and says where their time goes."""
    path = trace.record(ours.work, directory)
    say(f"{case.describe()}: traced in {directory}")
    for line in trace.table(trace.by_kind(path, ours.program())):
        say(line)


def check_equal_work(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    """Compares outputs by name.

    Raises:
      UserError: they differ, so that speeds would compare different work.
    """
    for name, b in theirs.items():
        error = float(np.max(np.abs(ours[name] - b)) / np.max(np.abs(b)))
        if not error <= TOLERANCE:
            raise UserError(
                f"the {name} of the two sides differ by {error:.1e} of the largest, more than "
                f"{TOLERANCE:.0e}: their networks or weights are not the same, and nothing was "
                "timed; run tests/models/test_torch_parity.py"
            )


def row_of(
    case: Case, contenders: Mapping[str, Contender], found: Mapping[str, Seconds]
) -> dict[str, Any]:
    """What is written of a case. Missing are None: a compiled form that failed, and the unknown."""
    modes = [name for name in found if name not in ("ours", "eager")]
    best = min(modes, key=lambda mode: found[mode].wall, default=None)
    names = {"ours": "ours", "eager": "eager", "compiled": best}
    kind = jax.devices()[0].device_kind

    def speed(name: str | None) -> float | None:
        return case.batch_size / found[name].wall if name else None

    def ratio(name: str | None, clock: str = "wall") -> float | None:
        return getattr(found[name], clock) / getattr(found["ours"], clock) if name else None

    ours, compiled = contenders["ours"], contenders.get(best)
    macs = summarize(create_model(case.model), case.image_size)[0][2]
    what = (kind, case.dtype)
    return {
        "model": case.model,
        "mode": case.mode,
        "device": kind,
        **{name: speed(key) for name, key in names.items()},
        "ratio_eager": ratio("eager"),
        "ratio_compiled": ratio(best),
        "cpu_ratio_eager": ratio("eager", "cpu"),
        "cpu_ratio_compiled": ratio(best, "cpu"),
        "mfu": utilisation(*what, macs, case.mode, speed("ours")),
        "share_of_l1": share_of_l1(*what, case.model, case.image_size, case.mode, speed("ours")),
        "compiled_mode": best,
        "compile_seconds": ours.compile_seconds,
        "first_step_seconds": ours.first_seconds,
        "eager_first_step_seconds": contenders["eager"].first_seconds,
        "compiled_first_step_seconds": compiled and compiled.first_seconds,
        "peak_memory": ours.peak_memory,
        "eager_peak_memory": contenders["eager"].peak_memory,
        "compiled_peak_memory": compiled and compiled.peak_memory,
        "dtype": case.dtype,
        "batch_size": case.batch_size,
        "image_size": case.image_size,
        "cores": cores(),
        "jax": importlib.metadata.version("jax"),
        "torch": torch.__version__,
    }
