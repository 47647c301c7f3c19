"""Content-adaptive block sparsity: which blocks to keep is estimated from the queries and keys.

The rooms, in the order to read them: `config` has the options. `pooling` sums up sub-blocks of
positions. `scores` estimates the softmax mass of each block, and `gate` is the learned correction
of that estimate. `choice` keeps blocks within a budget. `learning` measures the exact mass, and the
loss that teaches it to the gate. `bias` lets the gate take part in attention. `decoding` selects
and attends token by token. `attention`, `multihead` and `factory` have the modules.
"""
