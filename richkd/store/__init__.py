"""The Zarr cache between the two stages. The reader never imports the writer."""
