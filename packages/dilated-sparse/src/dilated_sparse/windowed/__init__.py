"""Dilated branches and a sliding window of near keys in one softmax."""
