"""Training a memory on a frozen model."""
