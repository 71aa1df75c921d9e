"""A durable job queue for LLaMA-Factory, run as a systemd user service."""

__version__ = "0.1.0"
