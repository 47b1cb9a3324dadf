"""Storage: the artifact store, files, locations, object stores, their lock, cleanup, and the Hub's client."""
