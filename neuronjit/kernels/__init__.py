"""From a spec to a loaded kernel: rendered, compiled, found in the cache, recorded, built ahead."""
