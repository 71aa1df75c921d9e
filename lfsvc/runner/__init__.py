"""The runner: the main process of a job. Knows one job, and neither the database nor the bus."""
