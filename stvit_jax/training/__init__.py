"""The run of any task: step, loop, evaluation."""
