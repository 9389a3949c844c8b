"""Arrays in, arrays out; no Flax."""
