"""How a job's runner is started, found again, stopped and waited for."""
