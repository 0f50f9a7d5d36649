"""The teachers; only stage one imports them."""
