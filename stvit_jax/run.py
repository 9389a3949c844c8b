"""The order of work behind `train.py`: config, processes, devices, task, and then the run."""

import contextlib
import hashlib
import json
from pathlib import Path

from ml_collections import ConfigDict

from stvit_jax import cluster, parallel, places, programs, tasks
from stvit_jax.data.files import allow_many_open
from stvit_jax.errors import UserError
from stvit_jax.evaluator import Evaluator, evaluate_only
from stvit_jax.following import as_weights_have_it
from stvit_jax.trainer import Trainer
from stvit_jax.training.signals import Stop
from stvit_jax.training.task import Task
from stvit_jax.training.watchdog import Watchdog
from stvit_jax.validation import validate


def run(
    config: ConfigDict, where: Path, stop: Stop, membership: cluster.Membership | None = None
) -> int:
    """Trains, or evaluates, as the config says, in the folder `where`.

    Args:
      config: as `config.base` has it.
      where: the workdir.
      stop: of this process.
      membership: its place among several, where flags give it.

    Returns:
      The exit code: 0 done, 75 stopped early.

    Raises:
      UserError: a mistake in the config, the data or the workdir.
    """
    validate(config)
    allow_many_open()  # a checkpoint of a large network and a set in shards have many files
    x64 = config.dtype == "float64"
    parallel.prepare(x64=x64, deterministic=config.deterministic, workdir=where)
    cluster.join(membership)
    programs.keep(deterministic=config.deterministic)
    if cluster.joined():
        stop.share()
    with cluster.together():
        places.reach(where)
        for path in filter(None, (config.init_from, config.teacher.init_from)):
            places.reach(places.of(path))
    config = as_weights_have_it(config, where)
    with cluster.together():
        mesh = parallel.make_mesh(config.batch_size, config.gradient_accumulation)
        task = tasks.build(config, mesh)
    _check_same_data(task)
    with contextlib.closing(Watchdog(config.stall_after)) as watchdog:
        evaluator = Evaluator(task.evaluations, config, mesh, stop, watchdog)
        if config.eval_only:
            code = evaluate_only(config, where, task, evaluator, mesh)
        else:
            code = Trainer(config, where, task, evaluator, mesh, stop, watchdog).run()
    cluster.barrier()  # the first process may still have been writing
    return code


def _check_same_data(task: Task) -> None:
    """Sees that the processes have opened the same sets, each from where it has them."""
    sets = [task.train, *(e.examples for e in task.evaluations)]
    sizes = ", ".join(f"{len(s.source)} of {s.source.name}" for s in sets if s)
    names = hashlib.sha256(json.dumps(task.classes).encode()).hexdigest()
    own = f"{sizes}; classes {names[:12]}"
    first = cluster.told(own)
    with cluster.together():
        if own != first:
            raise UserError(
                f"the data here are others than those of process 0 ({own}; there {first}): give "
                "every host the same"
            )
