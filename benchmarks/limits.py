"""What a device allows: the share of its peak that a network takes, and of L1."""

# FLOP/s of dense bfloat16 products, measured, by a part of the device's name.
PEAKS = {"H100": 790e12}

# Images/s of one H100 in bfloat16 if every product, convolution and attention were one kernel with
# its pointwise neighbours fused, and took max(FLOPs / 790e12, bytes / 3.0e12) seconds: "L1".
L1 = {
    ("stvit_small", 224, "infer"): 40_700,
    ("stvit_base", 224, "infer"): 21_900,
    ("stvit_large", 224, "infer"): 17_000,
    ("stvit_small", 384, "infer"): 13_900,
    ("stvit_small", 224, "train"): 10_900,
    ("stvit_base", 224, "train"): 5_900,
    ("stvit_large", 224, "train"): 4_500,
    ("stvit_small", 384, "train"): 3_800,
}


def utilisation(device: str, dtype: str, macs: int, mode: str, speed: float) -> float | None:
    """Model FLOPs utilisation, None where the peak of the device is not known.

    Args:
      device: its name.
      dtype: of the computation.
      macs: of the forward pass of an image; a MAC is two FLOPs, training three forward passes.
      mode: train or infer.
      speed: images/s.
    """
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    if peak is None or dtype != "bfloat16":
        return None
    return speed * 2 * macs * (3 if mode == "train" else 1) / peak


def share_of_l1(
    device: str, dtype: str, model: str, image_size: int, mode: str, speed: float
) -> float | None:
    """Images/s as a share of L1, None where that is not known."""
    limit = L1.get((model, image_size, mode))
    known = limit is not None and "H100" in device and dtype == "bfloat16"
    return speed / limit if known else None
