"""What is learned: one file a task, from a config to a Task."""
