"""Speed and program measurements, and the PyTorch peer they measure against; not installed."""
