"""Trains, continues, or evaluates STViT.

    python train.py --config configs/NAME.py[:ARG] --workdir DIR [--config.FIELD=VALUE ...]
        [--coordinator_address=HOST:PORT --num_processes=N --process_id=I]

The same command again continues from the workdir. Exit code 0: done; 75: stopped early by a signal,
state saved, the same command continues; anything else: failed. The last three flags join several
processes, where nothing that JAX knows (a TPU slice, SLURM, Open MPI, Kubernetes) has started them.
"""

from stvit_jax.training import signals

# Loader processes import this file, too: what is heavy is imported below, by the main process only.
if __name__ == "__main__":
    stop = signals.install()  # first: a signal may come while the rest is being imported
    import sys

    from stvit_jax import command_line

    def main() -> int:
        """The order: flags first, so that a mistake in them costs no seconds."""
        config, workdir, membership = command_line.train(sys.argv[1:], __doc__)
        from stvit_jax.run import run

        return run(config, workdir, stop, membership)

    command_line.entry(main)
