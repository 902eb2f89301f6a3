"""Other libraries' networks on our kernels; none of them is imported before its model is given."""
