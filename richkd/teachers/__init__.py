"""The teachers. Only stage one imports these."""
