"""Patterns, masks, the lock, and the scan that finds zeros."""
