"""Small checks and the release helper; run them as `python -m tools.NAME` from the top."""
