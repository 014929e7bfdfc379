"""Other people's weights as model files: one module for each place they come from."""
