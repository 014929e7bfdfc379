"""The peers' side, which runs in an environment of its own and imports no convnet."""
