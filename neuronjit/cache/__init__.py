"""The kernel cache on disk. It knows keys and bytes, and nothing of kernels or tensors."""
