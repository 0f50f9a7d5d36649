"""Datasets, class names, prompts, and views of images."""
