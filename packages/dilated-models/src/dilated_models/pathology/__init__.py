"""Slides on disk: feature files, orders of tiles, reports, embeddings, heat-maps, fine-tuning."""
