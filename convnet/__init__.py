"""Convolutional networks in JAX and Flax, from a config to a trained classifier."""
