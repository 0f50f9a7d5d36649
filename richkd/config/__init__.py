"""Settings, recipes and the catalog of data sets. No torch in here."""
