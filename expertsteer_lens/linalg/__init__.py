"""Mathematics on tensors that knows no model: kernels, row spaces, streaming moments."""
