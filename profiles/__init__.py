"""Facts: models, clusters and measured hardware. Nothing here decides anything."""
