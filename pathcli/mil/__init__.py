"""Bags in, slide predictions out: heads, bags, splits, heatmaps."""
