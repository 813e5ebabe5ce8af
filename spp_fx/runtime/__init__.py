"""Running what was exported."""
