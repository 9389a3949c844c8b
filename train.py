"""Trains, continues, or evaluates STViT.

    python train.py --config configs/NAME.py[:ARG] --workdir DIR [--config.FIELD=VALUE ...]

The same command again continues from the workdir. Exit code 0: done; 75: stopped early by SIGTERM
or SIGINT, state saved, the same command continues; anything else: failed.
"""

from stvit_jax.training import signals

# Loader processes import this file, too: what is heavy is imported below, by the main process only.
if __name__ == "__main__":
    stop = signals.install()  # first: a signal may come while the rest is being imported
    from functools import partial

    from stvit_jax import command_line
    from stvit_jax.run import run

    command_line.run(partial(run, stop=stop))
