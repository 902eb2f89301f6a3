"""What equations describe: neuron models and surrogates, as data."""
