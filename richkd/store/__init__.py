"""The Zarr store between the two stages. The reader never imports the writer."""
