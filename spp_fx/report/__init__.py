"""Verdicts in the words of other tools."""
