"""Settings, recipes and the catalogue of datasets. Nothing here imports torch."""
