"""The client: the command line. Holds no state and imports nothing of the service."""
