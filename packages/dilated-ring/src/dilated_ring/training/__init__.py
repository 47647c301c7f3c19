"""Losses and checks for training with sharded sequences."""
