"""What is learned: one file a task, from a config to a `Task`; and the table of them."""

import importlib

from jax.sharding import Mesh
from ml_collections import ConfigDict

from stvit_jax.training.task import Task

TASKS = {  # config.task to its room
    "classification": "stvit_jax.tasks.classification",
    "segmentation": "stvit_jax.tasks.segmentation",
}


def build(config: ConfigDict, mesh: Mesh) -> Task:
    """The one way from a config to what a run trains and evaluates.

    Args:
      config: validated.
      mesh: the devices that a batch will be split over.

    Raises:
      UserError: a mistake in the config, or data that are missing or do not fit it.
    """
    return importlib.import_module(TASKS[config.task]).task(config, mesh)
