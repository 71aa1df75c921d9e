"""What LLaMA-Factory means. Knows nothing of queues, units or D-Bus."""
