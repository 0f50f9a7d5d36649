"""The training loop, its device and its run folders. Knows neither teachers nor the store."""
