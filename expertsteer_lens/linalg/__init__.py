"""Mathematics on tensors: kernels, row spaces, streaming moments, clipping."""
