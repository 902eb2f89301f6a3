"""The language of equations: text becomes a tree; a tree becomes slopes, C++ and torch."""
