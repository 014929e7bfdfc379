"""What a network sees: the methods behind `python -m convnet.explain`.

- `network` compiles a model file's network: logits, taps, gradients, in batches.
- `layers` says what a tap is; `receptive_field` which inputs it depends on.
- `attribution` says which part of an input spoke for an answer.
- `visualization` finds the input that a unit answers to most.
- `neighbours` finds the training inputs that look most alike to the network.
- `drawing` and `page` show all that to people.

The methods are functions of arrays and of the network's functions; they know neither
files nor flags.
"""
