"""Proving masks: artifacts, policies, checks, verdicts and their reports."""
