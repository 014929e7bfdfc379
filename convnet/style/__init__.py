"""Style transfer: features, losses, minimisers, colour, tiles and frames."""
