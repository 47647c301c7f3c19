"""Dilated attention as `nn.Module`s, their configs and the factory."""
