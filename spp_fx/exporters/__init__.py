"""Export formats: `format` has the contract and the registry, each format is a module."""
