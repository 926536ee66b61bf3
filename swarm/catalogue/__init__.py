"""Models on disk: where they are, and which of their tensors belong to which block."""
