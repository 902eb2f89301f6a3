"""From a call to its outputs and gradients."""
