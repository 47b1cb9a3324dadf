"""Storage: artifacts, files, object stores, locks, the Hub's client."""
