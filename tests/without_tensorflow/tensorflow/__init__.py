"""Stands before TensorFlow on the path of programs that tests run, as if it was not installed."""

raise ImportError("No module named 'tensorflow' in this test")
