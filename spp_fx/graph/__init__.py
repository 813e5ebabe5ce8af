"""The traced model: programs, sites, and how they bind to a checkpoint."""
